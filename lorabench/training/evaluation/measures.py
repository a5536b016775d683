"""What a confirmation run measures beside its test metrics: what it forgot, the style of its replies, sample answers.

Measured on the base before the pack trains and on each slice after; with `task.probe_along` the probe also at each
evaluation, in the run's history. Record metrics:
`probe/<name>/<loss or accuracy>` (after), `probe/<name>/before`, `probe/<name>/examples`;
`base/<metric>`: the base's own test metrics before training, of language models (`before`);
`style/real`, `style/base`, `style/adapted` (mean probability that a reply is a real one), `style/examples`, and
`style/moved`, `style/moved_low`, `style/moved_high` where the classifier can tell (`style`). Samples: `samples`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lorabench.tasks.probe import load_probe
from lorabench.training.evaluation import forgetting, replies, samples
from lorabench.training.evaluation.before import base_metrics
from lorabench.training.evaluation.style import ReplyStyle
from lorabench.training.session import Session


class AuxiliaryMeasures:
    """Measures a base when it is made, before the pack trains; `measure_trained` then measures the slices.

    probe, style, samples: None where the task does not ask for them.
    """

    def __init__(self, session: Session) -> None:
        self.session, task = session, session.pack.runs[0].task
        with self._clock():
            self.probe = load_probe(session.pack.runs[0], session.prepared.head)
            self.probe_before = forgetting.base_score(session, self.probe) if self.probe else 0.0
            self.style = ReplyStyle(session, task.style_prompts) if task.style_prompts else None
            self.samples = samples.answer_before(session)
            self.before = base_metrics(session)
        if task.probe_along:
            session.module.measure_during_training = self.measure_during_training

    def measure_during_training(self, slices: Sequence[int]) -> dict[int, dict[str, float]]:
        """Score the probe with these slices as they are now. Returns the history's entries by slice."""
        self.session.progress.lap("eval")
        with self._clock():
            scores = self._probe_scores(slices)
            self.session.progress.lap(None)
        return scores

    def measure_trained(self) -> None:
        """Measure each slice whose weights are a result; fills `session.extras` and writes samples."""
        s = self.session
        with self._clock():
            kept = s.module.kept
            s.extras = {k: dict(self.before) for k in kept}
            for k, scores in self._probe_scores(kept).items():
                assert self.probe is not None
                name = f"probe/{self.probe.task.name}"
                examples = len(self.probe.splits["test"])
                s.extras[k] |= {**scores, f"{name}/before": self.probe_before, f"{name}/examples": examples}
            if self.style and kept:
                generated = replies.generate(s, self.style.prompts, kept)
                for k, texts in zip(kept, generated, strict=True):
                    s.extras[k] |= self.style.metrics(texts)
            if self.samples and kept:
                samples.write(s, self.samples)

    def _probe_scores(self, slices: Sequence[int]) -> dict[int, dict[str, float]]:
        if self.probe is None or not slices:
            return {}
        key = f"probe/{self.probe.task.name}/{self.probe.metric}"
        scores = forgetting.score(self.session, self.probe, slices)
        return {k: {key: value} for k, value in zip(slices, scores, strict=True)}

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Add the seconds inside to `session.beside_seconds`."""
        start = time.monotonic()
        yield
        self.session.beside_seconds = (self.session.beside_seconds or 0.0) + time.monotonic() - start
