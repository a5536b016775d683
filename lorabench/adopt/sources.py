"""Results of other tools as records: rows of a table, folders that PEFT and transformers' Trainer wrote. Pure but for
reading.

What a source does not say is not made up: it is listed in the record's `provenance.missing`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabench.config.aliases import match_columns
from lorabench.config.errors import ConfigError
from lorabench.results.formatting import SHARES
from lorabench.store.records import Record

METHODS = {
    "lora": "lora",
    "dora": "dora",
    "vera": "vera",
    "ia3": "ia3",
    "full": "full",
    "none": "full",
    "bitfit": "bitfit",
}


STATUSES = {
    "finished": "completed",
    "completed": "completed",
    "success": "completed",
    "failed": "failed",
    "crashed": "failed",
    "killed": "failed",
    "diverged": "diverged",
    "pruned": "pruned",
    "": "completed",
}


RESULT_FILES = ("trainer_state.json", "all_results.json", "eval_results.json")


WANTED_SETTINGS = (
    "method.name",
    "method.r",
    "method.alpha",
    "method.target_modules",
    "trainer.batch_size",
    "model.name",
    "task.name",
    "seed",
)


WHOLE_NUMBERS = {"method.r": 1, "seed": 0}  # settings that are whole numbers, and the least of each


FIRST_MADE_UP_SEED = (
    2**30
)  # runs without a seed get a number from here on, by what they say: no two are taken for the same seed


def from_table(
    path: Path, *, columns: Mapping[str, str], fixed: Mapping[str, str], metrics: Mapping[str, str], primary: str | None
) -> list[Record]:
    """One record a row of a csv file with a header.

    columns: our setting -> column, beyond `ALIASES`; fixed: settings equal in all rows; metrics: `test/accuracy` ->
    column, beyond columns that start with test/, val/, eval/ (or _). Raises `ConfigError` for a file that says too
    little.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            head = f.readline()
            f.seek(0)
            rows = list(csv.DictReader(f, delimiter=next((mark for mark in ",;\t" if mark in head), ",")))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ConfigError("source", str(path), f"a csv file with a header, in UTF-8 ({e})") from e
    if not rows:
        raise ConfigError("source", str(path), "a csv file with a header and at least one row")
    names = [name for name in rows[0] if name is not None]
    for key, column in {**columns, **metrics}.items():
        if column not in names:
            raise ConfigError(key, column, f"a column of {path.name}: {', '.join(names)}")
    taken = {**match_columns(names), **columns}
    scored = {**scores_of([n for n in names if n not in taken.values()]), **metrics}
    if not scored:
        raise ConfigError("--metric", None, f"test/<name>=<column>, for one of: {', '.join(names)}")
    said = [
        {key: _value(row[column] or "") for key, column in taken.items()} | {k: _value(v) for k, v in fixed.items()}
        for row in rows
    ]
    values = [
        {name: _number(row[column], f"{path.name}, row {i + 1}, {column}") for name, column in scored.items()}
        for i, row in enumerate(rows)
    ]
    primary = primary or _primary(name for row in values for name, value in row.items() if value is not None)
    return _mark_phases(
        [
            _record(*row, primary, {"file": path.name, "row": i + 1})
            for i, row in enumerate(zip(said, values, strict=True))
        ]
    )


def _mark_phases(records: list[Record]) -> list[Record]:
    """A run that measured nothing (it crashed) is one of those it was started with: of the tested runs, where there are
    any of the same settings but the seed, else of the others."""

    def settings(record: Record) -> str:
        return json.dumps({**record.config, "seed": None}, sort_keys=True)

    tested = {settings(r) for r in records if r.role == "confirm"}
    for record in records:
        if not any("/" in name for name in record.metrics) and settings(record) in tested:
            record.role = "confirm"
    return records


def from_folders(folders: Sequence[Path], *, fixed: Mapping[str, str], primary: str | None) -> list[Record]:
    """One record a folder with adapter_config.json (PEFT) and trainer_state.json, or all_results.json,
    eval_results.json.

    Pickled files (training_args.bin, optimizer.pt) are not opened: the largest rate that was logged stands for the
    peak.
    """
    records = []
    for folder in folders:
        if not folder.exists():
            raise ConfigError("source", str(folder), "a csv file or folders; there is nothing of this name")
        if not folder.is_dir():
            raise ConfigError("source", str(folder), "a folder that PEFT or transformers' Trainer wrote")
        adapter, state = _json(folder / "adapter_config.json"), _state(folder)
        results = _json(folder / "all_results.json") | _json(folder / "eval_results.json")
        last = {
            k: v for row in state.get("log_history", []) for k, v in row.items() if k.startswith(("eval_", "test_"))
        }
        values = {name: float(v) for name, v in by_score({**last, **results}).items() if isinstance(v, (int, float))}
        if not values:
            below = sorted({p.parent.name for p in folder.glob("*/*.json") if p.name in RESULT_FILES})
            hint = f"; its folders {', '.join(below[:3])} have such files: give {folder}/*/" if below else ""
            allowed = f"a folder with trainer_state.json or eval_results.json with eval_ or test_ numbers{hint}"
            raise ConfigError("source", str(folder), allowed)
        said = _adapter_settings(adapter) | _state_settings(state) | {k: _value(v) for k, v in fixed.items()}
        records.append(_record(said, values, primary, {"folder": folder.name}))
    return records


def _adapter_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    if not config:
        return {"method.name": "full"}
    kind = "dora" if config.get("use_dora") else str(config.get("peft_type", "LORA")).lower()
    target = config.get("target_modules")
    return {
        "method.name": kind,
        "method.r": config.get("r"),
        "method.alpha": config.get("lora_alpha"),
        "method.dropout": config.get("lora_dropout"),
        "method.use_rslora": bool(config.get("use_rslora")),
        "method.target_modules": sorted(target) if isinstance(target, list) else target,
        "model.name": config.get("base_model_name_or_path"),
    }


def _state_settings(state: Mapping[str, Any]) -> dict[str, Any]:
    rates = [row["learning_rate"] for row in state.get("log_history", []) if "learning_rate" in row]
    said = {"optimizer.lr": max(rates) if rates else None, "trainer.max_steps": state.get("max_steps")}
    return said | {
        "trainer.max_epochs": state.get("num_train_epochs"),
        "trainer.batch_size": state.get("train_batch_size"),
    }


def _state(folder: Path) -> dict[str, Any]:
    """Return the state of the folder itself, else of its latest checkpoint."""
    inside = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: _step(p.parent.name))
    for path in [folder / "trainer_state.json", *reversed(inside)]:
        if found := _json(path):
            return found
    return {}


def _step(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else -1


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError("source", str(path), f"a whole JSON file ({e})") from e
    if not isinstance(value, dict):
        raise ConfigError("source", str(path), "a JSON object")
    return value


def _record(
    said: Mapping[str, Any],
    values: Mapping[str, float | None],
    primary: str | None,
    where: Mapping[str, Any],
) -> Record:
    said = {key: value for key, value in said.items() if value is not None and value != ""}
    place = ", ".join(f"{key} {value}" for key, value in where.items())
    said |= {key: _whole(key, said[key], least, place) for key, least in WHOLE_NUMBERS.items() if key in said}
    for key, number in values.items():
        check_share(key, number, place)
    said |= {"method.name": "dora"} if said.pop("method.use_dora", None) is True else {}
    name = str(said.get("method.name", "lora" if "method.r" in said else "full")).lower()
    if name == "rslora":
        name, said = "lora", {**said, "method.use_rslora": True}
    if name not in METHODS:
        raise ConfigError("method.name", name, f"allowed: {', '.join([*METHODS, 'rslora'])}; or --set method.name=...")
    state = str(said.pop("status", ""))
    status = STATUSES.get(state.lower())
    if status is None:
        allowed = f"allowed: {', '.join(filter(None, STATUSES))} ({place}); a run that has not ended has no result yet"
        raise ConfigError("status", state, allowed)
    if not _positive(said.get("optimizer.lr")):
        raise ConfigError(
            "optimizer.lr",
            said.get("optimizer.lr"),
            "the learning rate of every run: a column, or --set optimizer.lr=...",
        )
    none_of_its_own = METHODS[name] == "full"
    missing = [
        k
        for k in WANTED_SETTINGS
        if k not in said and not (none_of_its_own and k.startswith("method.") and k != "method.name")
    ]
    config: dict[str, Any] = {
        "model": {"name": "unknown"},
        "task": {"name": "unknown"},
        "method": {},
        "optimizer": {},
        "trainer": {},
    }
    told = json.dumps([dict(said), dict(values), dict(where)], sort_keys=True).encode()
    config["seed"] = said.get("seed", FIRST_MADE_UP_SEED + int(hashlib.sha256(told).hexdigest()[:7], 16))
    for key, value in said.items():
        section, _, field = key.partition(".")
        if field:
            config[section][field] = value
    config["method"]["name"] = METHODS[name]
    finite = {key: value for key, value in values.items() if value is not None}
    metrics: dict[str, Any] = dict(finite)
    metrics["primary"] = primary or _primary(finite)
    role = "confirm" if any(key.startswith("test/") for key in finite) else "tune"
    digest = hashlib.sha256(json.dumps([config, metrics, dict(where)], sort_keys=True).encode()).hexdigest()[:12]
    provenance = {"adopted": dict(where), "missing": missing}
    return Record(digest, role, status, config, metrics, {}, provenance)


def _primary(measured: Iterable[str]) -> str:
    """The first metric that is not the loss, by name; the loss where there is nothing else."""
    names = sorted({key.partition("/")[2] for key in measured})
    return next((name for name in names if name != "loss"), "loss")


def _whole(key: str, value: Any, least: int, place: str) -> int:
    """A whole number, as pandas may have written it (4.0). Raises `ConfigError`."""
    ok = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value == int(value)
    )
    if not ok or value < least:
        raise ConfigError(key, value, f"a whole number from {least} on ({place})")
    return int(value)


def check_share(name: str, value: float | None, place: str) -> None:
    """Raise `ConfigError` for an accuracy in per cent: reports take shares, and would show 71.3 as 7,130 %."""
    if value is not None and name.partition("/")[2] in SHARES and not 0 <= value <= 1:
        raise ConfigError(name, value, f"a share from 0 to 1, such as 0.713 for 71.3 % ({place})")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _value(text: str) -> Any:
    """A cell or a `--set` value as YAML would read it: a number, true, a list; else the text."""
    text = text.strip()
    if text.lower() in ("", "null", "none", "nan"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.startswith("[") and text.endswith("]"):
        return [part.strip().strip("'\"") for part in text[1:-1].split(",") if part.strip()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _number(text: str | None, where: str) -> float | None:
    if text is None or not text.strip() or text.strip().lower() in ("nan", "none", "null"):
        return None
    try:
        return float(text)
    except ValueError as e:
        raise ConfigError(where, text, "a number, or empty") from e


NO_RESULT_WORDS = ("runtime", "per_second", "samples", "model_preparation")


def scores_of(names: Sequence[str]) -> dict[str, str]:
    return {score: name for name in names if (score := score_of(name))}


def by_score(values: Mapping[str, Any]) -> dict[str, Any]:
    return {score: value for name, value in values.items() if (score := score_of(name))}


def score_of(name: str) -> str | None:
    """`eval_accuracy` -> `val/accuracy`; None for what is no result (speeds, sizes)."""
    low = name.lower().replace(".", "/")
    for prefix, ours in (("eval", "val"), ("validation", "val"), ("val", "val"), ("test", "test")):
        for mark in ("/", "_"):
            rest = low.removeprefix(prefix + mark)
            if rest and rest != low and not any(word in rest for word in NO_RESULT_WORDS):
                return f"{ours}/{rest}"
    return None
