"""The LightningModule: one loss a slice, one optimizer step for all of them. Shapes: K slices, N = K * B rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from lorabench.adapters import Stack
from lorabench.config.contracts.task import Example, Task
from lorabench.config.runs import RunConfig
from lorabench.training import distributed
from lorabench.training.batches import Part
from lorabench.training.optimizer import PackedAdamW, clip_factors, grad_norms, scale_grads, schedule, zero_frozen_grads
from lorabench.training.pruning import cell_key, prune_reason, slices_to_prune

WriteRows = Callable[[int, list[dict[str, Any]]], None]
MeasureDuringTraining = Callable[[Sequence[int]], Mapping[int, Mapping[str, float]]]


@dataclass
class SliceState:
    """What the training loop knows of one slice."""

    status: str = "running"  # running, stopped (early), diverged, pruned
    reason: str | None = None
    best_score: float = math.inf  # of the metric that the run follows; its sign is turned where more is better
    best_step: int = 0
    best_weights: dict[str, Tensor] | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)
    waited: int = 0  # evaluations since the best one
    steps: int = 0  # trained so far
    tokens: int = 0
    examples: int = 0  # seen in training, each as often as it came
    pending: list[dict[str, Any]] = field(default_factory=list)  # history rows not yet handed on


class BoundTask:
    """A task with the processor that its collation needs."""

    def __init__(self, task: Task, processor: Any) -> None:
        self.task, self.processor = task, processor
        self.step, self.metrics, self.token_mask = task.step, task.metrics, task.token_mask

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Stack examples into tensors whose leading axis is N."""
        return self.task.collate(examples, self.processor)


class NoTrunkCache:
    """Computes every block of the base anew; `trunk_cache.TrunkCache` serves the frozen ones.

    Called with a part before its forward pass; gives the context in which the pass runs.
    """

    decided: int | None = None  # blocks that are served; None: not tried

    def __call__(self, part: Part) -> AbstractContextManager[None]:
        return nullcontext()

    @property
    def depth(self) -> int:
        """How many blocks are served; 0: none."""
        return self.decided or 0

    def resume(self, decided: int | None) -> None:
        """Take what a checkpoint decided."""


class PackModule(pl.LightningModule):
    """Trains K slices over one base.

    The loss of a slice is sum(loss) / sum(weight) over its whole accumulated batch. Gradients of the plain sums are
    accumulated, then each slice's are divided by its weight. A slice that diverges, stops early or is pruned gets no
    more batches, so the others go faster. prune: whether rates leave a cell early (`pruning`).
    """

    automatic_optimization = False

    def __init__(
        self,
        model: torch.nn.Module,
        stack: Stack,
        task: BoundTask,
        runs: Sequence[RunConfig],
        *,
        total_steps: int,
        rows: WriteRows,
        prune: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.stack, self.task, self.runs = model, stack, task, list(runs)
        self.total_steps, self.rows = total_steps, rows
        self.slices = [SliceState() for _ in runs]
        self.cells = [cell_key(r) for r in runs] if prune else None
        self.trunk_cache = NoTrunkCache()
        self.measure_during_training: MeasureDuringTraining = lambda slices: {}  # more metrics at an evaluation
        self.results: dict[int, dict[str, np.ndarray]] = {}  # per-example test results by slice
        self._chunks: dict[int, list[dict[str, np.ndarray]]] = {}
        self.steps_done = 0
        self.evaluated_at = -1
        self.packed: PackedAdamW | None = None
        self.moments: Mapping[str, Mapping[str, Tensor]] = {}  # of a checkpoint, until the optimizer is made

    @property
    def live(self) -> list[int]:
        """The slices that still train."""
        return [k for k, s in enumerate(self.slices) if s.status == "running"]

    @property
    def kept(self) -> list[int]:
        """The slices whose weights are a result: neither diverged nor pruned."""
        return [k for k, s in enumerate(self.slices) if s.status in ("running", "stopped")]

    @property
    def tokens(self) -> int:
        """Tokens trained on so far over all slices, padding left out."""
        return sum(s.tokens for s in self.slices)

    # -- training ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        o = self.runs[0].optimizer
        kinds: dict[tuple[Any, ...], list[torch.nn.Parameter]] = {}
        for t in self.stack.named_trainables():
            kinds.setdefault((t.stacked, t.decay, t.rates), []).append(t.parameter)
        groups = [
            {"params": params, "stacked": stacked, "decay": decay, "rates": own}
            for (stacked, decay, own), params in kinds.items()
        ]
        rates = [r.optimizer.lr for r in self.runs]
        decays = [r.optimizer.weight_decay for r in self.runs]
        optimizer = PackedAdamW(groups, lr=rates, weight_decay=decays, betas=(o.beta1, o.beta2), eps=o.eps)
        factor = schedule(o.schedule, self.total_steps, o.warmup_ratio)
        self.packed = self._begin(optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=self.steps_done - 1)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _begin(self, optimizer: PackedAdamW) -> PackedAdamW:
        """Bring an optimizer to `steps_done`: moments of a checkpoint, and slices that have left."""
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # what a schedule that begins later than step 0 asks for
        for t in self.stack.named_trainables():
            for key, value in self.moments.get(t.name, {}).items():
                like = t.parameter if key != "steps" else torch.zeros(len(self.runs), device=t.parameter.device)
                optimizer.state[t.parameter][key] = torch.zeros_like(like).copy_(value)
        self.moments = {}
        optimizer.freeze(torch.tensor([s.status != "running" for s in self.slices]))
        return optimizer

    def optimizer_state(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the optimizer's tensors by trainable: exp_avg, exp_avg_sq in the trainable's shape, steps [K]."""
        if self.packed is None:
            return dict(self.moments)
        return {t.name: self.packed.state.get(t.parameter, {}) for t in self.stack.named_trainables()}

    def on_fit_start(self) -> None:
        if len(set(distributed.gather_objects(self.steps_done))) > 1:
            raise RuntimeError("the processes of this pack do not stand at one step")

    def training_step(self, batch: list[Part], batch_idx: int) -> None:
        assert self.packed is not None
        losses, weights, tokens, examples = sums = torch.zeros(4, len(self.runs), dtype=torch.float64)
        micros = 1 + max((part.micro for part in batch), default=0)
        self.packed.zero_grad(set_to_none=True)
        for part in batch:
            with self.stack.active(part.slices):
                self._key_dropout(self.steps_done * micros + part.micro, part.batch)
                with self.trunk_cache(part):
                    out = self.task.step(self.model, part.batch)
                loss = out.loss_sum.sum()
                self.manual_backward(loss if part.counts else 0 * loss)
            if not part.counts:
                continue
            losses[list(part.slices)] += sum_by_slice(out.loss_sum.detach(), part)
            weights[list(part.slices)] += sum_by_slice(out.weight, part)
            examples[list(part.slices)] += len(out.weight) // len(part.slices)
            mask = self.task.token_mask(part.batch)
            if mask is not None:
                tokens[list(part.slices)] += sum_by_slice(mask.sum(1), part)
        self._add_up(sums)
        for k, s in enumerate(self.slices):
            s.tokens += int(tokens[k])
            s.examples += int(examples[k])
        weights[weights == 0] = 1  # slices that have left
        self._scale_and_freeze(losses / weights, weights)
        for k in self.live:
            self.slices[k].steps = self.steps_done + 1
        rate = self.packed.param_groups[0]["lr"]
        self.optimizers().step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.steps_done += 1
        self._log_training(losses / weights, rate)
        self.trainer.should_stop = not self.live

    def _add_up(self, sums: Tensor) -> None:
        """Sum losses, weights, tokens and examples [4, K], and gradients, over the processes of the pack. Collective."""
        if distributed.world_size() > 1:
            there = sums.to(self.device)
            distributed.sum_over_ranks([there])
            sums.copy_(there.cpu())
            distributed.sum_gradients(t.parameter for t in self.stack.named_trainables())

    def _key_dropout(self, step: int, batch: Mapping[str, Tensor]) -> None:
        self.stack.context.set(seeds=[r.seed for r in self.runs], step=step, examples=batch["example"])

    def _scale_and_freeze(self, losses: Tensor, weights: Tensor) -> None:
        """Freeze the slices whose loss or gradient is not finite, divide by the weights, clip each slice."""
        trainables = self.stack.named_trainables()
        for t in trainables:
            zero_frozen_grads(t.parameter, t.rates)
        parameters = [(t.parameter, t.stacked) for t in trainables]
        norms = grad_norms(parameters, len(self.runs)) / weights
        for k, s in enumerate(self.slices):
            if s.status == "running" and not (math.isfinite(losses[k]) and math.isfinite(norms[k])):
                what = "loss" if not math.isfinite(losses[k]) else "gradient"
                self._freeze(k, "diverged", f"the {what} was not finite at step {self.steps_done + 1}")
        factors = clip_factors(norms, self.runs[0].trainer.gradient_clip_val) / weights
        scale_grads(parameters, factors)

    def _freeze(self, k: int, status: str, why: str) -> None:
        self.slices[k].status, self.slices[k].reason = status, why
        mask = torch.zeros(len(self.runs), dtype=torch.bool)
        mask[k] = True
        if self.packed is not None:  # else one that is made now knows
            self.packed.freeze(mask)

    def _log_training(self, losses: Tensor, factor: float) -> None:
        if self.steps_done % self.runs[0].trainer.log_interval:
            return
        for k in self.live:
            lr = self.runs[k].optimizer.lr * factor
            self.slices[k].pending.append({"step": self.steps_done, "train/loss": float(losses[k]), "lr": lr})

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self, part: Part) -> None:
        with self.stack.active(part.slices), self.trunk_cache(part):
            out = self.task.step(self.model, part.batch)
        if not part.counts:
            return
        columns = {"example": part.batch["example"], **out.rows, "loss_sum": out.loss_sum, "weight": out.weight}
        for name, column in columns.items():
            wide = column.detach().float() if column.dtype in (torch.bfloat16, torch.float16) else column.detach()
            columns[name] = wide.view(len(part.slices), -1).cpu()
        for i, k in enumerate(part.slices):
            chunk = {name: column[i].numpy() for name, column in columns.items()}
            self._chunks.setdefault(k, []).append(chunk)

    def _end_evaluation(self) -> dict[int, dict[str, np.ndarray]]:
        """Return per-example results of each evaluated slice, in the order of the examples' ids. Collective."""
        results = {}
        everywhere = distributed.gather_objects(self._chunks)
        for k in sorted({k for chunks in everywhere for k in chunks}):
            chunks = [c for one in everywhere for c in one.get(k, ())]
            table = {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}
            order = np.argsort(table["example"], kind="stable")
            results[k] = {name: column[order] for name, column in table.items()}
        self._chunks = {}
        return results

    def on_validation_epoch_start(self) -> None:
        self._chunks = {}

    def validation_step(self, batch: Part, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self.evaluated_at = self.steps_done
        evaluated = self._end_evaluation()
        for k, rows in evaluated.items():
            self._judge(k, self.slices[k], self.task.metrics(rows))
        self._prune()
        for k, more_metrics in self.measure_during_training([k for k in evaluated if k in self.kept]).items():
            self.slices[k].pending[-1] |= more_metrics  # the row of this evaluation
        for k in range(len(self.slices)):
            self.flush(k)

    def _prune(self) -> None:
        """Freeze the slices whose rates are out of the race within their cell."""
        if self.cells is None:
            return
        rates, alive = [r.optimizer.lr for r in self.runs], [k in self.kept for k in range(len(self.runs))]
        keep_last = self.runs[0].trainer.keep == "last"
        losses = [(s.last_metrics if keep_last else s.best_metrics).get("loss", math.nan) for s in self.slices]
        step, total = self.steps_done, self.total_steps
        for k in slices_to_prune(rates, losses, alive, step=step, total=total, groups=self.cells):
            if self.slices[k].status == "running":
                self._freeze(k, "pruned", prune_reason(step, total))

    def _judge(self, k: int, s: SliceState, metrics: dict[str, float]) -> None:
        """Keep the best weights of a slice; freeze it when it diverged or has waited long enough."""
        s.pending.append({"step": self.steps_done, **{f"val/{name}": v for name, v in metrics.items()}})
        s.last_metrics = metrics
        if not math.isfinite(metrics["loss"]):
            return self._freeze(k, "diverged", f"the validation loss was not finite at step {self.steps_done}")
        trainer = self.runs[k].trainer
        name, score = self._score(k, metrics)
        better = score < s.best_score or not s.best_metrics  # a score that is no number is better than none
        if trainer.keep == "last" or better:
            s.best_metrics, s.best_step = metrics, self.steps_done
            if trainer.keep == "best":
                s.best_weights = {n: t.detach().cpu().clone() for n, t in self.stack.slice_state(k).items()}
        s.waited = 0 if better else s.waited + 1
        s.best_score = min(s.best_score, score)
        if trainer.early_stopping_patience is not None and s.waited >= trainer.early_stopping_patience:
            self._freeze(k, "stopped", f"no better validation {name} for {s.waited} evaluations")
        return None

    def _score(self, k: int, metrics: Mapping[str, float]) -> tuple[str, float]:
        """Return the metric that run k follows, and its value as a score of which less is better; inf for no number."""
        name, task = self.runs[k].trainer.monitor or "loss", self.runs[k].task
        value = metrics[name] if name in task.lower_is_better else -metrics[name]
        return name, value if math.isfinite(value) else math.inf

    def flush(self, k: int) -> None:
        """Hand the history rows of slice k on."""
        if self.slices[k].pending:
            self.rows(k, self.slices[k].pending)
            self.slices[k].pending = []

    def on_test_epoch_start(self) -> None:
        self._chunks = {}

    def test_step(self, batch: Part, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self.results = self._end_evaluation()


def sum_by_slice(rows: Tensor, part: Part) -> Tensor:
    """[len(slices) * B] -> [len(slices)], summed in float64."""
    return rows.double().view(len(part.slices), -1).sum(1).cpu()
