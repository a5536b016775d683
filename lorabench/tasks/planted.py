"""A teacher with a known answer: the base plus a random change of known rank, whose outputs the student fits.

The positive control of a rank sweep: adapters on the planted layers with fewer ranks than were planted cannot reach the
teacher, those with as many can. Shape letters: N examples, T tokens, H hidden, r planted rank.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lorabench.config.contracts.model import HeadSpec
from lorabench.config.contracts.task import Encoded, StepOutput, TaskData
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.tasks import encoding, metrics
from lorabench.tasks.labelled_texts import LabelledTexts

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS, SEEN = 64, 512  # examples in a batch of the teacher's; examples that the change is fitted to


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

    def teach(
        self, model: nn.Module, encoded: Encoded, collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    ) -> Encoded:
        """The examples with what the teacher says, "target" (float32 [H]), and "unit", the base's own mean squared distance.

        model: a float32 copy of the base, which becomes the teacher. Raises `ConfigError` where `planted_in` names no layer.
        """
        plain = {name: _outputs(model, rows, collate) for name, rows in encoded.splits.items()}
        self.plant(
            model,
            [
                collate(encoded.splits["train"][i : i + ROWS])
                for i in range(0, min(SEEN, len(encoded.splits["train"])), ROWS)
            ],
        )
        target = {name: _outputs(model, rows, collate) for name, rows in encoded.splits.items()}
        unit = float(np.square(target["train"] - plain["train"]).sum(1).mean())
        splits = {
            name: [{**e, "target": t, "unit": unit} for e, t in zip(rows, target[name], strict=True)]
            for name, rows in encoded.splits.items()
        }
        return Encoded(splits, encoded.lengths, {**encoded.notes, "planted_distance": round(unit, 6)})

    def plant(self, model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
        """Change the layers in place: W + s U V^T, U [O, r] orthonormal, V [I, r] = (C + e I)^-1/2 times orthonormal.

        C [I, I] is the second moment of what the layer reads. Texts share most of it in a few directions, and a change that
        only counts there would have a lower rank than was planted; so each of the r directions counts about alike.
        """
        import torch

        found = [(n, m) for n, m in model.named_modules() if re.fullmatch(self.planted_in, n) and _matrix(m)]
        if not found:
            names = sorted(n for n, m in model.named_modules() if _matrix(m))
            raise ConfigError("task.planted_in", self.planted_in, f"a regex for some of: {', '.join(names[:40])}")
        moments = _second_moments(model, dict(found), batches)
        for name, layer in found:
            weight: Any = layer.weight
            rows = weight.data if type(layer).__name__ == "Linear" else weight.data.T  # [O, I]
            if self.planted_rank > min(rows.shape):
                most = min(rows.shape)
                raise ConfigError("task.planted_rank", self.planted_rank, f"at most {most}, the rank {name} can have")
            raw = hashlib.sha256(f"{self.planted_seed}\0{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(raw[:8], "little") >> 1)
            u, v = (
                torch.linalg.qr(torch.randn(n, self.planted_rank, generator=generator, dtype=torch.float64))[0]
                for n in rows.shape
            )
            c = moments[name]
            values, vectors = torch.linalg.eigh(c)
            v = vectors @ ((values + values.mean() / 10).rsqrt()[:, None] * (vectors.T @ v))
            change = u @ v.T
            said, made = (torch.einsum("oi,ij,oj->", m, c, m) for m in (rows.double().cpu(), change))
            rows.add_((change * (self.planted_size * (said / made).sqrt())).to(rows))

    def collate(self, examples: Sequence[dict[str, Any]], processor: Any) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `token_type_ids`? [N, T]; `example` [N]; once taught, `target` [N, H], `unit` [N]."""
        import torch

        batch = encoding.collate_tokens(examples, processor)
        if "target" in examples[0]:
            batch["target"] = torch.from_numpy(np.stack([e["target"] for e in examples]))
            batch["unit"] = torch.tensor([e["unit"] for e in examples], dtype=torch.float32)
        return batch

    def step(self, model: nn.Module, batch: dict[str, Tensor]) -> StepOutput:
        """Squared distance of each example's mean hidden state to the teacher's, over the base's mean one."""
        import torch

        said = encoding.mean_state(model, batch)
        loss = (said - batch["target"].to(said.dtype)).square().sum(1) / batch["unit"].to(said.dtype)
        return StepOutput(loss, torch.ones_like(loss), {"example": batch["example"]})

    def metrics(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        return {"loss": metrics.mean_loss(rows)}


def _matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__ in ("Linear", "Conv1D") and weight is not None and weight.dim() == 2


def _second_moments(
    model: nn.Module, layers: dict[str, nn.Module], batches: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Mean of x x^T over true tokens of what each layer reads, [I, I] in float64 on the CPU."""
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


def _outputs(
    model: nn.Module, rows: list[dict[str, Any]], collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
) -> np.ndarray:
    """What a model says to all examples, [N, H], in their order."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    device = next(model.parameters()).device
    out: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for start in range(0, len(order), ROWS):
            chunk = order[start : start + ROWS]
            batch = {name: t.to(device) for name, t in collate([rows[i] for i in chunk]).items()}
            out |= dict(zip(chunk, encoding.mean_state(model, batch).float().cpu().numpy(), strict=True))
    return np.stack([out[i] for i in range(len(rows))])
