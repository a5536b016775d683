"""What a base is: its layers by name, known before any weight is loaded. Torch only inside functions.

Shape letters: K slices, B batch, T tokens, I in, O out, R rank, N examples of a batch (N = K * B in a pack).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ADAPTABLE = ("Linear", "Conv1D", "Conv2d", "Embedding")
CHANNELS_FIRST = ("Conv1d", "Conv2d", "BatchNorm1d", "BatchNorm2d", "GroupNorm")
BIASED = ("Linear", "Conv1D", "LayerNorm", *CHANNELS_FIRST)  # kinds whose output is something plus their bias


@dataclass(frozen=True)
class HeadSpec:
    """What a task asks of a base: which transformers Auto class, and its keyword arguments."""

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
    features: dict[Any, Any] = field(default_factory=dict)  # outputs of its frozen blocks, kept from pack to pack


def inventory(model: nn.Module, *, head: Sequence[str] = (), output: Sequence[str] = ()) -> BaseInfo:
    """The layers of a model, which may be on the meta device.

    head: modules without pretrained weights. output: the output embedding; both by dotted name.
    """
    config = getattr(model, "config", None)
    layers = tuple(info for name, module in model.named_modules() if (info := _layer_info(name, module)))
    return BaseInfo(
        layers=layers,
        head=tuple(head),
        output=tuple(output),
        parameters=sum(p.numel() for p in model.parameters()),  # torch yields a tied parameter once
        hidden_size=int(getattr(config, "hidden_size", 0) or 0),
        num_layers=int(getattr(config, "num_hidden_layers", 0) or 0),
    )


def _layer_info(name: str, module: nn.Module) -> LayerInfo | None:
    own = {key: p for key, p in module._parameters.items() if p is not None}
    if not own:
        return None
    kind, sizes = _shape(module)
    bias = own.pop("bias", None)
    return LayerInfo(
        name=name, kind=kind, **sizes, weight_numel=sum(p.numel() for p in own.values()),
        bias_numel=0 if bias is None else bias.numel(),
    )  # fmt: skip


def _shape(module: nn.Module) -> tuple[str, dict[str, int]]:
    """Kind and sizes. A subclass of Linear or Embedding whose caller or forward needs more than the layer itself does
    (MultiheadAttention's out_proj, position tables that compute their own indices) goes by its class: not adaptable."""
    from torch import nn

    kind = type(module).__name__
    weight = module._parameters.get("weight")
    if kind == "Conv1D" and weight is not None and weight.dim() == 2:
        # transformers.pytorch_utils.Conv1D: weight [I, O]
        return kind, {"in_features": weight.shape[0], "out_features": weight.shape[1]}
    if isinstance(module, nn.Linear) and kind != "NonDynamicallyQuantizableLinear":
        return "Linear", {"in_features": module.in_features, "out_features": module.out_features}
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if isinstance(module, nn.Embedding) and plain:
        return "Embedding", {"in_features": module.num_embeddings, "out_features": module.embedding_dim}
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
        kernel = module.kernel_size[0] * module.kernel_size[1]
        sizes = {"in_features": module.in_channels, "out_features": module.out_channels}
        return "Conv2d", sizes | {"groups": module.groups, "kernel": kernel}
    return kind, {"in_features": 0, "out_features": 0}
