"""Before any clock starts: `export` writes the rows all variants share and what they must add up to; `roofline` measures.

python sweep_setup.py export <folder> <override> ...      rows and facts.json, from lorabench's own split
python sweep_setup.py roofline <folder> <device>          roofline.json: GFLOP/s of `linear` at the shapes of facts.json
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROWS = 2048  # tokens of one product
REPEATS = 7
SECONDS = 0.05  # at least, for one repeat of one shape


def export(folder: Path, overrides: list[str]) -> None:
    """Rows by split as jsonl, in lorabench's order, and facts.json. Raises `ConfigError`."""
    from hydra import compose, initialize_config_dir

    from lorabench.launch.command_line import config_dir
    from lorabench.launch.job import make_job
    from lorabench.training import preparation

    with initialize_config_dir(config_dir(), version_base="1.3"):
        run = make_job(compose("config", overrides=overrides), name="benchmark", experiment=None).run
    preparation.check_run(run)
    prepared = preparation.prepare(run)
    data, encoded = prepared.data, prepared.encoded
    for name in ("train", "val"):
        kept = {e["example"] for e in encoded.splits[name]}
        rows = [_row(r, data.label_names) for r in data.splits[name] if r["example"] in kept]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    lengths = encoded.lengths["train"]
    facts = {
        "folder": str(_weights(run.model)), "labels": len(data.label_names), "auto_class": prepared.head.auto_class,
        "tokens": sum(lengths) * (run.trainer.max_epochs or 1), "mean_length": sum(lengths) / len(lengths),
        "rows": {name: len(encoded.splits[name]) for name in ("train", "val")}, "machine": machine(),
    }  # fmt: skip
    (folder / "facts.json").write_text(json.dumps(facts | shapes(facts)), encoding="utf-8")
    _warm(Path(facts["folder"]))


def _row(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    if "prompt" in row:
        return {"prompt": row["prompt"], "response": row["response"]}
    return {"text": row["text"], "label": names.index(row["label"])}


def _warm(folder: Path) -> None:
    """Read what every variant reads at its start, so that the first one does not pay for a cold disk."""
    for name in (
        "peft",
        "accelerate",
        "transformers.trainer",
        "pytorch_lightning",
        "lorabench.sweep",
        "lorabench.report",
    ):
        importlib.import_module(name)
    for path in folder.iterdir():
        if path.is_file():
            path.read_bytes()


def _weights(model: Any) -> Path:
    """The folder transformers reads: a gguf file's float32 copy, made here if need be."""
    if model.kind == "gguf":
        from lorabench.models.gguf import convert_once

        return convert_once(model.file())
    from lorabench.models.folder import model_folder

    return model_folder(model.source)


def shapes(facts: dict[str, Any]) -> dict[str, Any]:
    """(inputs, outputs) of the linear layers inside the blocks, from transformers itself: another source than lorabench."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(facts["folder"])
    with torch.device("meta"):
        model = getattr(transformers, facts["auto_class"]).from_config(config)
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    blocks = [(m.in_features, m.out_features) for n, m in linear if any(part.isdigit() for part in n.split("."))]
    return {"blocks": blocks, "layers": config.num_hidden_layers, "width": config.hidden_size}


def machine() -> dict[str, Any]:
    """What ran: no names of hosts or users."""
    import torch

    names = ("torch", "transformers", "peft", "accelerate", "lorabench")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2), "gpu": gpu, "python": platform.python_version(),
        **{name: version(name) for name in names},
    }  # fmt: skip


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())


def roofline(folder: Path, device: str) -> None:
    """GFLOP/s of `torch.nn.functional.linear`, all linear layers of the blocks once, by precision: median repeat."""
    import torch

    blocks = [tuple(x) for x in json.loads((folder / "facts.json").read_text(encoding="utf-8"))["blocks"]]
    found = {}
    for name, dtype in (("32", torch.float32), ("bf16", torch.bfloat16)):
        seconds = {shape: _seconds(shape, dtype, device) for shape in set(blocks)}
        flops = sum(2 * ROWS * i * o for i, o in blocks)
        found[name] = flops / sum(seconds[shape] for shape in blocks) / 1e9
    (folder / "roofline.json").write_text(json.dumps(found), encoding="utf-8")


def _seconds(shape: tuple[int, ...], dtype: Any, device: str) -> float:
    """Of one product [ROWS, inputs] x [inputs, outputs]."""
    import torch
    from torch.nn import functional as F

    x = torch.randn(ROWS, shape[0], device=device).to(dtype)
    w = torch.randn(shape[1], shape[0], device=device).to(dtype)
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            F.linear(x, w)
        wait()
        return (time.perf_counter() - start) / count

    with torch.inference_mode():
        timed(3)
        count = max(1, round(SECONDS / timed(3)))
        return median(timed(count) for _ in range(REPEATS))


def main(arguments: list[str]) -> int:
    what, folder, *rest = arguments
    from lorabench.config.errors import ConfigError

    try:
        export(Path(folder), rest) if what == "export" else roofline(Path(folder), rest[0])
    except ConfigError as e:
        print(e)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
