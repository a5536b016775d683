"""Launch files compose: W&B sweep definitions as W&B's own agent expands them, and the launcher's profiles."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from hydra import compose, initialize_config_dir

from lorabench.launch.command_line import config_dir
from lorabench.launch.job import make_job


def composed(*overrides, hydra=False):
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=hydra)


@pytest.mark.parametrize("name", ["slurm.sbatch", "ray.sh"])
def test_a_launch_file_passes_its_words_on(repo, tmp_path, name):
    """With a stand-in for Python that prints them; the real thing is in tests/slurm and test_ray."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        '#!/bin/sh\n[ "$1" = -m ] && [ "$2" = lorabench ] || exit 1\nenv | grep ^SLURM_\nprintf "%s\\n" "$@"\n'
    )
    stand_in.chmod(0o755)
    shell = shutil.which("bash" if name == "slurm.sbatch" else "sh")
    env = {
        "PATH": os.environ["PATH"],
        "PYTHON": str(stand_in),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_MEM_PER_NODE": "8192",
    }
    end = {"slurm.sbatch": ["hydra/launcher=slurm"], "ray.sh": ["hydra/launcher=ray", "hydra.launcher.address=null"]}[
        name
    ]
    for given, wanted in (([], ["+experiment=rank_sweep"]), (["-m", "method.r=1,4", "study.question=a b"],) * 2):
        made = subprocess.run(
            [shell, repo / "sweeps" / name, *given], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        (*said,) = made.stdout.splitlines()
        assert [w for w in said if not w.startswith("SLURM_")] == ["-m", "lorabench", *wanted, *end]
        if name == "slurm.sbatch":
            assert {w for w in said if w.startswith("SLURM_")} == {"SLURM_JOB_ID=7"}


@pytest.mark.parametrize("name", ["rank", "alpha", "rate"])
def test_a_wandb_sweep_composes(repo, name):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    text = (repo / "sweeps" / f"wandb_{name}.yaml").read_text(encoding="utf-8")
    sweep = yaml.safe_load(text)
    assert sweep["method"] in ("grid", "bayes") and sweep["metric"] == {"name": "val/accuracy", "goal": "maximize"}
    command = create_sweep_command(sweep["command"])
    assert command[:4] == ["${env}", "${interpreter}", "-m", "${program}"] and command[-1] == "${args_no_hyphens}"
    assert sweep["program"] == "lorabench"
    for first in (True, False):
        picked = {key: {"value": _value(p, first)} for key, p in sweep["parameters"].items()}
        given = create_sweep_command_args({"args": picked})["args_no_hyphens"]
        overrides = [*command[command.index("${program}") + 1 : -1], *given]
        made = make_job(composed(*overrides), name="x", experiment=None)
        assert made.settings.sweep.name == f"wandb_{name}" and made.settings.tracker.name == "wandb"
        assert made.run.optimizer.lr == picked["optimizer.lr"]["value"]
        assert made.run.method.r == picked["method.r"]["value"]


def _value(parameter, first):
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return parameter["values"][0 if first else -1]
    return parameter["min" if first else "max"]


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_a_profile_is_one_override(repo, name):
    launcher = composed(f"hydra/launcher={name}", "hydra.launcher.timeout_min=9", hydra=True).hydra.launcher
    assert launcher.executor == name and launcher.timeout_min == 9
    assert launcher._target_ == "hydra_plugins.lorabench.launcher.PackedLauncher"
    usage = (repo / "conf/hydra/launcher" / f"{name}.yaml").read_text(encoding="utf-8").split("\n")[0]
    words = shlex.split(usage.split(": ", 1)[1])
    overrides = [w for w in words if re.match(r"\+?[\w./]+=", w)]
    assert composed(*overrides, hydra=True).hydra.launcher.executor == name


def test_without_optuna_its_extra_is_named(cli, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "optuna" else real(name, *a))
    code, out = cli("-m", "hydra/sweeper=optuna", "method.r=1,4")
    assert code == 2 and "pip install 'lorabench[optuna]'" in out, out
