"""A sweep through Ray itself: the records of the inline one, also when the launcher was killed in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixtures.runs import make_base, make_data
from lorabench.store.records import Store

pytest.importorskip("ray", reason="Ray is not installed: pip install 'lorabench[ray]'")
REPO = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_ray_leaves_the_records_of_the_inline_sweep(tmp_path: Path) -> None:
    base, data = make_base(tmp_path / "bert", "bert"), make_data(tmp_path / "data.csv")
    command = [
        sys.executable, "-m", "lorabench", "-m", "method.r=1,4", "optimizer.lr=1e-3,2e-2", "sweep.max_pack=2", "model=hf",
        f"model.source={base}", "model.name=tiny", "task=text_file", f"task.file={data}", "task.max_length=32",
        "trainer.batch_size=4", "trainer.precision=64", "trainer.accelerator=cpu", "trainer.max_steps=60",
        "trainer.checkpoint_interval=10", "report.enabled=false", "sweep.measure_solo=false",
    ]  # fmt: skip
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ray = ["hydra.launcher.executor=ray", "hydra.launcher.poll_seconds=0.5", "hydra.launcher.cpus_per_task=1"]

    def start(name: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, f"sweep.name={name}", *more], cwd=tmp_path, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ended(made: subprocess.Popen[str]) -> None:
        out, _ = made.communicate(timeout=600)
        assert made.returncode == 0, out

    def metrics(name: str) -> dict[str, object]:
        return {r.run_id: (r.status, r.metrics) for r in Store(tmp_path / "sweeps" / name).records()}

    ended(start("inline"))
    ended(start("whole", *ray))
    assert metrics("whole") == metrics("inline") and len(metrics("inline")) == 4

    killed = start("killed", *ray)
    until = time.monotonic() + 300
    while not list((tmp_path / "sweeps/killed/checkpoints").glob("*/*")):
        assert time.monotonic() < until and killed.poll() is None, "no checkpoint to be killed after"
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(metrics("killed")) < 4
    ended(start("killed", *ray))
    assert metrics("killed") == metrics("inline")

    command[:3] = ["sh", str(REPO / "sweeps" / "ray.sh")]
    env["PYTHON"] = sys.executable
    ended(start("file", *ray[1:]))
    assert metrics("file") == metrics("inline")
    resumed = [r.provenance.get("resumed") for r in Store(tmp_path / "sweeps/killed").records()]
    assert any(resumed), "nothing went on from a checkpoint"
