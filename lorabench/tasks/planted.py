"""A teacher with a known answer: the base plus a random change of known rank, whose outputs a run learns to give.

The positive control of a rank sweep: adapters on the planted layers reach the teacher if their rank is the planted one
or higher. Shape letters: N examples, T tokens, H hidden, r planted rank, I in, O out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lorabench.config.contracts.model import HeadSpec
from lorabench.config.contracts.task import Encoded, Example, StepOutput, TaskData
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.tasks import encoding, metrics
from lorabench.tasks.labelled_texts import LabelledTexts

if TYPE_CHECKING:
    from torch import Tensor, nn

    Collate = Callable[[list[Example]], dict[str, Tensor]]

TEACHER_BATCH = 64  # examples
MOMENT_EXAMPLES = 512  # from which the second moments of the layers' inputs are estimated


@dataclass(frozen=True)
class Config(LabelledTexts):
    """Texts of a classification source, labels ignored; the loss is 1 for the base itself and 0 for the teacher."""

    kind: str = knob("planted", help="the task's module", choices=("planted",))
    metric: str = knob("loss", help="squared distance to the teacher over the base's", choices=("loss",))
    planted_in: str = knob(
        r"encoder\.layer\.3\.intermediate\.dense", help="regex for the whole name of the layers to change"
    )
    planted_rank: int = knob(16, help="rank of the change of each", low=1)
    planted_size: float = knob(0.5, help="root mean square of what the change adds over what the layer says", above=0)
    planted_seed: int = knob(0, help="of the change", low=0)

    lower_is_better: ClassVar[tuple[str, ...]] = ("loss",)

    def validate(self, key: str) -> None:
        super().validate(key)
        try:
            re.compile(self.planted_in)
        except re.error as e:
            raise ConfigError(f"{key}.planted_in", self.planted_in, f"a valid regular expression ({e})") from e

    def head(self, data: TaskData) -> HeadSpec:
        return HeadSpec("AutoModel")

    def teach(self, model: nn.Module, encoded: Encoded, collate: Collate) -> Encoded:
        """Return the examples with the teacher's output, "target" (float32 [H]), and "unit".

        unit: the mean squared distance between teacher and base over the training split. model: a float32 copy of the
        base, which becomes the teacher. Raises `ConfigError` where `planted_in` names no layer.
        """
        train = encoded.splits["train"]
        plain = _outputs(model, train, collate)
        starts = range(0, min(MOMENT_EXAMPLES, len(train)), TEACHER_BATCH)
        self.plant(model, [collate(train[i : i + TEACHER_BATCH]) for i in starts])
        target = {name: _outputs(model, rows, collate) for name, rows in encoded.splits.items()}
        unit = float(np.square(target["train"] - plain).sum(1).mean())
        splits = {
            name: [{**e, "target": t, "unit": unit} for e, t in zip(rows, target[name], strict=True)]
            for name, rows in encoded.splits.items()
        }
        return Encoded(splits, encoded.lengths, {**encoded.notes, "planted_distance": round(unit, 6)})

    def plant(self, model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
        """Change the layers in place: W + s U V^T U [O, r] and Q orthonormal, V [I, r] = (C + e I)^-1/2 Q.

        C [I, I] is the second moment of a layer's inputs, estimated from `batches`. Texts share a few directions that
        hold most of it. Without the whitening the change would act there alone, at a lower rank than was planted.
        Raises `ConfigError` where `planted_in` names no layer, and for a rank that a layer cannot have.
        """
        layers = {n: m for n, m in model.named_modules() if re.fullmatch(self.planted_in, n) and _has_matrix(m)}
        if not layers:
            names = sorted(n for n, m in model.named_modules() if _has_matrix(m))
            raise ConfigError("task.planted_in", self.planted_in, f"a regex for some of: {', '.join(names[:40])}")
        moments = _second_moments(model, layers, batches)
        for name, layer in layers.items():
            weight: Any = layer.weight
            rows = weight.data if type(layer).__name__ == "Linear" else weight.data.T  # [O, I]
            if self.planted_rank > min(rows.shape):
                allowed = f"at most {min(rows.shape)}, the rank {name} can have"
                raise ConfigError("task.planted_rank", self.planted_rank, allowed)
            rows.add_(self._change(name, rows, moments[name]).to(rows))

    def _change(self, name: str, weight: Tensor, moment: Tensor) -> Tensor:
        """Draw the change [O, I] of one layer, in float64.

        weight: [O, I]. moment: C [I, I]. The change is `planted_size` times as large as the weight, both measured by
        the root mean square of their outputs.
        """
        import torch

        raw = hashlib.sha256(f"{self.planted_seed}\0{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(raw[:8], "little") >> 1)
        u, q = (
            torch.linalg.qr(torch.randn(n, self.planted_rank, generator=generator, dtype=torch.float64))[0]
            for n in weight.shape
        )
        values, vectors = torch.linalg.eigh(moment)
        v = vectors @ ((values + values.mean() / 10).rsqrt()[:, None] * (vectors.T @ q))
        change = u @ v.T
        of_weight, of_change = (torch.einsum("oi,ij,oj->", m, moment, m) for m in (weight.double().cpu(), change))
        return change * (self.planted_size * (of_weight / of_change).sqrt())

    def collate(self, examples: Sequence[dict[str, Any]], processor: Any) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `token_type_ids`? [N, T]; `example` [N].

        Taught examples also have `target` [N, H] and `unit` [N].
        """
        import torch

        batch = encoding.collate_tokens(examples, processor)
        if "target" in examples[0]:
            batch["target"] = torch.from_numpy(np.stack([e["target"] for e in examples]))
            batch["unit"] = torch.tensor([e["unit"] for e in examples], dtype=torch.float32)
        return batch

    def step(self, model: nn.Module, batch: dict[str, Tensor]) -> StepOutput:
        """Return the squared distance of each example's mean hidden state to the teacher's, over the example's unit."""
        import torch

        state = encoding.mean_state(model, batch)
        loss = (state - batch["target"].to(state.dtype)).square().sum(1) / batch["unit"].to(state.dtype)
        return StepOutput(loss, torch.ones_like(loss), {"example": batch["example"]})

    def metrics(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        """Return the loss, from arrays [N]."""
        return {"loss": metrics.mean_loss(rows)}


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a plain weight."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ in ("Linear", "Conv1D") and weight is not None and weight.dim() == 2


def _second_moments(
    model: nn.Module, layers: dict[str, nn.Module], batches: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the mean of x x^T [I, I] over each layer's inputs x, padding left out, in float64 on the CPU."""
    import torch

    total: dict[str, Tensor] = {}
    mask = torch.empty(0)

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: Any) -> None:
            x = args[0][mask.bool()].double().cpu()
            total[name] = total.get(name, torch.zeros(())) + x.T @ x

        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    device, tokens = next(model.parameters()).device, 0
    try:
        with torch.no_grad():
            for batch in batches:
                batch = {name: t.to(device) for name, t in batch.items()}
                mask = batch["attention_mask"]
                tokens += int(mask.sum())
                model(**encoding.model_inputs(batch))
    finally:
        for h in hooks:
            h.remove()
    return {name: moment / tokens for name, moment in total.items()}


def _outputs(model: nn.Module, rows: list[Example], collate: Collate) -> np.ndarray:
    """Return a model's mean hidden states of all examples, [N, H], in their order."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    device = next(model.parameters()).device
    out: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for start in range(0, len(order), TEACHER_BATCH):
            chunk = order[start : start + TEACHER_BATCH]
            batch = {name: t.to(device) for name, t in collate([rows[i] for i in chunk]).items()}
            out |= dict(zip(chunk, encoding.mean_state(model, batch).float().cpu().numpy(), strict=True))
    return np.stack([out[i] for i in range(len(rows))])
