"""Records, manifests, adapters and configs, broken at random, are read or refused in words."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save_file

from fixtures.sweeps import Planted, build
from lorabench.adapters.files import load_slice
from lorabench.config.errors import ConfigError
from lorabench.config.runs import RunConfig, parse
from lorabench.report.runs_csv import runs_csv
from lorabench.report.tables import main_tables
from lorabench.results.findings import find
from lorabench.results.sweep import load

QUICK = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["../../etc/passwd", "<script>alert(1)</script>", "=cmd()", "\0", "a" * 300, "nan", "1e400"]),
)
JSON = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=6
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] + [p for key, v in inner for p in paths(v, (*at, key))]


@st.composite
def broken(draw: Callable[..., Any], value: Any) -> Any:
    """A JSON value in which one to three places hold something else, or are gone."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(paths(value)[1:] or [()]))
        if not at:
            return draw(JSON)
        parent = value
        for key in at[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[at[-1]] = draw(JSON)
        else:
            del parent[at[-1]]
    return value


def text_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)


def files_beside(folder: Path) -> set[str]:
    return {str(p.relative_to(folder.parent)) for p in folder.parent.rglob("*") if folder not in p.parents}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished sweep; two cells of two rates, three confirmation seeds."""
    root = tmp_path_factory.mktemp("fuzz") / "sweep"
    cells = (Planted("lora", (1e-3, 2e-3), 2e-3, 0.7, r=4), Planted("lora", (1e-3, 2e-3), 2e-3, 0.72, r=16))
    build(root, cells, examples=60)
    return root


def read_all(root: Path) -> None:
    """What a report reads of a sweep, up to its tables."""
    findings = find(load(root))
    runs_csv(findings)
    main_tables(findings)


def check(root: Path, target: Path, content: bytes) -> None:
    """Put content in the place of a file, read the sweep, put it back: a clean read or a ConfigError."""
    before, beside = target.read_bytes(), files_beside(root)
    try:
        target.write_bytes(content)
        with suppress(ConfigError):
            read_all(root)
        assert files_beside(root) == beside
    finally:
        target.write_bytes(before)


@QUICK
@given(st.data())
def test_records(sweep: Path, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(sorted(sweep.glob("runs/*/run.json"))))
    check(sweep, target, text_of(data.draw(broken(json.loads(target.read_text())))).encode())


@QUICK
@given(st.data())
def test_manifests(sweep: Path, data: st.DataObject) -> None:
    target = sweep / "sweep.json"
    check(sweep, target, text_of(data.draw(broken(json.loads(target.read_text())))).encode())


@QUICK
@given(st.data())
def test_bytes_of_any_file(sweep: Path, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(sorted(p for p in sweep.rglob("*") if p.is_file())))
    content = bytearray(target.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    check(sweep, target, bytes(content))


# -- adapters --------------------------------------------------------------------------------------------------------

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "target_modules": ["query"],
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "use_rslora": False,
    "task_type": "SEQ_CLS",
}
LAYER = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    g = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (2, 8), "lora_B": (8, 2)}
    save_file(
        {f"{LAYER}.{n}.weight": torch.randn(s, generator=g) for n, s in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    load_slice(folder)
    return folder


@QUICK
@given(st.data())
def test_peft_folders(adapter: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("broken") / "adapter"
    shutil.copytree(adapter, folder)
    if data.draw(st.booleans()):
        (folder / "adapter_config.json").write_text(text_of(data.draw(broken(CONFIG))))
    else:
        content = bytearray((folder / "adapter_model.safetensors").read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, min(200, len(content) - 1)))] = data.draw(st.integers(0, 255))
        (folder / "adapter_model.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    beside = files_beside(folder)
    with suppress(ConfigError):
        state, plan = load_slice(folder)
        assert all(torch.is_tensor(t) for t in state.values()) and plan.adapters
    assert files_beside(folder) == beside
    shutil.rmtree(folder.parent)


# -- configs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    from hydra import compose, initialize_config_dir

    from lorabench.launch.command_line import config_dir

    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("config")
    with np.errstate(all="ignore"):
        found: Any = OmegaConf.to_container(cfg, resolve=False)
    found["sweep"]["name"] = "fuzz"
    return found


@QUICK
@given(st.data())
def test_configs(composed: dict[str, Any], data: st.DataObject) -> None:
    value = data.draw(broken(composed))
    if not isinstance(value, dict):
        return
    with suppress(OmegaConfBaseException):
        cfg = OmegaConf.create(value)  # it has a grammar of its own; the command line shows its errors
        with suppress(ConfigError):
            run, _ = parse(cfg)
            assert RunConfig.from_dict(run.to_dict()).run_id == run.run_id
