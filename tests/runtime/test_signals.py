"""SIGTERM wherever it comes, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hydra.errors import ConfigCompositionException

from lorabench import __main__ as entry
from lorabench.runtime import signals as stopping

START = """
import os, signal, time
from lorabench.runtime import signals as stopping
stopping.install()

def told():
    os.kill(os.getpid(), signal.SIGTERM)

try:
"""
END = """
    for _ in range(1000):
        time.sleep(0.01)
finally:
    print("in order")
"""
WHERE = {
    "anywhere": "    told()",
    "in a finaliser": """
    class Dying:
        def __del__(self):
            told()
            [None for _ in range(9)]

    dying = Dying()
    del dying
    print("swallowed")
""",
    "twice": "    try:\n        told()\n    finally:\n        told()\n        print('not cut short')",
    "where it is deferred": "    with stopping.defer_stop() as stopped:\n        told()\n        assert stopped()\n        raise ValueError",
}


WATCHED = """
import os, signal, sys, time
from lorabench.runtime import signals as stopping
signal.signal(signal.SIGTERM, lambda *_: print("a handler"))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
stopping.watch_for_sigterm(lambda: (print("leave", flush=True), os._exit(7)))
if sys.argv[1] == "outside":
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)
with stopping.defer_stop() as stopped:
    assert not stopped()
    os.kill(os.getpid(), signal.SIGTERM)
    while not stopped():
        time.sleep(0.01)
    print("noted", flush=True)
"""


@pytest.mark.parametrize(("where", "code", "words"), [("outside", 7, "leave"), ("inside", 143, "noted")])
def test_where_it_is_blocked_a_thread_hears_it(where: str, code: int, words: str) -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED, where], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split()) == (code, [words]), done.stderr


@pytest.mark.parametrize("where", WHERE)
def test_it_ends_the_process_in_order(where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START + WHERE[where] + END], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 143, done.stderr
    assert "in order" in done.stdout
    assert ("swallowed" in done.stdout) == (where == "in a finaliser")
    assert ("not cut short" in done.stdout) == (where == "twice")


def test_what_a_broken_off_parser_raises_is_no_bad_input(monkeypatch, capsys) -> None:
    """Seen: SIGTERM inside a composing Hydra came out as its exception without words."""

    def composing(**_):
        raise ConfigCompositionException

    monkeypatch.setattr("sys.argv", ["lorabench"])
    monkeypatch.setattr(entry.hydra, "main", composing)
    for told, code, words in ((False, 2, "error: "), (True, 143, "stopped; the same command")):
        monkeypatch.setattr(stopping, "is_stopping", lambda told=told: told)
        with pytest.raises(SystemExit) as ended:
            entry.main()
        assert ended.value.code == code and words in capsys.readouterr().err
