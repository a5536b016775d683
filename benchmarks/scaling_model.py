"""The cost model of scaling.md: what a training step of K packed LoRA runs asks of a machine. Pure.

Letters: K runs, B examples a run and step, T tokens an example, r rank, I in, O out, H hidden, F intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from scipy.optimize import minimize


@dataclass(frozen=True)
class Shape:
    """A transformer. kv: width of keys and values. gated: three MLP matrices, not two. logits: a language model's."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int
    kv: int
    gated: bool = False
    logits: bool = False

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(I, O) of one layer's products, all of them adapted."""
        H, F = self.hidden, self.intermediate
        return [(H, H), (H, self.kv), (H, self.kv), (H, H), *[(H, F)] * (1 + self.gated), (F, H)]

    @property
    def parameters(self) -> int:
        """P: the weights each token is multiplied by. An embedding is looked up, not multiplied."""
        return self.layers * sum(i * o for i, o in self.matrices) + self.logits * self.vocabulary * self.hidden

    def trainable(self, r: int) -> int:
        """Of one run: r (I + O) a matrix."""
        return self.layers * r * sum(i + o for i, o in self.matrices)


SHAPES = {
    "minilm": Shape(384, 1536, 6, 30522, heads=12, kv=384),
    "smollm2": Shape(576, 1536, 30, 49152, heads=9, kv=192, gated=True, logits=True),
    "7b": Shape(3584, 18944, 28, 152064, heads=28, kv=512, gated=True, logits=True),  # Qwen2.5-7B's widths
}


@dataclass(frozen=True)
class Work:
    """One step. size: bytes an element of base and activations. eager: attention writes its T x T maps."""

    K: int
    B: int
    T: float
    r: int = 8
    size: int = 2
    part_tokens: int = 32768
    eager: bool = False

    @property
    def parts(self) -> int:
        """As `batches.PackStream` cuts a step: one run's batch is never cut, so there are at most K."""
        return min(self.K, math.ceil(self.K * self.B * self.T / self.part_tokens))


@dataclass(frozen=True)
class Device:
    flops: float  # FLOP/s of its products
    bandwidth: float  # B/s
    launch: float  # seconds an operation costs before it computes


def operations(s: Shape, w: Work) -> float:
    """FLOP a token: base 2P forward, 2P to the input (frozen: no weight gradients), adapters 6 r (I + O), attention 12 T H."""
    return 4 * s.parameters + 6 * s.trainable(w.r) + 12 * w.T * s.hidden * s.layers


def traffic(s: Shape, w: Work) -> tuple[float, float, float]:
    """Bytes moved by the weights a part, by the activations a token, by the adapters of a run; counted in scaling.md."""
    rest = 34 * s.hidden + (5 + 3 * s.gated) * s.intermediate + 13 * s.heads * w.T * w.eager
    token = w.size * (6 * s.trainable(1) + s.layers * rest + 4 * s.logits * s.vocabulary)
    return 2.0 * s.parameters * w.size, token, 4.0 * 13 * s.trainable(w.r)


def launches(s: Shape, w: Work) -> int:
    """Operations a step starts: in a part 20 a matrix, 26 a layer, 24 more; 6 an adapter tensor (norm, clipping); 16 a run."""
    part = s.layers * (20 * len(s.matrices) + 26) + 24
    return w.parts * part + 6 * 2 * s.layers * len(s.matrices) + 16 * w.K


def terms(s: Shape, w: Work, d: Device) -> dict[str, float]:
    """Seconds of a step that each resource asks for."""
    (part, token, run), tokens = traffic(s, w), w.K * w.B * w.T
    moved = w.parts * part + tokens * token + w.K * run
    compute, launching = tokens * operations(s, w) / d.flops, launches(s, w) * d.launch
    return {"compute": compute, "bandwidth": moved / d.bandwidth, "launches": launching}


def seconds(s: Shape, w: Work, d: Device) -> float:
    t = terms(s, w, d)
    return max(t["compute"], t["bandwidth"]) + t["launches"]


def speed_up(s: Shape, w: Work, d: Device) -> float:
    """K steps of lone runs over one step of the pack: between 1 and K."""
    return w.K * seconds(s, replace(w, K=1), d) / seconds(s, w, d)


def ridge(s: Shape, w: Work, d: Device) -> float:
    """Tokens a part from which the products take longer than the traffic; inf where activations alone outweigh them."""
    part, token, _ = traffic(s, w)
    gap = operations(s, w) / d.flops - token / d.bandwidth
    return part / d.bandwidth / gap if gap > 0 else math.inf


def memory(s: Shape, w: Work) -> float:
    """Bytes: base with embedding, K x trainable x 16 (float32 value, gradient, two moments), what a part keeps (scaling.md)."""
    layer = 6 * s.hidden + 2 * s.kv + (2 + 2 * s.gated) * s.intermediate + w.r * len(s.matrices)
    kept = s.layers * w.size * (layer + 2 * s.heads * w.T * w.eager) + s.logits * s.vocabulary * (w.size + 8)
    base = w.size * (s.parameters + (not s.logits) * s.vocabulary * s.hidden)  # logits: tied to the embedding
    return base + w.K * s.trainable(w.r) * 16 + math.ceil(w.K / w.parts) * w.B * w.T * kept


def fitted(s: Shape, measured: Sequence[tuple[Sequence[Work], float]], flops: float) -> Device:
    """Bandwidth and launch cost of least squared relative error at a given peak. measured: a K's steps, their mean seconds."""

    def error(logs: Sequence[float]) -> float:
        d = Device(flops, 10 ** logs[0], 10 ** logs[1])
        return sum((fmean(seconds(s, w, d) for w in works) / t - 1) ** 2 for works, t in measured)

    found = minimize(error, (9, -5), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12, "maxiter": 4000}).x
    return Device(flops, float(10 ** found[0]), float(10 ** found[1]))
