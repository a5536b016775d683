"""One LoRA run as `peft` users do it today: one process, `transformers.Trainer`, dynamic padding, defaults.

    python benchmarks/peft_trainer_run.py --work work.json --r 8 --lr 1e-3 --out DIR [--tuned]

--tuned adds Trainer's own bf16 and length grouping. `work.json` is written by sweep_vs_peft.py. DIR gets the adapter
and result.json. On purpose in the peer's favour: no progress bar, no checkpoints on the way, large validation batches.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import EvalPrediction, Trainer, TrainingArguments

from benchmarks import peft_work as peft_side


def arguments(work: peft_side.Work, lr: float, out: Path, *, tuned: bool) -> TrainingArguments:
    better: dict[str, Any] = {"bf16": True, "train_sampling_strategy": "group_by_length"} if tuned else {}
    return TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=work.batch_size, per_device_eval_batch_size=work.eval_rows,
        num_train_epochs=work.epochs, learning_rate=lr, lr_scheduler_type="linear", warmup_steps=work.warmup,
        weight_decay=0.0, max_grad_norm=work.clip, seed=work.seed, eval_strategy="steps", eval_steps=work.eval_interval,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=work.device == "cpu",
        dataloader_pin_memory=work.device == "cuda", include_num_input_tokens_seen="non_padding",
        include_for_metrics=["loss"] if work.causal else [], **better,
    )  # fmt: skip


def accuracy(p: EvalPrediction) -> dict[str, float]:
    logits: Any = p.predictions
    return {"metric": float((logits.argmax(-1) == p.label_ids).mean())}


def loss(p: EvalPrediction) -> dict[str, float]:
    """Mean over target tokens, from each batch's mean: the loss that lorabench reports."""
    weight = peft_side.targets(p.label_ids)
    batch_means: Any = p.losses  # each example carries its batch's
    return {"metric": float((batch_means * weight).sum() / weight.sum())}


def make_trainer(model: Any, work: peft_side.Work, tokenizer: Any, args: TrainingArguments) -> Trainer:
    judge: Callable[[EvalPrediction], dict[str, float]] = loss if work.causal else accuracy
    train, val = (peft_side.read_split(work, split, tokenizer) for split in ("train", "val"))
    trainer = Trainer(
        model=model, args=args, train_dataset=train, eval_dataset=val, processing_class=tokenizer,
        data_collator=peft_side.collator(work, tokenizer), compute_metrics=judge,
        # a causal model's logits of all validation rows would fill the memory; its loss is all that is wanted
        preprocess_logits_for_metrics=(lambda logits, labels: logits[:, 0, 0]) if work.causal else None,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def run(work: peft_side.Work, r: int, lr: float, out: Path, *, tuned: bool) -> dict[str, Any]:
    peft_side.quiet()
    transformers.set_seed(work.seed)
    tokenizer = peft_side.load_tokenizer(work)
    base = peft_side.load_base(work)
    base.config.pad_token_id = tokenizer.pad_token_id
    model = peft_side.adapt(base, work, r)
    trainer = make_trainer(model, work, tokenizer, arguments(work, lr, out, tuned=tuned))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.save_pretrained(out / "adapter")
    rows: Any = (trainer.train_dataset, trainer.eval_dataset)
    evaluations = [row for row in trainer.state.log_history if "eval_metric" in row]
    evaluating = sum(row["eval_runtime"] for row in evaluations)
    return {
        "r": r, "lr": lr, "train_seconds": seconds - evaluating, "tokens": trainer.state.num_input_tokens_seen,
        "steps": trainer.state.global_step, "evaluated_at": [row["step"] for row in evaluations],
        "trainable": peft_side.trainable(model), "train_examples": len(rows[0]), "val_examples": len(rows[1]),
        "metric": evaluations[-1]["eval_metric"],
        "peak_memory_bytes": peft_side.device_peak(work.device),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--r", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tuned", action="store_true")
    args = parser.parse_args()
    found = run(peft_side.read_work(args.work), args.r, args.lr, args.out, tuned=args.tuned)
    (args.out / "result.json").write_text(json.dumps([found]), encoding="utf-8")


if __name__ == "__main__":
    main()
