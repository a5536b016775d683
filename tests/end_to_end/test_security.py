"""The threats of SECURITY.md, one test each (fuzzing: test_fuzz.py)."""

from __future__ import annotations

import csv
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.sweeps import Planted, build
from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.runtime.files import atomic_write
from lorabench.store.records import Store
from lorabench.training import precision

HOSTILE = '<script>alert("x")</script>'


class Payload:
    """What a malicious file holds: opened by pickle, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.fixture
def payload(tmp_path: Path) -> tuple[bytes, Path]:
    mark = tmp_path / "the payload ran"
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # it does run where pickle opens it
    mark.unlink()
    return pickle.dumps(Payload(mark)), mark


# -- files that hold a pickle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "weights.safetensors"])
def test_an_adapter_with_a_pickle_inside_is_refused(tmp_path: Path, payload: tuple[bytes, Path], name: str) -> None:
    from lorabench.adapters.files import load_slice

    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    (folder / name).write_bytes(payload[0])
    with pytest.raises(ConfigError):
        load_slice(folder)
    assert not payload[1].exists()


def test_a_model_folder_with_pickled_weights_is_refused(tmp_path: Path, payload: tuple[bytes, Path]) -> None:
    from fixtures.runs import make_base, make_data, make_run

    base = make_base(tmp_path / "base", "bert")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(payload[0])
    run = make_run(base, make_data(tmp_path / "data.csv"))
    from lorabench.training import preparation

    with pytest.raises(ConfigError, match="safetensors"):
        preparation.load_base(run, preparation.prepare(run).head, precision.resolve(run))
    assert not payload[1].exists()


def test_test_results_with_a_pickle_inside_are_refused(tmp_path: Path, payload: tuple[bytes, Path]) -> None:
    store = Store(tmp_path / "sweep")
    path = store.run_dir("0123456789ab") / "test.npz"
    path.parent.mkdir(parents=True)
    raw = io.BytesIO()
    np.savez(raw, example=np.array([Payload(payload[1])], dtype=object))
    for content in (payload[0], raw.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ExistingWork, match="0123456789ab"):
            store.arrays("0123456789ab", "test")
    assert not payload[1].exists()


# -- names that lead elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/b", "..", ".hidden", "a\nb", "x" * 101, ""])
def test_a_sweep_name_is_no_path(cli: Any, tmp_path: Path, name: str) -> None:
    code, out = cli(f"sweep.name={json.dumps(name)}" if name else 'sweep.name=""', "sweep.dry_run=true")
    assert (code, "sweep.name=" in out) == (2, True), out
    assert not (tmp_path.parent / "out").exists()


def test_a_manifest_cannot_name_a_run_elsewhere(tmp_path: Path) -> None:
    store = Store(tmp_path / "sweep")
    for run_id in ("../../outside", "0123456789AB", "0123456789ab/..", ""):
        manifest = {"schema": 1, "cells": [], "runs": {run_id: {"lr": 1e-3, "seed": 0}}, "packs": []}
        atomic_write(store.root / "sweep.json", json.dumps(manifest))
        with pytest.raises(ExistingWork, match="12 hex digits"):
            store.manifest()


def test_a_record_in_another_runs_folder_is_no_record(tmp_path: Path) -> None:
    store = build(tmp_path / "sweep", [Planted("lora", (1e-3,), 1e-3, 0.7, r=4)], examples=20)
    one, other = store.run_ids()[:2]
    (store.run_dir(one) / "run.json").write_bytes((store.run_dir(other) / "run.json").read_bytes())
    assert store.read(one) is None


# -- code by name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument",
    [
        "+model._target_=os.system",
        "+hydra.callbacks.x._target_=os.system",
        "+hydra.callbacks.x={_target_:pathlib.Path.touch}",
        "hydra.launcher._target_=os.system",
        "hydra.sweeper._target_=os.system",
        "+task={_target_:os.system}",
        "+hydra.job_logging.handlers.x={(): os.system}",
    ],
)
def test_code_cannot_be_named_on_the_command_line(cli: Any, argument: str) -> None:
    code, out = cli(argument)
    assert code == 2
    assert argument.lstrip("+").partition("=")[0] in out
    assert list(Path.cwd().iterdir()) == []


def test_a_target_in_a_config_file_is_an_unknown_key(cli: Any, tmp_path: Path) -> None:
    folder, mark = tmp_path / "conf", tmp_path / "ran"
    (folder / "experiment").mkdir(parents=True)
    text = f"# @package _global_\nmodel:\n  _target_: pathlib.Path.touch\n  self: {mark}\n"
    (folder / "experiment" / "evil.yaml").write_text(text)
    code, out = cli("--config-dir", str(folder), "+experiment=evil")
    assert (code, mark.exists()) == (2, False), out
    assert "names code to run: _target_" in out


@pytest.mark.parametrize(
    "hydra",
    [
        "callbacks: {x: {_target_: pathlib.Path.touch, self: MARK}}",
        "launcher: {_target_: pathlib.Path.touch}",
        "job_logging: {handlers: {x: {(): pathlib.Path.touch, self: MARK}}}",
        "job_logging: {handlers: {x: {class: logging.os.system, command: touch MARK}}}",
    ],
)
def test_a_config_file_names_no_code_under_hydra(cli: Any, tmp_path: Path, hydra: str) -> None:
    folder, mark = tmp_path / "conf", tmp_path / "ran"
    (folder / "experiment").mkdir(parents=True)
    text = f"# @package _global_\nhydra:\n  {hydra.replace('MARK', str(mark))}\n"
    (folder / "experiment" / "evil.yaml").write_text(text)
    code, out = cli("--config-dir", str(folder), "+experiment=evil", "sweep.dry_run=true")
    assert (code, mark.exists()) == (2, False), out
    assert "line 3 names code to run" in out and "evil.yaml" in out


@pytest.mark.parametrize("flag", ["--experimental-rerun=x.pickle", "--exp=x", "--e=x"])
def test_hydras_rerun_of_a_pickle_is_refused(cli: Any, flag: str) -> None:
    code, out = cli(flag)
    assert (code, "+experiment=NAME" in out) == (2, True), out


def hostile_run(tmp_path: Path, how: str) -> tuple[Path, Path]:
    """Return a run's folder whose record names a Python file, and the file that it makes if it is run."""
    from fixtures.runs import make_base, make_data, make_run

    run = make_run(make_base(tmp_path / "base", "bert"), make_data(tmp_path / "data.csv"))
    evil, mark = tmp_path / "evil.py", tmp_path / "ran"
    evil.write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\ndef f(rows):\n    return 0.0\n")
    config = run.to_dict()
    if how == "metric":
        config["task"]["extra_metrics"] = [f"{evil}:f"]
    elif how == "probe":
        config["task"]["probe"] = {"kind": "local", "file": str(evil)}
    else:
        config[how] = {"kind": "local", "name": "x", "file": str(evil)}
    store = build(tmp_path / "sweep", [Planted("lora", (1e-3,), 1e-3, 0.7, r=4)], examples=20)
    for record in store.records():
        record.config = config
        record.provenance["head"] = {"auto_class": "AutoModelForSequenceClassification", "label_names": ["a", "b"]}
        store.write(record)
        (store.run_dir(record.run_id) / "adapter").mkdir(exist_ok=True)
    return store.run_dir(store.run_ids()[0]), mark


@pytest.mark.parametrize("how", ["task", "model", "metric", "probe"])
def test_a_strangers_record_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    from lorabench import export, predict
    from lorabench.analyze.__main__ import main as analyze
    from lorabench.costs.__main__ import main as costs

    run, mark = hostile_run(tmp_path, how)
    commands: dict[Any, list[str]] = {
        export.main: [str(run), "--out", str(tmp_path / "out")],
        predict.main: [str(run), "a text"],
        analyze: [str(run.parent.parent)],
        costs: [str(run.parent.parent)],
    }
    for main, arguments in commands.items():
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / 'evil.py'}: a record names this Python file" in said and "--trust" in said, said
        assert not mark.exists()
    assert export.main([str(run), "--out", str(tmp_path / "out"), "--trust"]) == 2  # there are no weights here
    assert mark.exists()
    assert "--trust" not in capsys.readouterr().err
    record = run / "run.json"
    record.write_text(record.read_text().replace('"seed": ', '"seed": 1', 1))
    assert export.main([str(run), "--out", str(tmp_path / "out"), "--trust"]) == 2
    assert f"{record}: edited since it was written" in capsys.readouterr().err


def test_a_yaml_bomb_is_refused(cli: Any, tmp_path: Path) -> None:
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    lines = ["# @package _global_", "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (folder / "experiment" / "bomb.yaml").write_text("\n".join(lines))
    (folder / "experiment" / "loop.yaml").write_text("# @package _global_\na: &a [*a]\n")
    for name in ("bomb", "loop"):
        code, out = cli("--config-dir", str(folder), f"+experiment={name}")
        assert (code, "values" in out) == (2, True), out


# -- texts that others read ------------------------------------------------------------------------------------------


def test_texts_are_escaped_in_html_and_cannot_be_formulas_in_csv(tmp_path: Path) -> None:
    from lorabench.report import render

    cells = [
        Planted(
            "lora",
            (1e-3, 2e-3),
            1e-3,
            0.7,
            r=r,
            targets=f"=cmd|' /C calc'!A{r}{HOSTILE}",
            label={"extra": {"note": HOSTILE}},
        )
        for r in (4, 16)
    ]
    store = build(tmp_path / "sweep", cells, name=HOSTILE, study={"question": HOSTILE}, examples=40)
    record = store.records()[0]
    record.status, record.error = "failed", f"@SUM(1)\n{HOSTILE}"
    store.write(record)
    render(store.root, tmp_path / "report", title=HOSTILE)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    rows = list(csv.reader((tmp_path / "report" / "runs.csv").read_text(encoding="utf-8").splitlines()))
    texts = [
        cell
        for row in rows
        for cell in row
        if not cell.replace("e-", "").replace("-", "", 1).replace(".", "").isdecimal()
    ]
    assert not [t for t in texts if t.startswith(("=", "+", "@", "\t", "\r", "|", "%"))]
    assert any(t.startswith("'=cmd") for t in texts)


# -- secrets ---------------------------------------------------------------------------------------------------------


def test_no_secret_of_the_environment_is_written(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep runs with keys in its environment; then its output and every file it left are searched for them."""
    from fixtures.runs import make_base, make_data

    base, data = make_base(tmp_path / "base", "bert"), make_data(tmp_path / "data.csv")
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, f"s3cr3t-{name.lower()}-0123456789abcdef0123456789abcdef")
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    setup = "hydra.launcher.setup=['export HF_TOKEN=s3cr3t-0123','export A=1 MY_API_KEY=\"s3cr3t\"']"
    code, printed = cli(
        "-m",
        "method.r=1,2",
        setup,
        "model=hf",
        f"model.source={base}",
        "task=text_file",
        f"task.file={data}",
        "task.max_length=32",
        "sweep.name=s",
        "trainer.max_steps=2",
        "trainer.batch_size=4",
        "trainer.precision=32",
        "sweep.measure_solo=false",
    )
    assert code == 0, printed
    written = [p for p in out.rglob("*") if p.is_file()]
    assert any(p.name == "run.json" for p in written)
    assert any(p.name == "report.html" for p in written)
    for content in [printed.encode(), *(p.read_bytes() for p in written)]:
        assert b"s3cr3t" not in content
    command = json.loads((out / "sweeps/s/sweep.json").read_text())["command"]
    assert "hydra.launcher.setup=***" in command, command
