"""Checkpoints of packs in training, as files: whole or not at all, the last two of a pack. No torch at module level.

    <sweep dir>/checkpoints/<pack id>/<step>-<sha256>.safetensors

A file is plain safetensors, with the rest as JSON under `state` in its metadata. Its name holds the SHA-256 of all its
bytes, so that a torn or changed file shows. Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.errors import ExistingWork
from lorabench.runtime.files import sync, write_tensors
from lorabench.runtime.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

KEPT_CHECKPOINTS = 2
FILE_NAME = re.compile(r"(\d{8,})-([0-9a-f]{64})\.safetensors")
PACK_ID = re.compile(r"\w[\w.-]*", re.ASCII)
Content = tuple[dict[str, "Tensor"], dict[str, Any]]


class Unreadable(ValueError):
    """A checkpoint that training cannot go on from; the text says why."""


def pack_folder(root: Path, pack_id: str) -> Path:
    """The folder of a pack's checkpoints. Raises `ExistingWork` for an id that is no plain name: the manifest is no
    sweep's."""
    if not PACK_ID.fullmatch(pack_id):
        raise ExistingWork("sweep.dir", str(root), f"a manifest whose packs have plain names, not {pack_id!r}")
    return root / "checkpoints" / pack_id


def step_of(path: Path) -> int:
    """The step a checkpoint was written at, from its name."""
    found = FILE_NAME.fullmatch(path.name)
    assert found
    return int(found[1])


def list_checkpoints(where: Path) -> list[Path]:
    """The checkpoints in a pack's folder by their names, the newest first; [] where there is no folder."""
    try:
        return sorted((p for p in where.iterdir() if FILE_NAME.fullmatch(p.name)), key=step_of, reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []


def last_step(root: Path, pack_id: str) -> int | None:
    """The step of a pack's newest checkpoint, by its name; None where there is none."""
    return next(map(step_of, list_checkpoints(pack_folder(root, pack_id))), None)


def write(where: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint under a temporary name, sync it, and rename it. Returns its path.

    where: the pack's folder, of which the two newest checkpoints stay. state: what JSON can hold. Tensors on a CPU are
    not copied. Raises OSError, and then nothing of it is left.
    """
    where.mkdir(parents=True, exist_ok=True)
    temporary = where / f".{step:08d}.{secrets.token_hex(4)}.tmp"
    try:
        metadata = {"state": json.dumps(state, default=lambda number: number.item())}
        write_tensors(temporary, tensors, metadata)
        sync(temporary)
        with open(temporary, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        path = where / f"{step:08d}-{digest}.safetensors"
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for folder in (where, where.parent, where.parent.parent):
        sync(folder)
    _remove_old(where, path, step)
    return path


def _remove_old(where: Path, path: Path, step: int) -> None:
    """Remove all checkpoints but `path` and the newest of an earlier step."""
    others = [p for p in list_checkpoints(where) if p != path]
    same_step = [p for p in others if step_of(p) == step]
    earlier = [p for p in others if step_of(p) != step]
    for old in same_step + earlier[KEPT_CHECKPOINTS - 1 :]:
        old.unlink(missing_ok=True)


def read(path: Path) -> Content:
    """Return the tensors of a checkpoint, on the CPU, and its state. Raises `Unreadable`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    found = FILE_NAME.fullmatch(path.name)
    assert found
    try:
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != found[2]:
            raise Unreadable("torn or corrupt: its bytes are not those it was written with")
        tensors = load(raw)
        state = json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["state"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as e:
        raise e if isinstance(e, Unreadable) else Unreadable(f"not to be read ({type(e).__name__}: {e})") from e
    if not isinstance(state, dict) or state.get("schema") != 1:
        raise Unreadable("no checkpoint of schema 1")
    return tensors, state


def read_newest(where: Path, check: Callable[[Content], None]) -> Content | None:
    """Return the newest checkpoint that is whole and passes `check`; None where there is none.

    check: raises `Unreadable` for a checkpoint to refuse. A refused one is removed, unless the disk failed, and stderr
    says why and what is taken instead.
    """
    for stale in where.glob(".*.tmp") if where.is_dir() else ():  # of a process that was killed while it wrote
        stale.unlink(missing_ok=True)
    paths = list_checkpoints(where)
    for i, path in enumerate(paths):
        try:
            content = read(path)
            check(content)
        except Unreadable as e:
            then = f"goes on from the one of step {step_of(paths[i + 1])}" if i + 1 < len(paths) else "starts anew"
            say(f"checkpoint of step {step_of(path)} of pack {where.name}: {e}; the pack {then}", error=True)
            if not isinstance(e.__cause__, OSError):
                path.unlink(missing_ok=True)
        else:
            return content
    return None


def remove(root: Path, pack_id: str) -> None:
    """Remove a pack's checkpoints, and their common folder once no other pack has any. Foreign files stay."""
    where = pack_folder(root, pack_id)
    for path in [*list_checkpoints(where), *(where.glob(".*.tmp") if where.is_dir() else ())]:
        path.unlink(missing_ok=True)
    for own in (where, where.parent):
        with suppress(OSError):  # not there, or not empty
            own.rmdir()


def drift(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return {name: [then, now]} of what differs between two descriptions of code, data and machine."""
    names = sorted(then.keys() | now.keys())
    return {name: [then.get(name), now.get(name)] for name in names if then.get(name) != now.get(name)}
