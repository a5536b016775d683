"""Checkpoints of packs in training, as files: whole or not at all, the last two of a pack. No torch at module level.

<sweep dir>/checkpoints/<pack id>/<step>-<sha256>.safetensors

A file is plain safetensors with the rest as JSON under `state` in its metadata. Its name holds the SHA-256 of all its
bytes, so that a torn or changed one shows. Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.errors import ExistingWork
from lorabench.runtime.files import sync

if TYPE_CHECKING:
    from torch import Tensor

KEPT_CHECKPOINTS = 2
FILE_NAME = re.compile(r"(\d{8,})-([0-9a-f]{64})\.safetensors")
PACK_ID = re.compile(r"\w[\w.-]*", re.ASCII)
DTYPES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16",
    "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

Content = tuple[dict[str, "Tensor"], dict[str, Any]]


class Unreadable(ValueError):
    """A checkpoint that cannot be gone on from; its text says why."""


def pack_folder(root: Path, pack_id: str) -> Path:
    """Where a pack's checkpoints are. Raises `ExistingWork` for an id that is no plain name: a manifest of no sweep."""
    if not PACK_ID.fullmatch(pack_id):
        raise ExistingWork("sweep.dir", str(root), f"a manifest whose packs have plain names, not {pack_id!r}")
    return root / "checkpoints" / pack_id


def step_of(path: Path) -> int:
    """The step a checkpoint was written at, from its name."""
    found = FILE_NAME.fullmatch(path.name)
    assert found
    return int(found[1])


def list_checkpoints(where: Path) -> list[Path]:
    """A pack's checkpoints by their names, the newest first."""
    try:
        return sorted((p for p in where.iterdir() if FILE_NAME.fullmatch(p.name)), key=step_of, reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []


def last_step(root: Path, pack_id: str) -> int | None:
    """The step a pack would go on from, by the name of its newest checkpoint; None: it has none."""
    return next(map(step_of, list_checkpoints(pack_folder(root, pack_id))), None)


def write(where: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint to a temporary name, fsync, rename; older ones but one go. Raises OSError, and then nothing is left.

    Tensors go to the file one by one: no second copy of them is made on a CPU.
    """
    where.mkdir(parents=True, exist_ok=True)
    tmp = where / f".{step:08d}.{secrets.token_hex(4)}.tmp"
    sha = hashlib.sha256()
    try:
        with open(tmp, "wb") as f:
            for chunk in _chunks(tensors, state):
                f.write(chunk)
                sha.update(chunk)
            f.flush()
            os.fsync(f.fileno())
        path = where / f"{step:08d}-{sha.hexdigest()}.safetensors"
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    for own in (where, where.parent, where.parent.parent):
        sync(own)
    rest = [p for p in list_checkpoints(where) if p != path]
    for old in [p for p in rest if step_of(p) == step] + [p for p in rest if step_of(p) != step][
        KEPT_CHECKPOINTS - 1 :
    ]:
        old.unlink(missing_ok=True)
    return path


def _chunks(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length of the header, header, tensors."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"state": json.dumps(state, default=lambda number: number.item())}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def read(path: Path) -> Content:
    """(tensors on the CPU, state) of one file. Raises `Unreadable`."""
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
    """The newest checkpoint that is whole and passes `check` (which raises `Unreadable`); None: there is none.

    One that is refused is removed (unless the disk failed), and stderr says why and what is taken instead.
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
            print(f"checkpoint of step {step_of(path)} of pack {where.name}: {e}; the pack {then}", file=sys.stderr)
            if not isinstance(e.__cause__, OSError):
                path.unlink(missing_ok=True)
        else:
            return content
    return None


def remove(root: Path, pack_id: str) -> None:
    """A pack's checkpoints and, if it was the last pack that had any, their folder. Files of others stay."""
    where = pack_folder(root, pack_id)
    for path in [*list_checkpoints(where), *(where.glob(".*.tmp") if where.is_dir() else ())]:
        path.unlink(missing_ok=True)
    for own in (where, where.parent):
        with suppress(OSError):  # not there, or not empty
            own.rmdir()


def drift(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{name: [then, now]} of what differs."""
    names = sorted(then.keys() | now.keys())
    return {name: [then.get(name), now.get(name)] for name in names if then.get(name) != now.get(name)}
