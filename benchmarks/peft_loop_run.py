"""All LoRA runs of the grid in one process with `peft` and a plain torch loop: what a careful user would write.

    python benchmarks/peft_loop_run.py --work work.json --out DIR

Base and tokenizer are loaded once and rows tokenised once; every run puts a fresh adapter on the base, in float32.
`work.json` is written by sweep_vs_peft.py. DIR gets an adapter a run and result.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from benchmarks import peft_work as peft_side


@dataclass
class Data:
    """Tokenised rows and how they become padded batches."""

    train: Any  # lists of examples
    val: Any
    collate: Any

    def batches(self, work: peft_side.Work) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Shuffled training batches, and validation batches in order."""
        order = torch.Generator().manual_seed(work.seed)
        train: DataLoader[Any] = DataLoader(
            self.train, work.batch_size, shuffle=True, generator=order, collate_fn=self.collate
        )
        return train, DataLoader(self.val, work.eval_rows, collate_fn=self.collate)


@dataclass
class Clock:
    """What one run did, and for how long."""

    train: float = 0.0
    tokens: int = 0
    steps: int = 0


def train(model: Any, data: Data, work: peft_side.Work, lr: float) -> dict[str, Any]:
    """AdamW, linear schedule with warm-up, clipping; validation rows every `eval_interval` steps and at the end."""
    loader, val = data.batches(work)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    total = len(loader) * work.epochs
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, math.ceil(work.warmup * total), total)
    clock, evaluated, metric, start = Clock(), [], math.nan, time.perf_counter()
    model.train()
    for _ in range(work.epochs):
        for batch in loader:
            clock.tokens += int(batch["attention_mask"].sum())
            batch = batch.to(work.device)
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, work.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            clock.steps += 1
            if clock.steps % work.eval_interval == 0 or clock.steps == total:
                clock.train += time.perf_counter() - start
                metric = evaluate(model, val, work)
                evaluated.append(clock.steps)
                start = time.perf_counter()
    return {
        "train_seconds": clock.train, "tokens": clock.tokens, "steps": clock.steps, "evaluated_at": evaluated,
        "metric": metric,
    }  # fmt: skip


@torch.inference_mode()
def evaluate(model: Any, loader: DataLoader[Any], work: peft_side.Work) -> float:
    """Accuracy of the validation rows, or of a causal model the mean loss a target token."""
    model.eval()
    total = weight = 0.0
    for batch in loader:
        batch = batch.to(work.device)
        out = model(**batch)
        count = int(peft_side.targets(batch["labels"].cpu()).sum()) if work.causal else len(batch["labels"])
        right = out.loss * count if work.causal else (out.logits.argmax(-1) == batch["labels"]).sum()
        total, weight = total + float(right), weight + count
    model.train()
    return total / weight


def run_all(work: peft_side.Work, out: Path) -> list[dict[str, Any]]:
    peft_side.quiet()
    transformers.set_seed(work.seed)
    tokenizer = peft_side.load_tokenizer(work)
    base = peft_side.load_base(work).to(work.device)
    base.config.pad_token_id = tokenizer.pad_token_id
    read = {split: peft_side.read_split(work, split, tokenizer) for split in ("train", "val")}
    data = Data(read["train"], read["val"], peft_side.collator(work, tokenizer))
    found = []
    for rank, lr in work.grid:
        start, r = time.perf_counter(), int(rank)
        transformers.set_seed(work.seed)
        model = peft_side.adapt(base, work, r)
        made = train(model, data, work, lr)
        model.save_pretrained(out / f"adapter-r{r}-lr{lr:g}")
        made |= {"r": r, "lr": lr, "trainable": peft_side.trainable(model)}
        base = model.unload()
        made |= {"seconds": time.perf_counter() - start, "peak_memory_bytes": peft_side.device_peak(work.device)}
        found.append(made | {"train_examples": len(data.train), "val_examples": len(data.val)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = run_all(peft_side.read_work(args.work), args.out)
    (args.out / "result.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
