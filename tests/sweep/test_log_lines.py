"""Off a terminal an event is one line, however long it is and whatever line breaks it holds."""

from __future__ import annotations

import io

from rich.console import Console

from lorabench.sweep.progress import say


def test_a_log_is_one_line_an_event_and_a_terminal_wraps() -> None:
    text = "failed a1b2: " + "a long reason " * 20 + "\nsecond line [/x]"
    shown = []
    for terminal in (False, True):
        out = io.StringIO()
        say(Console(file=out, width=80, force_terminal=terminal, color_system=None), text)
        shown.append(out.getvalue())
    assert shown[0] == text.replace("\n", " ") + "\n"
    assert shown[1].count("\n") > 2
