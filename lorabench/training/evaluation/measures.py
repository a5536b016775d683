"""What a confirmation run says beside its test metrics: what it forgot, what became of its tone, a few samples.

Measured on the base before the pack trains and on each slice after; with `task.probe_along` the probe also at each
evaluation, in the run's history. Record metrics:
`probe/<name>/<loss or accuracy>` (after), `probe/<name>/before`, `probe/<name>/examples`;
`style/real`, `style/base`, `style/adapted` (mean probability that a reply is a real one), `style/examples`, and
`style/moved`, `style/moved_low`, `style/moved_high` where the classifier can tell (`tone`). Samples: `samples`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from lorabench.tasks import probe as probes
from lorabench.training.evaluation import forgetting, replies, samples
from lorabench.training.evaluation.style import Style
from lorabench.training.session import Session


class Beside:
    """Made before a pack trains, for confirmation runs; `finish` fills `session.extras` and writes samples."""

    def __init__(self, session: Session) -> None:
        start, self.session, run = time.perf_counter(), session, session.pack.runs[0]
        self.probe = probes.of(run, session.prepared.head)
        self.known = forgetting.plain(session, self.probe) if self.probe else 0.0
        prompts = run.task.style_prompts
        self.style = Style(session, prompts) if prompts else None
        self.samples = samples.before(session)
        session.beside_seconds = time.perf_counter() - start
        if run.task.probe_along:
            session.module.along = self.along

    def along(self, slices: Sequence[int]) -> dict[int, dict[str, float]]:
        """The probe of these slices as they are in the middle of training, for their histories."""
        s, start = self.session, time.perf_counter()
        s.progress.lap("eval")
        found = self._probed(slices)
        s.progress.lap(None)
        s.beside_seconds = (s.beside_seconds or 0.0) + time.perf_counter() - start
        return found

    def _probed(self, slices: Sequence[int]) -> dict[int, dict[str, float]]:
        if not (self.probe and slices):
            return {}
        key = f"probe/{self.probe.task.name}/{self.probe.metric}"
        found = forgetting.measured(self.session, self.probe, slices)
        return {k: {key: after} for k, after in zip(slices, found, strict=True)}

    def finish(self) -> None:
        s, start = self.session, time.perf_counter()
        kept = s.module.kept
        s.extras = {k: {} for k in kept}
        for k, found in self._probed(kept).items():
            name = f"probe/{self.probe.task.name}" if self.probe else ""
            examples = len(self.probe.splits["test"]) if self.probe else 0
            s.extras[k] |= {**found, f"{name}/before": self.known, f"{name}/examples": examples}
        if self.style and kept:
            for k, adapted in zip(kept, replies.written(s, self.style.prompts, kept), strict=True):
                s.extras[k] |= self.style.metrics(adapted)
        if self.samples and kept:
            samples.write(s, self.samples)
        s.beside_seconds = (s.beside_seconds or 0.0) + time.perf_counter() - start
