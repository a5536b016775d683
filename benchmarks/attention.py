"""Checks the table behind `model.attention=auto`: transformers' eager attention against SDPA, by length.

    python benchmarks/attention.py --json attention.json
    python benchmarks/attention.py --repeats 1 --lengths 32 128      # does it work here?

Forward and backward of one layer's attention at MiniLM-L6's shapes (12 heads of width 32), no dropout, a padded row in
each batch, in the device's own precision. A batch holds as many tokens as a part of a step does. Ratio: seconds of SDPA
over seconds of eager, in turn in each repeat; above 1 eager is faster. It judges nothing: the exit code is always 0.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lorabench.config.errors import ConfigError
from lorabench.config.runs import RunConfig, parse
from lorabench.launch.command_line import config_dir
from lorabench.training import precision

LENGTHS = (16, 32, 64, 128, 256, 512)
HEADS, WIDTH = 12, 32


def configured(length: int, device: str) -> RunConfig:
    """A run on MiniLM with texts of at most `length` tokens, everything else `auto`."""
    from hydra import compose, initialize_config_dir

    overrides = ["sweep.name=attention", f"task.max_length={length}", f"trainer.accelerator={device}"]
    with initialize_config_dir(config_dir(), version_base=None):
        return parse(compose("config", overrides=overrides))[0]


def attention(kind: str) -> Callable[..., Any]:
    """transformers' own function for `eager` or `sdpa`, as BERT calls it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.bert.modeling_bert import eager_attention_forward

    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
    return function


def mask(kind: str, hidden: torch.Tensor) -> torch.Tensor | None:
    """What BERT gives that function for hidden [B, T, H] whose last row is a quarter padding."""
    from transformers import BertConfig
    from transformers.masking_utils import create_bidirectional_mask

    config = BertConfig(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, attn_implementation=kind)
    real = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    real[-1, -(hidden.shape[1] // 4) :] = 0
    found: torch.Tensor | None = create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=real)
    return found


def work(kind: str, rows: int, length: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """One forward and backward over [rows, heads, length, width]; heads are views of [rows, length, H], as in BERT."""
    module = torch.nn.Module().train()
    module.is_causal = False  # type: ignore[assignment]
    torch.manual_seed(0)
    flat = [torch.randn(rows, length, HEADS * WIDTH, device=device).to(dtype).requires_grad_() for _ in range(3)]
    hide, function = mask(kind, flat[0].detach()), attention(kind)
    grad = torch.randn(rows, length, HEADS, WIDTH, device=device).to(dtype)

    def step() -> None:
        q, k, v = (x.view(rows, length, HEADS, WIDTH).transpose(1, 2) for x in flat)
        out, _ = function(module, q, k, v, hide, dropout=0.0, scaling=WIDTH**-0.5)
        torch.autograd.grad(out, flat, grad)

    return step


def seconds(step: Callable[[], None], device: str, *, least: float) -> float:
    """Mean of as many calls as fill `least` seconds."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < least:
        step()
        wait()
        count += 1
    return (time.perf_counter() - start) / count


def compare(length: int, *, device: str, repeats: int, least: float) -> dict[str, Any]:
    """Seconds of both in turn, median ratio with the least and the most of the repeats, and what the table picks."""
    resolved = precision.resolve(configured(length, device))
    dtype = getattr(torch, resolved.base_dtype)
    rows = max(2, resolved.part_tokens // length)
    steps = {kind: work(kind, rows, length, resolved.device, dtype) for kind in ("eager", "sdpa")}
    for step in steps.values():  # first calls allocate
        step()
        step()
    took = [{kind: seconds(step, resolved.device, least=least) for kind, step in steps.items()} for _ in range(repeats)]
    ratios = [t["sdpa"] / t["eager"] for t in took]
    ms = {kind: median(t[kind] for t in took) * 1e3 for kind in steps}
    faster = "eager" if min(ratios) > 1 else "sdpa" if max(ratios) < 1 else "not told apart"
    return {
        "T": length, "rows": rows, "device": resolved.device, "dtype": resolved.base_dtype, "eager_ms": ms["eager"],
        "sdpa_ms": ms["sdpa"], "ratio": median(ratios), "least": min(ratios), "most": max(ratios), "faster": faster,
        "table": resolved.attention,
    }  # fmt: skip


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The comparisons as markdown."""
    lines = [
        f"{rows[0]['device']}, {rows[0]['dtype']}, forward and backward of one layer's attention; {torch.__version__}",
        "",
        "| T | rows | eager, ms | SDPA, ms | SDPA / eager (least to most) | faster | table picks |",
        "|--:|--:|--:|--:|---|---|---|",
    ]
    for x in rows:
        ratio = f"{x['ratio']:.2f} ({x['least']:.2f} to {x['most']:.2f})"
        lines.append(
            f"| {x['T']} | {x['rows']} | {x['eager_ms']:.2f} | {x['sdpa_ms']:.2f} | {ratio} | {x['faster']} | {x['table']} |"
        )
    against = [str(x["T"]) for x in rows if x["faster"] in ("eager", "sdpa") and x["faster"] != x["table"]]
    lines += ["", f"The table picks the slower one at T = {', '.join(against)}." if against else "The table is never the slower one beyond the spread."]  # fmt: skip
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], prog="benchmarks/attention.py")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each of the two, at least, in each repeat")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args(argv)
    try:
        rows = [compare(T, device=args.device, repeats=args.repeats, least=args.seconds) for T in args.lengths]
    except ConfigError as e:  # no such device here: nothing to compare
        return print(e)
    print(text(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
