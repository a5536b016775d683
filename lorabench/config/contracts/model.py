"""What a base is: its layers by name, known before any weight is loaded, and the contract of `models/<kind>.py`.

Shape letters: K slices, B batch, T tokens, I in, O out, R rank, N examples of a batch (N = K * B in a pack).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.contracts.component import Component, attribute

if TYPE_CHECKING:
    from torch import nn

# Kinds of layers: those that can carry an adapter, those whose output has its channels before its positions, and those
# whose output is something plus their bias.
ADAPTABLE = ("Linear", "Conv1D", "Conv2d", "Embedding")
CHANNELS_FIRST = ("Conv1d", "Conv2d", "BatchNorm1d", "BatchNorm2d", "GroupNorm")
POSITION_EMBEDDINGS = ("position_embeddings", "wpe", "embed_positions")  # how names of tables of positions end
BIASED = ("Linear", "Conv1D", "LayerNorm", *CHANNELS_FIRST)


@dataclass(frozen=True)
class HeadSpec:
    """What a task asks of a base: the transformers Auto class that has its head, and the names of its labels."""

    auto_class: str  # "AutoModelForSequenceClassification", "AutoModelForCausalLM", ...
    label_names: tuple[str, ...] = ()  # for classification: num_labels, id2label and label2id follow


@dataclass(frozen=True)
class LayerInfo:
    """One module of a base that directly owns parameters."""

    name: str
    kind: str  # Linear, Conv1D, Conv2d, Embedding, or the class name of anything else (LayerNorm, ...)
    in_features: int  # Embedding: num_embeddings
    out_features: int  # Embedding: embedding_dim
    groups: int = 1
    kernel: int = 1  # kh * kw of a Conv2d
    weight_numel: int = 0  # everything it owns but its bias
    bias_numel: int = 0  # 0: the layer has no bias
    beyond_adapters: int = 0  # its parameters in matrices that no adapter can sit on, such as fused experts
    # rows of a table of positions before the first token's; a base's padding token may move it as it is loaded
    offset: int = field(default=0, compare=False)


@dataclass(frozen=True)
class BaseInfo:
    """A base without its weights."""

    layers: tuple[LayerInfo, ...]
    head: tuple[str, ...] = ()  # modules with no pretrained weights, e.g. ("classifier",): they must train
    output: tuple[str, ...] = ()  # a language model's output embedding: left out of all-linear, as in PEFT
    parameters: int = 0  # all parameters, tied ones once
    hidden_size: int = 0
    num_layers: int = 0
    notes: tuple[str, ...] = ()  # what its files hold and how it is used, in words: a kept or new head, parts left out

    @property
    def by_name(self) -> Mapping[str, LayerInfo]:
        return {layer.name: layer for layer in self.layers}

    @property
    def beyond_adapters(self) -> int:
        """The number of parameters in matrices that no adapter can sit on; modules that must train are left out."""
        return sum(x.beyond_adapters for x in self.layers if not is_inside(x.name, self.head))

    def module_parameters(self, modules: tuple[str, ...]) -> int:
        """Return the number of parameters of whole modules, given by name."""
        return sum(x.weight_numel + x.bias_numel for x in self.layers if is_inside(x.name, modules))


def is_inside(name: str, modules: Collection[str]) -> bool:
    """Whether a layer is one of these modules or lies inside one. All names are dotted."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@dataclass
class Base:
    """A loaded base: its model, in eval mode and with every parameter frozen, and its tokenizer or other processor."""

    model: nn.Module
    processor: Any
    info: BaseInfo
    fingerprint: str  # of the weight files' content
    notes: dict[str, Any] = field(default_factory=dict)  # e.g. {"weights": "dequantized Q4_1"}
    features: dict[Any, Any] = field(default_factory=dict)  # outputs of its frozen blocks, kept from pack to pack


@dataclass(frozen=True)
class Model(Component, ABC):
    """A base as a run names it: a frozen dataclass `Config` in `models/<kind>.py`, or in a file of the user's own.

    Fields of the dataclass are the settings under `model.`. Every method may raise `ConfigError` with a key under it.
    """

    @attribute
    def kind(self) -> str:
        """Name of the module that defines the base, or `local`."""
        raise NotImplementedError

    @attribute
    def name(self) -> str:
        """What tables call the base."""
        raise NotImplementedError

    @attribute
    def source(self) -> str:
        """Where the weights come from: a folder, a hub id, `package:...`. Empty: the code makes them."""
        return ""

    @attribute
    def dropout(self) -> float | None:
        """Probability of every dropout of the base. None: the base's own."""
        return None

    @attribute
    def attention(self) -> str:
        """Implementation of attention: `eager`, `sdpa`, or `auto` for a choice by device and length."""
        return "auto"

    @abstractmethod
    def info(self, head: HeadSpec) -> BaseInfo:
        """Return the layers with the head that a task asks for. Reads no weights: the model is on the meta device."""

    @abstractmethod
    def processor(self) -> Any:
        """Return what turns examples into tensors, such as a tokenizer or an image processor. Only tasks use it."""

    @abstractmethod
    def load(self, head: HeadSpec, *, dtype: str, attention: str) -> Base:
        """Return the base with its weights: in eval mode, every parameter frozen, the same weights at every call.

        dtype: `float32`, `bfloat16` or `float64`. attention: `eager` or `sdpa`.
        """

    def weight_files(self) -> Sequence[Path]:
        """Return the files whose size is what the base takes on disk; empty where that is not known."""
        return ()

    def transformers_folder(self) -> Path | None:
        """Return a folder that `from_pretrained` of transformers loads the base from; None where there is none."""
        return None

    def processor_fingerprint(self) -> str | None:
        """Return a hash of what the processor does that `fingerprint` may leave out. None: there is nothing else."""
        return None

    def attentions(self) -> tuple[str, ...]:
        """Return which of `eager` and `sdpa` the base offers. Reads no weights."""
        return ("eager", "sdpa")

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes whenever the weights or the processor do."""
