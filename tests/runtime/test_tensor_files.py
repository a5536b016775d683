"""Safetensors files: the rights of their folder, and the system's own error where they cannot be written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorabench.runtime.files import write_tensors
from lorabench.store import checkpoints


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder made under a umask, which stays in force."""
    before = os.umask(request.param)
    (tmp_path / "made").mkdir()
    yield tmp_path / "made"
    os.umask(before)


def test_a_file_has_the_rights_of_its_folder(folder: Path) -> None:
    view = torch.arange(6.0).view(2, 3).T  # not contiguous
    write_tensors(folder / "x.safetensors", {"x": view}, {"format": "pt"})
    assert torch.equal(load_file(folder / "x.safetensors")["x"], view)
    expected = folder.stat().st_mode & 0o666
    assert (folder / "x.safetensors").stat().st_mode & 0o777 == expected
    path = checkpoints.write(folder / "checkpoints" / "p0", 3, {"x": view}, {"schema": 1})
    assert path.stat().st_mode & 0o777 == expected


def test_a_file_that_finds_no_room_is_named_by_the_systems_own_number(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond 1,000 bytes."""
    code = """
import resource, sys
from pathlib import Path
import torch
from lorabench.runtime.files import write_tensors

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    write_tensors(Path(sys.argv[1]), {"x": torch.zeros(2**16)}, {})
except OSError as e:
    print(e.errno, e.filename)
"""
    path = tmp_path / "x.safetensors"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{errno.EFBIG} {path}\n"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "nowhere" / "x.safetensors", {"x": torch.zeros(1)}, {})
