"""The one place through which users' texts reach a terminal: as they are, but for what would steer it. No torch.

Paths, names, labels and errors are no markup (`x[/y]`), no emoji codes (`:boom:`) and no escape sequences.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Controls but for tab and line feed, what turns the direction of writing, and line breaks of Unicode.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")


def clean(text: Any) -> str:
    """Return a text in which each character that would steer a terminal is the replacement character."""
    return _STEERING.sub("\N{REPLACEMENT CHARACTER}", str(text))


def say(text: Any, *, error: bool = False) -> None:
    """Print a text and a line feed, and flush. error: to standard error."""
    print(clean(text), file=sys.stderr if error else sys.stdout, flush=True)


def plain(text: Any, style: str = "") -> Text:
    """Return a text for a table or a bar of rich, in which nothing is markup."""
    from rich.text import Text

    return Text(clean(text), style=style)


def make_console(*, stderr: bool = False) -> Console:
    """Return a console that reads no markup and no emoji codes, and whose texts are clean."""
    from rich.console import Console

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(clean(text), **{**options, "markup": False, "emoji": False})

    return PlainConsole(stderr=stderr, markup=False, emoji=False, highlight=False)
