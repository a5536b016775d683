"""The PEFT side of the sweep benchmark: what its two scripts share. Written as a user of peft and transformers would.

All of it runs inside the clock: rows are read and tokenised here, the base is read here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

IGNORE = -100
Example = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What every run does, as the benchmark wrote it. folder: of the base; data: of train.jsonl and val.jsonl."""

    folder: str
    data: str
    auto_class: str
    labels: int
    max_length: int
    batch_size: int
    eval_rows: int
    epochs: int
    eval_interval: int
    warmup: float
    clip: float
    alpha: int
    dropout: float | None
    seed: int
    device: str
    grid: list[list[float]] = field(default_factory=list)

    @property
    def causal(self) -> bool:
        return self.auto_class == "AutoModelForCausalLM"


def read_work(path: str) -> Work:
    return Work(**json.loads(Path(path).read_text(encoding="utf-8")))


def quiet() -> None:
    """No load reports, bars or advice."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_tokenizer(work: Work) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_base(work: Work) -> Any:
    """The base in float32 with this benchmark's dropout."""
    # no cache of keys and values in training: Trainer switches it off by itself
    options = {"use_cache": False} if work.causal else {"num_labels": work.labels}
    config = transformers.AutoConfig.from_pretrained(work.folder, **options)
    if work.dropout is not None:
        for name, value in list(vars(config).items()):
            if "drop" in name and (value is None or isinstance(value, float | int)) and not isinstance(value, bool):
                setattr(config, name, work.dropout)
    auto = getattr(transformers, work.auto_class)
    return auto.from_pretrained(work.folder, config=config, dtype=torch.float32)


def adapt(base: Any, work: Work, r: int) -> Any:
    kind = peft.TaskType.CAUSAL_LM if work.causal else peft.TaskType.SEQ_CLS
    config = peft.LoraConfig(r=r, lora_alpha=work.alpha, lora_dropout=0.0, target_modules="all-linear", task_type=kind)
    return peft.get_peft_model(base, config)


def trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# -- data ---------------------------------------------------------------------------------------------------------------


def read_split(work: Work, split: str, tokenizer: Any) -> list[Example]:
    """Tokenised examples of `train` or `val`. Lists, not a `datasets.Dataset`: that is quicker by tenths of a second."""
    lines = (Path(work.data) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if work.causal:
        return _replies(rows, tokenizer, work.max_length)
    made = tokenizer([r["text"] for r in rows], truncation=True, max_length=work.max_length)
    return [{**{k: made[k][i] for k in made}, "labels": row["label"]} for i, row in enumerate(rows)]


def _replies(rows: list[Example], tokenizer: Any, most: int) -> list[Example]:
    """Prompt and reply through the chat template, the prompt masked; cut as lorabench cuts them (see its causal_lm)."""
    prompts, replies = [], []
    for row in rows:
        user = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        answer = [*user, {"role": "assistant", "content": row["response"]}]
        whole = tokenizer.apply_chat_template(answer, tokenize=False)
        end = whole.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
        prompts.append(prompt)
        replies.append(whole[len(prompt) : end])
    both = [tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, replies)]
    out = []
    for prompt_ids, reply_ids in zip(*both, strict=True):
        reply = reply_ids[: max(most - len(prompt_ids), most // 2)]
        prompt = prompt_ids[max(0, len(prompt_ids) + len(reply) - most) :]
        ids = prompt + reply
        out.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE] * len(prompt) + reply})
    return out


def collator(work: Work, tokenizer: Any) -> Any:
    """Dynamic padding: each batch to its longest example."""
    if work.causal:
        return transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE)
    return transformers.DataCollatorWithPadding(tokenizer)


# -- results ------------------------------------------------------------------------------------------------------------


def targets(labels: Any) -> Any:
    """Target tokens of each example of a causal model, [N] of [N, T]."""
    return (np.asarray(labels)[:, 1:] != IGNORE).sum(1)


def device_peak(device: str) -> int:
    """Bytes on the GPU at most; 0 on a CPU, where the benchmark watches the process."""
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else 0
