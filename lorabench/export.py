"""`python -m lorabench.export <run or sweep dir> --out DIR`: a trained run as a PEFT folder, or merged as a plain checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.errors import ConfigError
from lorabench.config.overrides import flatten
from lorabench.runtime.command import command
from lorabench.runtime.files import atomic_folder, check_empty
from lorabench.runtime.terminal import say

if TYPE_CHECKING:
    from lorabench.training.saved_run import SavedRun

AUTO_PEFT = {  # transformers' class that loads a base to PEFT's that loads it with its adapter
    f"AutoModel{task}": f"AutoPeftModel{task or 'ForFeatureExtraction'}"
    for task in ("", "ForCausalLM", "ForSeq2SeqLM", "ForSequenceClassification", "ForTokenClassification")
}
BITS = {"float32": 24, "bfloat16": 8, "float16": 11}  # of the significand


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m lorabench.export", description="Write a trained run in a format other software reads."
    )
    p.add_argument(
        "run",
        type=Path,
        help="a run's directory, <sweep>/runs/<run_id>, or a sweep's: the best confirmed run of its recommended cell",
    )
    p.add_argument("--cell", help="of a sweep, another cell than the recommended one: its id, or its name in tables")
    p.add_argument(
        "--out", type=Path, required=True, help="where to: a folder that does not exist yet, or an empty one"
    )
    p.add_argument("--merged", action="store_true", help="a plain transformers checkpoint instead of a PEFT folder")
    p.add_argument(
        "--dtype", choices=BITS, help="type of the merged weights (default float32); merging is done in float32"
    )
    p.add_argument(
        "--base",
        help="what the adapter names as its base: a folder, or the hub id of the original "
        "(default: the id it was trained on, else the folder of its files on this machine)",
    )
    p.add_argument(
        "--trust", action="store_true", help="let Python files run that the record names (local, extra_metrics)"
    )
    return p


def export(
    place: Path,
    out: Path,
    *,
    cell: str | None = None,
    merged: bool = False,
    dtype: str | None = None,
    base: str | None = None,
    trust: bool = False,
) -> list[str]:
    """Write a run's adapter or merged model to `out`, whole or not at all, and return lines about it.

    place, cell: a run's directory, or a sweep's, as `results.best_run` takes them. base: what loads the base, written
    into the adapter; None: what the run's own `model.source` comes to on this machine. trust: whether Python files that
    its record names may run. Raises `ConfigError` for a directory that is no trained run, an `out` that holds files, and methods PEFT's LoRA
    format cannot hold.
    """
    from lorabench.results.best_run import best_run
    from lorabench.training.saved_run import open_run

    check_empty(out, "--out")
    if dtype and not merged:
        raise ConfigError("--dtype", dtype, "with --merged only; an adapter keeps the type it was trained in")
    if base is not None and merged:
        raise ConfigError("--base", base, "without --merged: a merged model needs no base")
    found = best_run(place, cell)
    saved = open_run(found.path, trust=trust)
    chosen = [f"taken from sweep {place.resolve().name}: {found.why}"] if found.why else []
    made = _export_merged(saved, out, dtype or "float32", chosen) if merged else _export_peft(saved, out, base, chosen)
    return [*chosen, *made]


def _export_peft(saved: SavedRun, out: Path, base: str | None, chosen: Sequence[str]) -> list[str]:
    from lorabench.adapters.files import write_peft
    from lorabench.adapters.peft import is_representable

    state, plan = saved.weights()
    if not is_representable(plan):
        raise ConfigError("method.name", saved.run.method.name, "PEFT's format holds LoRA adapters only; add --merged")
    info, processor = saved.run.model.info(saved.head), saved.run.model.processor()
    name, revision = base_name(saved, base)
    with atomic_folder(out.resolve()) as tmp:
        write_peft(tmp, state, plan, info=info, run={"model": {"source": name, "revision": revision}}, head=saved.head)
        if processor is not None:
            processor.save_pretrained(tmp)
        (tmp / "README.md").write_text(card(saved, base=name, notes=chosen), encoding="utf-8")
    return [f"PEFT adapter in {out}, base {name or 'of your own'}: the lines that load it are in its README.md"]


def base_name(saved: SavedRun, asked: str | None) -> tuple[str | None, str | None]:
    """Return what loads a run's base without lorabench, and its revision: a hub id, or a folder on this machine.

    asked: another one than the run's own. (None, None) for a base that transformers cannot load. Raises `ConfigError`
    for what is neither a model's folder nor a hub id.
    """
    if asked is not None:
        if (Path(asked).expanduser() / "config.json").is_file():
            return str(Path(asked).expanduser().resolve()), None
        if asked.startswith(".") or not _is_hub_id(asked):
            raise ConfigError("--base", asked, "a model's folder (with config.json), or a hub id such as owner/name")
        return asked, None
    model = saved.run.model
    if _is_hub_id(model.source):
        return model.source, getattr(model, "revision", None)
    folder = model.transformers_folder()
    return None if folder is None else str(folder.resolve()), None


def _is_hub_id(source: str | None) -> bool:
    from lorabench.models.folder import HUB_ID

    return bool(source and HUB_ID.fullmatch(source) and not Path(source).exists())


def _export_merged(saved: SavedRun, out: Path, dtype: str, chosen: Sequence[str]) -> list[str]:
    import torch

    from lorabench.adapters.merge import merge
    from lorabench.models.pretrained import quiet

    state, plan = saved.weights()
    base = saved.base(dtype="float32", dropout=False)
    done = merge(base.model, state, plan)
    notes = list(done.untied)
    if done.layers:
        notes.append(
            f"adapters merged into {len(done.layers)} layers in float32, largest rounding error {done.max_error:.1e}"
        )
    if dtype != "float32":
        base.model.to(getattr(torch, dtype))
        notes.append(f"then rounded to {dtype}: {BITS[dtype]} significant bits a weight")
    model: Any = base.model
    if not hasattr(model, "save_pretrained"):
        raise ConfigError("--merged", saved.run.model.name, "a base of transformers; this one has no `save_pretrained`")
    with atomic_folder(out.resolve()) as tmp:
        with quiet():  # no progress bar for a copy
            model.save_pretrained(tmp)
        if base.processor is not None:
            base.processor.save_pretrained(tmp)
        (tmp / "README.md").write_text(card(saved, merged=True, notes=[*chosen, *notes]), encoding="utf-8")
    return [f"transformers checkpoint in {out}: {saved.head.auto_class}.from_pretrained({str(out)!r}) loads it", *notes]


def card(saved: SavedRun, *, merged: bool = False, base: str | None = None, notes: Sequence[str] = ()) -> str:
    """Return a model card: what it is, how to load it, what it scored, with which settings, from what.

    base: what the adapter names as its base, as `base_name` returns it.
    """
    from lorabench.training.saved_run import metric_rows

    record, model = saved.record, saved.run.model
    front: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "tags": ["lorabench", saved.run.method.name],
    }
    source = model.source if merged else base
    if _is_hub_id(source):
        front["base_model"] = source
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {saved.label} on {model.name}, {saved.run.task.name}", "", _usage(saved, merged, base), ""]
    lines += [*(f"- {_escape(note)}" for note in notes), ""] if notes else []
    rows = [(name, f"{value:.4g}") for name, value in metric_rows(record)]
    kept = f"One run, seed {saved.run.seed}"
    kept += (
        "."
        if record.role == "confirm"
        else ", which took part in choosing the learning rate: its validation numbers flatter it."
    )
    lines += ["## Metrics", "", kept, "", *_table(("metric", "value"), rows), ""]
    lines += ["## Settings", "", *_table(("setting", "value"), _settings(record.config)), ""]
    facts = {
        k: record.provenance.get(k)
        for k in ("git", "packages", "data_fingerprint", "model_fingerprint", "model_notes", "precision")
    }
    lines += ["## Provenance", "", *_table(("what", "value"), [("run", record.run_id), *_settings(facts)]), ""]
    return "\n".join(lines)


def _usage(saved: SavedRun, merged: bool, base: str | None) -> str:
    """Return the lines that load the folder, as Python, and what a reader must know beside them."""
    auto, labels = saved.head.auto_class, saved.head.label_names
    if merged:
        return f'```python\nfrom transformers import {auto}\nmodel = {auto}.from_pretrained("<this folder>")\n```'
    options = ""
    if labels:
        options = f", num_labels={len(labels)}"
        # Decoders classify by an example's last token that is no padding: many do not say which one pads.
        pad = getattr(saved.run.model.processor(), "pad_token_id", None)
        options += "" if pad is None else f", pad_token_id={pad}"
    if base is not None and auto in AUTO_PEFT and saved.run.model.processor() is not None:
        lines = [f"from peft import {AUTO_PEFT[auto]}", "from transformers import AutoTokenizer"]
        lines += [f'model = {AUTO_PEFT[auto]}.from_pretrained("<this folder>"{options})']
        lines += ['tokenizer = AutoTokenizer.from_pretrained("<this folder>")']
        told = "The base is what `base_model_name_or_path` in adapter_config.json names; on another machine change it there."
    else:
        lines = ["from peft import PeftModel", f"from transformers import {auto}"]
        lines += [f'base = {auto}.from_pretrained("<the base>"{options})']
        lines += ['model = PeftModel.from_pretrained(base, "<this folder>")']
        told = ""
    named = f"Labels in order: {', '.join(map(_escape, labels))}." if labels else ""
    return "\n".join(["```python", *lines, "```", *(f"\n{text}" for text in (told, named) if text)])


def _table(header: tuple[str, str], rows: Sequence[tuple[str, Any]]) -> list[str]:
    return [f"| {header[0]} | {header[1]} |", "|---|---|", *(f"| {_escape(a)} | {_escape(b)} |" for a, b in rows)]


def _escape(value: Any) -> str:
    """Return a value as text that stays inside its table cell and stays text."""
    text = " ".join(str(value).split())
    for char in "\\`*_[]<>|":
        text = text.replace(char, "\\" + char)
    return text


def _public(value: Any) -> Any:
    """Return a value for a card, which travels: of paths of this machine only the last part."""
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "./", "../")) else value


def _settings(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the rows of a card's table: dotted settings that say something, without paths of this machine."""
    return [(key, _public(value)) for key, value in flatten(config) if value is not None and value not in ([], {})]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Exit 0: written; 2: bad input, nothing written."""
    args = parser().parse_args(argv)
    asked = {"cell": args.cell, "merged": args.merged, "dtype": args.dtype, "base": args.base, "trust": args.trust}
    for line in export(args.run, args.out, **asked):
        say(line)


if __name__ == "__main__":
    sys.exit(main())
