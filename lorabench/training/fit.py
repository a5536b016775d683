"""Training of a session: the only place that builds a Trainer and runs it."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytorch_lightning as pl

from lorabench.config.runs import RunConfig
from lorabench.runtime import signals
from lorabench.training import distributed
from lorabench.training.checkpointing import Saver
from lorabench.training.precision import Resolved
from lorabench.training.session import Session


def make_trainer(run: RunConfig, resolved: Resolved, progress: TrainingClock, start: int) -> pl.Trainer:
    """Return a Trainer for the steps from `start` on."""
    t, total = run.trainer, progress.total
    interval = t.eval_interval or max(1, -(-total // 5))
    with quiet_lightning():
        return pl.Trainer(
            accelerator=resolved.device,  # not Lightning's auto, which takes mps where `resolve` says cpu
            **distributed.trainer_devices(resolved.device, t.devices),
            precision=resolved.trainer_precision,  # type: ignore[arg-type]
            max_steps=max(1, total - start),
            max_epochs=-1,
            val_check_interval=interval,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=[progress],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,
            use_distributed_sampler=False,
        )


class TrainingClock(pl.Callback):
    """Tells a listener of each step, adds up seconds of training and evaluation, and leaves at SIGTERM.

    It leaves after a batch, or where training or evaluation begins. Lightning leaves too, but notices SIGTERM only
    inside a fit, and in one process of several.
    """

    def __init__(self, step: Callable[[int, int], None], total: int, seconds: dict[str, float]) -> None:
        self.step, self.total, self.seconds, self._since = step, total, seconds, time.monotonic()
        self.stopped: Callable[[], bool] = lambda: False  # whether SIGTERM has come
        self.leaving = False  # whether it has come to any process of the pack

    def lap(self, what: str | None) -> None:
        """Count the time since the last lap as `what`: train or eval; None: neither."""
        now = time.monotonic()
        if what:
            self.seconds[what] += now - self._since
        self._since = now

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.lap("train")
        self.step(module.steps_done, self.total)
        self.leave_if_stopped()

    def leave_if_stopped(self) -> None:
        """Leave if SIGTERM has come to any process of the pack. Collective: all leave at one step."""
        self.leaving = distributed.any_rank(self.stopped())
        if self.leaving:
            raise SystemExit(signals.EXIT_CODE)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.leave_if_stopped()

    def on_test_start(self, trainer: Any, module: Any) -> None:
        self.leave_if_stopped()

    def on_test_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.leave_if_stopped()

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.leave_if_stopped()
        self.lap("train")

    def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.leave_if_stopped()

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.lap("eval")


class CheckpointCallback(pl.Callback):
    """Tells the saver when a step, and the evaluation after it, is done."""

    def __init__(self, saver: Saver) -> None:
        self.saver = saver

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if module.steps_done % trainer.val_check_interval:
            self.saver.between_steps(evaluated=False)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.saver.between_steps(evaluated=True)


def fit(s: Session, saver: Saver) -> None:
    """Train from where the session stands, evaluate, load each slice's best weights, and test where the role allows it.

    At SIGTERM the step under way is finished, a checkpoint is written, and every process of the pack leaves with 143,
    whichever got the signal.
    """
    with signals.defer_stop() as stopped:
        s.progress.stopped = stopped
        try:
            _train_and_test(s)
        except SystemExit as e:  # ours; and how Lightning passes on SIGTERM (with code 0) and Ctrl-C (with code 1)
            if not (s.progress.leaving or stopped()):
                raise SystemExit(130) from e
            saver.save()
            with suppress(RuntimeError):  # one is gone
                distributed.gather_objects(None)  # whoever ends first ends all: not before it is written
            raise SystemExit(signals.EXIT_CODE) from e


def _train_and_test(s: Session) -> None:
    _train_to_end(s)
    for k, state in enumerate(s.module.slices):
        if state.best_weights is not None:
            s.stack.load_slice(k, state.best_weights)
    if s.pack.runs[0].role == "confirm" and s.module.kept:
        s.progress.lap(None)
        s.trainer.test(s.module, s.eval_stream("test", lambda: s.module.kept), verbose=False)
        s.progress.leave_if_stopped()
        s.progress.lap("eval")


def _train_to_end(s: Session) -> None:
    m, trainer = s.module, s.trainer
    s.progress.lap(None)
    if m.steps_done and m.steps_done % trainer.val_check_interval == 0:
        _evaluate(s)  # where SIGTERM came between a step and its evaluation
    if m.live and m.steps_done < m.total_steps:
        trainer.fit_loop.epoch_loop.batch_progress.total.ready = m.steps_done  # evaluations come at multiples of this
        trainer.fit(m, s.train_stream(), s.val_stream())
        s.progress.leave_if_stopped()
    s.progress.lap("train")
    if m.steps_done < m.total_steps and m.live:
        raise RuntimeError(f"training ended at step {m.steps_done} of {m.total_steps}")
    _evaluate(s)


def _evaluate(s: Session) -> None:
    """Evaluate, unless that was done at this step."""
    if s.module.evaluated_at != s.module.steps_done and s.module.live:
        s.trainer.validate(s.module, s.val_stream(), verbose=False)
        s.progress.leave_if_stopped()


class quiet_lightning(warnings.catch_warnings):
    """Keeps Lightning's advice about things decided here on purpose off the user's terminal."""

    def __enter__(self) -> None:
        super().__enter__()
        self._loggers = [
            logging.getLogger(n)
            for n in (
                "pytorch_lightning.utilities.rank_zero",
                "pytorch_lightning.accelerators.cuda",
                "pytorch_lightning.trainer.connectors.signal_connector",
            )
        ]
        self._levels = [x.level for x in self._loggers]
        for x in self._loggers:
            x.setLevel(logging.ERROR)
        advice = (
            ".*does not have many workers.*",
            ".*`isinstance\\(treespec.*",
            ".*GPU available but not used.*",
            ".*`srun` command is available.*",
        )
        for text in advice:
            warnings.filterwarnings("ignore", message=text)

    def __exit__(self, *args: Any) -> None:
        for x, level in zip(self._loggers, self._levels, strict=True):
            x.setLevel(level)
        super().__exit__(*args)
