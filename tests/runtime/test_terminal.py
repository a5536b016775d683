"""What users write reaches a terminal as text: no markup, no emoji code, no escape sequence."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

from lorabench.runtime import terminal

HOSTILE = "x[/y] [red]a[/] :boom: \x1b]0;title\x07\x1b[2J\r\u202eevil"


@pytest.mark.parametrize("kind", ["text", "cell", "title", "column", "plain"])
def test_a_console_shows_hostile_text_as_it_is_and_sends_no_control(kind: str) -> None:
    console = terminal.make_console()
    console.file, console.width = io.StringIO(), 200
    table = Table(title=HOSTILE if kind == "title" else None)
    table.add_column(HOSTILE if kind == "column" else "c")
    table.add_column("c" * 120)
    table.add_row(HOSTILE if kind == "cell" else terminal.plain(HOSTILE) if kind == "plain" else "")
    console.print(HOSTILE if kind == "text" else table)
    shown = console.file.getvalue()
    assert "x[/y] [red]a[/] :boom: " in shown
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(shown)


def test_what_is_said_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(HOSTILE)
    terminal.say("a\n\tb", error=True)
    said = capsys.readouterr()
    assert said.out.startswith("x[/y] [red]a[/] :boom: �]0;title��[2J") and "\x1b" not in said.out
    assert said.err == "a\n\tb\n"


def test_an_error_with_an_escape_sequence_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    from lorabench.report.__main__ import main

    assert main(["\x1b[2J[/x]"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: sweep dir=�[2J[/x]")
