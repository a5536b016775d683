"""One undisturbed sweep, launchers to disturb, and the count of what each fault has cost."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launches import CONTEXT, Launcher

from fixtures.runs import make_base, make_data
from lorabench.store.records import Store

SWEEP = [
    "-m", "method.r=1,4", "optimizer.lr=1e-3,2e-2", "sweep.confirm_seeds=[7]", "sweep.name=s", "sweep.max_pack=1",
    "sweep.measure_solo=false", "report.enabled=false",
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("tiny")
    base, data = make_base(root / "bert", "bert"), make_data(root / "data.csv")
    return [
        "model=hf", f"model.source={base}", "model.name=tiny", "task=text_file", f"task.file={data}", "task.max_length=32",
        "trainer.max_steps=12", "trainer.eval_interval=4", "trainer.log_interval=1", "trainer.batch_size=4",
        "trainer.precision=64", "trainer.accelerator=cpu",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(tiny: list[str], tmp_path_factory: pytest.TempPathFactory, _cache: None) -> Path:
    """The store of `SWEEP`, six runs in six packs, as the server of all launchers made it."""
    folder, here = tmp_path_factory.mktemp("undisturbed"), Path(__file__).resolve().parent
    with pytest.MonkeyPatch.context() as patch:
        paths = (here, here.parent, here.parent.parent, *filter(None, [os.environ.get("PYTHONPATH")]))
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
        patch.setenv("LORABENCH_FAULTS_WARM", json.dumps({"cwd": str(folder), "argv": [*SWEEP, *tiny]}))
        CONTEXT.set_forkserver_preload(["warm"])
        forkserver.ensure_running()
        probe = CONTEXT.Process(target=os.getpid)  # the server answers once it has imported all
        probe.start()
        probe.join()
    assert (folder / "code").read_text() == "0", (folder / "log").read_text()
    return folder / "sweeps/s"


@pytest.fixture
def launcher(undisturbed: Path, tiny: list[str], tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    """Start `SWEEP`, or what else is asked for, in a folder; what still runs at the end is killed."""
    started: list[Launcher] = []

    def start(*own: str, folder: Path = tmp_path, sweep: list[str] = SWEEP, **troubles: Any) -> Launcher:
        started.append(Launcher(folder, [*sweep, *tiny, *own], **troubles))
        return started[-1]

    yield start
    for one in started:
        one.kill()


class Fault:
    """One fault: how often it was tried, and which runs it has cost."""

    def __init__(self, name: str) -> None:
        self.name, self.tried, self.lost, self.doubled = name, 0, list[str](), list[str]()

    def compare(self, want: Path, got: Path, starts: Path | None = None) -> None:
        """Every run of `want` is in `got`, once, with its metrics, history and test results, bit for bit.

        starts: a log of `troubles.count`, where no run may have started more often than once.
        """
        a, b = Store(want), Store(got)
        listed = a.run_ids()
        self.lost += [i for i in listed if not _same(a, b, i)]
        self.lost += sorted(set(b.manifest()["runs"]) - set(listed))
        planned = Counter(i for p in b.manifest()["packs"] if not p.get("replaced") for i in p["runs"])
        begun = Counter(starts.read_text().split()) if starts else Counter[str]()
        for i in b.run_ids():
            rows = Counter(_row(r) for r in b.history(i))
            if planned[i] > 1 or begun[i] > 1 or max(rows.values(), default=1) > 1:
                self.doubled.append(i)
        assert not list(got.glob("**/.*.tmp")), "torn files stay behind"
        assert not [p for p in (got / "locks").iterdir() if p.is_dir() and list(p.iterdir())], "leases stay behind"


def _row(row: dict[str, Any]) -> tuple[int, bool]:
    return row["step"], "train/loss" in row


def _same(a: Store, b: Store, run_id: str) -> bool:
    x, y = a.read(run_id), b.read(run_id)
    if x is None or y is None or (x.status, x.metrics, x.role) != (y.status, y.metrics, y.role):
        return False
    one, other = a.arrays(run_id, "test"), b.arrays(run_id, "test")
    if (one is None) != (other is None) or (one or {}).keys() != (other or {}).keys():
        return False
    if one is not None and other is not None and not all(np.array_equal(one[k], other[k]) for k in one):
        return False
    return a.history(run_id) == b.history(run_id) and _weights(a, run_id) == _weights(b, run_id)


def _weights(store: Store, run_id: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (store.run_dir(run_id) / "adapter").glob("*.safetensors")}


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    """What this test tries, by the first line of its docstring; its row stands in the table at the end."""
    return Fault((request.function.__doc__ or request.node.name).split("\n")[0].rstrip(".") + _case(request))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """The row is written whether or not the test passes; a lost or doubled run fails it."""
    found = pyfuncitem.funcargs.get("fault")
    if not isinstance(found, Fault):
        return (yield)
    try:
        result = yield
    finally:
        row = [found.name, found.tried, len(set(found.lost)), len(set(found.doubled))]
        pyfuncitem.user_properties.append(("fault", row))
    assert found.tried and not found.lost and not found.doubled, f"lost {found.lost}, doubled {found.doubled}"
    return result


def _case(request: pytest.FixtureRequest) -> str:
    call = getattr(request.node, "callspec", None)
    return f" [{call.id}]" if call else ""
