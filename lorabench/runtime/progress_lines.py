"""Progress of a long command in lines, for logs: where a terminal would show a bar."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field

SECONDS_BEFORE, SECONDS_BETWEEN = 3.0, 30.0


@dataclass
class ProgressLines:
    """Says on stderr what goes on where it takes longer than three seconds, then every half a minute how far it is.

    what: what is done, such as "measuring the weights". unit: of what is counted. enabled: False says nothing.
    """

    what: str
    unit: str
    enabled: bool
    _began: float = field(default_factory=time.monotonic)

    def __enter__(self) -> ProgressLines:
        self._said = self._began
        self._timer = threading.Timer(SECONDS_BEFORE, self._say, (f"{self.what} ...",))
        self._timer.daemon = True
        if self.enabled:
            self._timer.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._timer.cancel()

    def tick(self, done: int, total: int) -> None:
        """Hear that `done` of `total` parts are done, done counted from the beginning of this process."""
        now = time.monotonic()
        if not self.enabled or not 0 < done < total or now - self._said < SECONDS_BETWEEN:
            return
        self._said = now
        left = (now - self._began) / done * (total - done)
        span = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
        self._say(f"{self.what}: {done:,} of {total:,} {self.unit}, about {span} left")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
