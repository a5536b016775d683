"""What a base is: its layers by name, known before any weight is loaded. Torch only inside functions.

Shape letters: K slices, B batch, T tokens, I in, O out, R rank, N examples of a batch (N = K * B in a pack).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ADAPTABLE = ("Linear", "Conv1D", "Conv2d", "Embedding")


@dataclass(frozen=True)
class HeadSpec:
    """What a task asks of a base: which transformers Auto class, and its keyword arguments."""

    auto_class: str  # "AutoModelForSequenceClassification", "AutoModelForCausalLM", ...
    label_names: tuple[str, ...] = ()  # for classification: num_labels, id2label and label2id follow


@dataclass(frozen=True)
class LayerInfo:
    """One leaf module of a base that directly owns a `weight`."""

    name: str
    kind: str  # Linear, Conv1D, Conv2d, Embedding, or the class name of anything else (LayerNorm, ...)
    in_features: int  # Embedding: num_embeddings
    out_features: int  # Embedding: embedding_dim
    groups: int = 1
    kernel: int = 1  # kh * kw of a Conv2d
    weight_numel: int = 0
    bias_numel: int = 0  # 0: the layer has no bias

    def adapter_parameters(self, r: int) -> int:
        """r * (in + out); for Conv2d with PEFT's shapes (A sees in / groups channels and the kernel)."""
        return r * (self.in_features // self.groups * self.kernel + self.out_features)


@dataclass(frozen=True)
class BaseInfo:
    """A base without its weights (built on the meta device)."""

    layers: tuple[LayerInfo, ...]
    head: tuple[str, ...] = ()  # modules with no pretrained weights, e.g. ("classifier",): they must train
    output: tuple[str, ...] = ()  # a language model's output embedding: left out of all-linear, as in PEFT
    parameters: int = 0  # all parameters, tied ones once
    hidden_size: int = 0
    num_layers: int = 0

    @property
    def by_name(self) -> Mapping[str, LayerInfo]:
        return {layer.name: layer for layer in self.layers}

    def module_parameters(self, modules: tuple[str, ...]) -> int:
        """Parameters of whole modules, by name or prefix."""
        inside = [x for x in self.layers if any(x.name == m or x.name.startswith(m + ".") for m in modules)]
        return sum(x.weight_numel + x.bias_numel for x in inside)


@dataclass
class Base:
    """A loaded base. `model` is in eval-ready state, all parameters frozen; `processor` is its tokenizer."""

    model: nn.Module
    processor: Any
    info: BaseInfo
    fingerprint: str  # of the weight files' content
    notes: dict[str, Any] = field(default_factory=dict)  # e.g. {"weights": "dequantized Q4_1"}
