"""The frozen trunk's output, computed once a split and base and served to every later forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lorabench.adapters.trunk import MAX_FEATURE_BYTES, Features, Trunk, find_trunk
from lorabench.training.batches import Part
from lorabench.training.module import NoTrunkCache
from lorabench.training.session import Session

MAX_IDLE_BYTES = MAX_FEATURE_BYTES  # of what a pack finds on the base and does not read
MAX_EXAMPLES_PER_SEEN = 4  # a split is computed whole when training sees at least one in so many of its examples


class TrunkCache(NoTrunkCache):
    """Serves the frozen trunk's output inside the context that it gives for a part, where that pays.

    The trunk is looked for at the first part, when the base is on its device. Features stay with the base, so the next
    pack finds them. decided: how many blocks are served; 0: none; None: not tried yet.
    alone: steps of a whole run, where the session trains a few of them to time it.
    """

    def __init__(self, session: Session, *, alone: int | None = None) -> None:
        self.session, self.alone = session, alone
        self._paying: dict[str, bool] = {}
        self.trunk: Trunk | None = None
        splits = session.prepared.encoded.splits
        self._split_of = {e["example"]: name for name, examples in splits.items() for e in examples}

    def __call__(self, part: Part) -> AbstractContextManager[None]:
        if self.trunk is None and self.decided != 0:
            self.trunk = self._find(part)
            self.decided = self.trunk.depth if self.trunk else 0
        if self.trunk is None:
            return nullcontext()
        return self.trunk.serve(self._features(self._split_of[int(part.batch["example"][0])]), part.batch)

    def resume(self, decided: int | None) -> None:
        """Take what a checkpoint decided: tried anew, on another batch, it might come out otherwise."""
        self.decided = decided

    def seconds(self, split: str) -> float:
        """Return the seconds that a split's features took, in whichever pack; 0 where they are not served."""
        features: Features | None = self.session.base.features.get(self._key(split))
        return features.seconds if features and self._paying.get(split) else 0.0

    def idle_bytes(self) -> int:
        """Return the bytes of features that stay with the base and that this pack does not read."""
        return sum(self.session.base.features[key].flat.nbytes for key in self._idle())

    def _idle(self) -> list[tuple[str, ...]]:
        read_here = {self._key(split) for split, pays in self._paying.items() if pays}
        return [key for key in self.session.base.features if key not in read_here]

    def _forget_idle(self) -> None:
        for key in self._idle():
            del self.session.base.features[key]

    def _find(self, part: Part) -> Trunk | None:
        s = self.session
        rows = len(part.batch["example"]) // len(part.slices)
        own = {name: column[:rows] for name, column in part.batch.items()}
        return find_trunk(
            s.base.model,
            s.stack,
            s.base.info.num_layers,
            lambda: s.module.task.step(s.base.model, own).loss_sum,
            own,
            token_mask=s.module.task.token_mask,
            tried=self.decided is not None,
        )

    def _key(self, split: str) -> tuple[str, ...]:
        """Return all that a split's features depend on beside the base, autocast and batch size included."""
        s, run = self.session, self.session.pack.runs[0]
        return (
            s.prepared.data.fingerprint,
            split,
            str(run.task),
            str(self.depth),
            str(s.resolved),
            str(run.trainer.eval_batch_size),
        )

    def _features(self, split: str) -> Features | None:
        assert self.trunk is not None
        s, key = self.session, self._key(split)
        if split not in self._paying:
            self._paying[split] = self._pays(split)
        if not self._paying[
            split
        ]:  # features of a longer run are not read either: numbers would depend on who trained before
            return None
        if key not in s.base.features:
            if self.idle_bytes() > MAX_IDLE_BYTES:  # a pack that needs them again computes them anew
                self._forget_idle()
            s.base.features[key] = self._compute(split)
        features: Features = s.base.features[key]
        return features

    def _pays(self, split: str) -> bool:
        s = self.session
        lengths, t = s.prepared.encoded.lengths[split], s.pack.runs[0].trainer
        size = next(s.base.model.parameters()).element_size()
        if sum(lengths) * s.base.info.hidden_size * size > MAX_FEATURE_BYTES:
            return False
        seen = (self.alone or s.module.total_steps) * t.batch_size * t.accumulate_grad_batches
        return split != "train" or seen * MAX_EXAMPLES_PER_SEEN >= len(lengths)

    def _compute(self, split: str) -> Features:
        assert self.trunk is not None
        s = self.session
        stream = s.eval_stream(split, lambda: [0], dealt=False)
        device = next(s.base.model.parameters()).device
        batches: Any = ({name: column.to(device) for name, column in part.batch.items()} for part in stream)
        tokens = sum(s.prepared.encoded.lengths[split])
        return self.trunk.features(batches, lambda batch: s.module.task.step(s.base.model, batch), tokens)
