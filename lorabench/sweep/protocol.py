"""What a process that trains a pack says to the one that started it: events as they come, then how it ended."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

from lorabench.config.errors import ExistingWork, Unwritable
from lorabench.config.runs import Pack, RunConfig
from lorabench.runtime.leases import LeaseLost
from lorabench.store.records import Record, Store
from lorabench.training.distributed import ProcessLost
from lorabench.training.session import failed_record
from lorabench.training.train import Listener, OutOfMemory, SlicesMix

EVENTS = ("step", "start", "rows", "finish")
Message = tuple[str, Any]  # an event's name or how it ended, and what belongs to it, which pickles


def die_with_parent() -> None:
    """Let this process ignore Ctrl-C, which its parent hears, and end when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class QueueListener(Listener):
    """A listener that puts every event into a queue, as a message that `dispatch` reads."""

    def __init__(self, queue: Any) -> None:
        super().__init__(
            step=lambda step, total: queue.put(("step", (step, total))),
            start=lambda run: queue.put(("start", (run.to_dict(),))),
            rows=lambda run_id, rows: queue.put(("rows", (run_id, rows))),
            finish=lambda record: queue.put(("finish", (record,))),
        )


def dispatch(calls: Mapping[str, Callable[..., None]], message: Message) -> None:
    """Make the call of a listener that a message stands for."""
    name, args = message
    calls[name](*((RunConfig.from_dict(args[0]),) if name == "start" else args))


def run_and_report(train: Callable[[], list[Record]]) -> Message:
    """Call `train` and return how it ended as a message; what the caller must know of an error is data in it."""
    try:
        return "records", [asdict(r) for r in train()]
    except ExistingWork as e:
        return "drift", (e.key, e.value, e.allowed)
    except SlicesMix as e:
        return "mix", (e.layer, e.reason)
    except OutOfMemory as e:
        return "memory", (str(e),)
    except LeaseLost as e:
        return "lost", (str(e),)
    except ProcessLost as e:
        return "gone", (str(e),)
    except Unwritable as e:
        return "unwritable", (e.errno, e.strerror, e.filename)
    except SystemExit as e:
        return "stopped", (e.code,)


ERROR_KINDS: dict[str, type[BaseException]] = {
    "drift": ExistingWork,
    "mix": SlicesMix,
    "memory": OutOfMemory,
    "lost": LeaseLost,
    "gone": ProcessLost,
    "unwritable": Unwritable,
    "stopped": SystemExit,
}


def unpack_result(message: Message) -> list[Record]:
    """Return the records of a message of `run_and_report`, or raise the error that it stands for."""
    kind, value = message
    if kind in ERROR_KINDS:
        raise ERROR_KINDS[kind](*value)
    return [Record(**r) for r in value]


def record_death(pack: Pack, store: Store, listener: Listener, keep: Collection[str], why: str) -> list[Record]:
    """Write `failed` records for the runs of a pack whose process is gone, but for those in `keep`. Return them."""
    error = f"{why}; sweep.retry_failed=true goes on from its last checkpoint"
    return write_records([failed_record(run, error, "") for run in pack.runs], store, listener, keep)


def write_records(records: list[Record], store: Store, listener: Listener, keep: Collection[str]) -> list[Record]:
    """Write records that a process could not write itself, and tell the listener. Return them."""
    for record in records:
        if record.run_id not in keep:
            store.write(record)
        listener.finish(record)
    return records
