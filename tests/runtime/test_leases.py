"""Leases: one holder at a time, whatever becomes of it; the dead are put out, the living never, whatever clocks say."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import platform
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorabench.config.errors import ExistingWork
from lorabench.runtime import leases as module
from lorabench.runtime.leases import Holder, LeaseLost, Leases
from lorabench.store.records import Record, Store

FORK = multiprocessing.get_context("fork")


def elsewhere(lease: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a lease look as if a machine out of sight held it."""
    holder = json.loads(lease.read_text())
    lease.write_text(json.dumps(holder | {"host": "n7", "place": "another boot"}))


def hold(folder: Path, name: str, ready: multiprocessing.synchronize.Event) -> None:
    lease = Leases(folder).take(name)
    assert lease is not None
    ready.set()
    time.sleep(600)


@pytest.fixture
def other(tmp_path: Path):
    """A process that holds the lease `p0`."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, "p0", ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()
    process.close()


def test_one_holds_and_the_next_gets_it_once_it_is_released(tmp_path: Path) -> None:
    first, second = Leases(tmp_path), Leases(tmp_path)
    lease = first.take("p0")
    assert lease is not None and second.take("p0") is None
    held = second.holder("p0")
    assert held is not None and held.pid == os.getpid() and str(held.pid) in str(held)
    assert second.take("p1") is not None, "another name is another lease"
    lease.release()
    assert second.holder("p0") is None
    with second.wait("p0"):
        assert first.take("p0") is None
    assert [p.name for p in tmp_path.iterdir()] == ["p1"]


def test_a_living_holder_is_never_put_out_and_a_dead_one_at_once(tmp_path: Path, other, monkeypatch) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.0)  # on this machine silence says nothing: it may be suspended
    here = Leases(tmp_path)
    assert here.take("p0") is None
    os.kill(other.pid, signal.SIGSTOP)
    assert here.take("p0") is None
    os.kill(other.pid, signal.SIGKILL)
    while not (lease := here.take("p0")):  # dead is also what nobody has buried yet
        time.sleep(0.01)
    assert other.is_alive() or other.exitcode == -signal.SIGKILL
    lease.release()


def test_a_pid_that_was_given_again_is_no_holder(tmp_path: Path) -> None:
    lease = Leases(tmp_path).take("p0")
    assert lease is not None
    holder = json.loads(lease.file.read_text())
    lease.file.write_text(json.dumps(holder | {"start": str(int(holder["start"]) - 1)}))
    assert Leases(tmp_path).take("p0") is not None


def test_a_holder_out_of_sight_is_dead_after_silence_by_the_watchers_clock(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 3600.0)
    lease = Leases(tmp_path).take("p0")
    assert lease is not None
    elsewhere(lease.file, monkeypatch)
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    watcher = Leases(tmp_path)
    for stamp in (0, 4e9, time.time() - 1e6, time.time() + 1e6):  # clocks set back, forward, apart: each is a beat
        os.utime(lease.file, (stamp, stamp))
        assert watcher.holder("p0") == Holder("n7", os.getpid(), "another boot", module._start(os.getpid()))
        now[0] += module.SILENT_SECONDS
        assert watcher.take("p0") is None, "silent for less than told, since it last changed"
    now[0] += 1
    assert watcher.take("p0") is not None
    assert not lease.file.exists()


def test_renewal_is_a_beat_that_watchers_see(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    lease = Leases(tmp_path).take("p0")
    assert lease is not None
    first = lease.file.stat().st_mtime_ns
    deadline = time.monotonic() + 60
    while lease.file.stat().st_mtime_ns == first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lease.release()


def test_who_was_taken_for_dead_cannot_write_and_does_not_touch_the_new_holder(tmp_path: Path, monkeypatch) -> None:
    store = Store(tmp_path)
    old = store.leases.take("p0")
    assert old is not None
    record = Record("0123456789ab", "tune", "completed", {})
    writer = store.under(old)
    writer.write(record)
    elsewhere(old.file, monkeypatch)
    monkeypatch.setattr(module, "SILENT_SECONDS", -1.0)
    new = Leases(store.leases.folder).take("p0")
    assert new is not None
    for write in (
        lambda: writer.write(record),
        lambda: writer.append_history(record.run_id, [{"step": 1}]),
        lambda: writer.reset_history(record.run_id),
        lambda: writer.write_arrays(record.run_id, "test", {}),
    ):
        with pytest.raises(LeaseLost, match="taken over"):
            write()
    old.release()
    assert new.file.exists()


def test_a_slow_watcher_cannot_put_out_the_next_holder(tmp_path: Path, monkeypatch) -> None:
    """It has found the first holder dead, and comes to act on it when a second already holds the lease."""
    dead = Leases(tmp_path).take("p0")
    assert dead is not None
    found = module._look(tmp_path / "p0")
    dead.release()
    living = Leases(tmp_path).take("p0")
    monkeypatch.setattr(module, "_look", lambda path: found)
    monkeypatch.setattr(Holder, "gone", True)
    slow = Leases(tmp_path)
    assert slow.take("p0") is None
    assert living is not None and living.file.exists()


def count(folder: Path, times: int) -> None:
    for _ in range(times):
        with Leases(folder / "locks").wait("n"):
            n = int((folder / "n").read_text())
            (folder / "n").write_text(str(n + 1))


def test_many_processes_that_wait_lose_no_turn(tmp_path: Path) -> None:
    (tmp_path / "n").write_text("0")
    processes = [FORK.Process(target=count, args=(tmp_path, 25)) for _ in range(6)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
        assert p.exitcode == 0
    assert (tmp_path / "n").read_text() == "150"
    assert not list((tmp_path / "locks").iterdir())


def test_what_a_process_left_that_died_while_it_asked_goes(tmp_path: Path) -> None:
    nest = tmp_path / f".p0.{'0' * 16}"
    nest.mkdir()
    (nest / ("0" * 16)).write_text(
        json.dumps({"host": platform.node(), "pid": 2**22 + 1, "place": module.place(), "start": "1"})
    )
    alive = tmp_path / f".p0.{'1' * 16}"
    alive.mkdir()
    (alive / ("1" * 16)).write_text(json.dumps({"host": "h", "pid": 1, "place": "out of sight", "start": "1"}))
    empty, torn = (tmp_path / f".p0.{digit * 16}" for digit in "23")
    empty.mkdir()
    torn.mkdir()
    (torn / ("3" * 16)).touch()
    lease = Leases(tmp_path).take("p0")
    assert lease is not None and alive.exists() and not any(path.exists() for path in (nest, empty, torn))
    empty.mkdir()
    Leases(tmp_path).tidy("p0")
    assert lease.file.exists() and alive.exists() and not empty.exists()


def test_who_is_cleaned_away_while_it_asks_begins_anew(tmp_path: Path, monkeypatch) -> None:
    here, fill, lost = Leases(tmp_path), Leases._fill, []

    def cleaned(self: Leases, nest: Path, token: str) -> None:
        fill(self, nest, token)
        if len(lost) < 2:
            lost.append(nest)
            module.shutil.rmtree(nest)

    monkeypatch.setattr(Leases, "_fill", cleaned)
    lease = here.take("p0")
    assert lease is not None and lease.file.exists() and len(lost) == 2


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_lock_files_are_never_world_writable(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        lease = Leases(tmp_path / "locks").take("p0")
    finally:
        os.umask(before)
    assert lease is not None
    assert lease.file.stat().st_mode & 0o777 == 0o644
    assert all(p.stat().st_mode & 0o002 == 0 for p in (tmp_path / "locks", lease.file.parent))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../../up"])
def test_a_name_is_a_plain_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExistingWork, match="a plain name"):
        Leases(tmp_path / "locks").take(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", ["folder", "lease", "file", "token"])
def test_links_and_files_in_the_place_of_a_lease_are_refused(tmp_path: Path, made: str) -> None:
    locks, victim = tmp_path / "locks", tmp_path / "victim"
    victim.mkdir()
    (victim / "mine").write_text("keep")
    if made == "folder":
        locks.symlink_to(victim)
    else:
        locks.mkdir()
        if made == "lease":
            (locks / "p0").symlink_to(victim)
        elif made == "file":
            (locks / "p0").write_text("")
        else:
            (locks / "p0").mkdir()
            (locks / "p0" / "0").symlink_to(victim / "mine")
    with pytest.raises(ExistingWork, match=str(locks)):
        Leases(locks).take("p0")
    assert [p.name for p in victim.iterdir()] == ["mine"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"host": 3, "pid": "../1"}', "[" * 4000])
def test_a_lease_that_cannot_be_read_is_held_until_it_has_been_silent(tmp_path: Path, monkeypatch, text: str) -> None:
    (tmp_path / "p0").mkdir()
    (tmp_path / "p0" / "0").write_text(text)
    watcher = Leases(tmp_path)
    assert watcher.take("p0") is None
    monkeypatch.setattr(module, "SILENT_SECONDS", -1.0)
    assert watcher.take("p0") is not None


def test_a_store_behind_a_link_is_refused_and_nothing_is_written_through_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    with pytest.raises(ExistingWork, match=r"sweep\.dir=.*link"):
        Store(link).check_foreign()
    store = Store(tmp_path / "s")
    (store.root / "runs").mkdir(parents=True)
    store.run_dir("0123456789ab").symlink_to(real)
    with pytest.raises(ExistingWork, match=r"sweep\.dir="):
        store.append_history("0123456789ab", [{"step": 1}])
    (store.root / "sweep.json").symlink_to(real / "x")
    with pytest.raises(ExistingWork, match=r"sweep\.dir=.*sweep\.json"):
        store.check_foreign()
    store.run_dir("ba9876543210").mkdir()
    (store.run_dir("ba9876543210") / "history.jsonl").symlink_to(real / "y")
    with pytest.raises(OSError, match="history.jsonl"):
        store.append_history("ba9876543210", [{"step": 1}])
    assert not list(real.iterdir())


@pytest.mark.parametrize("call", ["listdir", "open"])
def test_a_lease_that_went_stale_while_it_was_read_is_nobodys(tmp_path: Path, monkeypatch, call: str) -> None:
    """A network file system says ESTALE of a directory that another machine has replaced since it was opened."""
    here = Leases(tmp_path)
    assert here.take("p0") is not None
    real = getattr(os, call)

    def stale(*args, **options):
        if call == "listdir" or "dir_fd" in options:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, "os", SimpleNamespace(**{**vars(os), call: stale}))
        assert (
            here.look("p0") is None and here.take("p0") is None
        )  # whoever replaced it holds it: the rename shows that
    assert here.holder("p0") is not None


def test_a_file_system_that_has_no_word_for_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sshfs answers EPERM to a rename onto a directory that is held, and to any other failure."""
    rename = os.rename

    def refuses(source: Any, target: Any) -> None:
        if Path(target).is_dir() and list(Path(target).iterdir()):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuses)
    leases, other = Leases(tmp_path / "locks"), Leases(tmp_path / "locks")
    lease = leases.take("p0")
    assert lease is not None
    monkeypatch.setattr(other, "holder", lambda name: None)  # it looked a moment before
    assert other.take("p0") is None
    lease.release()
    assert other.take("p0") is not None

    def never(source: Any, target: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "rename", never)
    with pytest.raises(PermissionError):
        leases.take("p1")
    assert [p.name for p in (tmp_path / "locks").iterdir()] == ["p0"]


def test_a_hidden_process_and_a_cloned_machine_are_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Holder.here()
    clone = Holder("another host", 2**22 + 1, here.place, here.start)
    assert clone.gone is None
    monkeypatch.setattr(module, "_start", lambda pid: None)  # what a /proc with hidepid tells of another user's
    assert here.gone is None
    assert Holder(here.host, 1, here.place, "1").gone is None
    assert Holder(here.host, 2**22 + 1, here.place, "1").gone is True


def test_who_waits_says_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SECONDS_UNTIL_TOLD", 0.0)
    store = Store(tmp_path / "s")
    lease = store.leases.take("sweep.json")
    assert lease is not None
    releaser = threading.Timer(0.3, lease.release)
    releaser.start()
    with store.locked():
        pass
    said = capsys.readouterr().err
    assert f"waits for process {os.getpid()} on {platform.node()}, which writes sweep.json (end that process" in said
    assert said.count("waits for") == 1
