"""What can go wrong, brought about inside a launcher before it starts: each function here is one trouble."""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any


def count(log: str) -> None:
    """Every run that starts to train leaves a line."""
    from lorabench.sweep import execute as sweep

    train = sweep.train

    def counted(pack: Any, store: Any, listener: Any, *, keep: Collection[str], **rest: Any) -> Any:
        with open(log, "a") as f:
            f.write("".join(f"{run_id}\n" for run_id in pack.run_ids if run_id not in keep))
        return train(pack, store, listener, keep=keep, **rest)

    sweep.train = counted


def full(name: str) -> None:
    """From the moment a path with this in its name is opened to be written or made, no file can grow beyond 16 bytes."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        made = event == "os.mkdir" or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if made and name in str(args[0]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))

    sys.addaudithook(hook)


def read_only(path: str) -> None:
    """The folder, mounted over itself so that it may only be read, for this process alone. Raises `OSError` without the right."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, bind, remount, readonly, private = 0x20000, 0x1000, 0x20, 0x1, 0x40000 | 0x4000

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(new_namespace))
    check(libc.mount(b"none", b"/", None, private, None))
    check(libc.mount(path.encode(), path.encode(), None, bind, None))
    check(libc.mount(path.encode(), path.encode(), None, bind | remount | readonly, None))


def narrow(most: int) -> None:
    """A pack of more runs than `most` does not fit into memory."""
    import torch

    from lorabench.training.module import PackModule

    step = PackModule.training_step

    def training_step(module: Any, batch: Any, index: int) -> Any:
        if len(module.runs) > most and module.steps_done == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(module, batch, index)

    PackModule.training_step = training_step


def burning(r: int) -> None:
    """Every run of rank `r` fails."""
    from lorabench.tasks import text_classification

    step = text_classification.Config.step

    def fails(self: Any, model: Any, batch: Any) -> Any:
        if any(p.shape[-1] == r for n, p in model.named_parameters() if n.endswith("lora_B")):
            raise RuntimeError("the disk is on fire")
        return step(self, model, batch)

    text_classification.Config.step = fails


def lingers(where: str) -> None:
    """The n-th call of a function, `module:function:n`, takes minutes; a file `lingers` says that it is there."""
    module, name, count = where.split(":")
    home, calls = importlib.import_module(module), [0]
    inner = getattr(home, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == int(count):
            Path("lingers").touch()
            time.sleep(300)
        return inner(*args, **kwargs)

    setattr(home, name, slow)


def clock(seconds: float) -> None:
    """The clock is set back by so much."""
    now = time.time
    time.time = lambda: now() - seconds


def out_of_sight(_: Any) -> None:
    """As if on a machine of its own: no other launcher can see whether this process lives."""
    from lorabench.runtime import leases

    leases.place = lambda: "another boot"


def impatient(seconds: float) -> None:
    """A holder out of sight is taken for dead after so many seconds of silence."""
    from lorabench.runtime import leases

    leases.SILENT_SECONDS = seconds


def small_report(_: Any) -> None:
    """A report of one small page: what is tested is how it gets to its place."""
    from lorabench.report import page

    page.files = lambda findings, title: {"report.html": "<p>" + "words " * 100, "tables/a.tex": "a"}


def bring(troubles: dict[str, Any]) -> None:
    for name, value in troubles.items():
        globals()[name](value)


def cannot(path: Path) -> str | None:
    """Why `read_only` cannot be brought about here."""
    if not sys.platform.startswith("linux"):
        return "bind mounts are Linux's"
    child = os.fork()
    if child == 0:
        try:
            read_only(str(path))
        except OSError as e:
            os._exit(e.errno or 255)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"a read-only bind mount is not allowed here ({os.strerror(code)})" if code else None
