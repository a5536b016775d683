"""The layers of a loaded model, or of one on the meta device, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorabench.config.contracts.model import ADAPTABLE, POSITION_EMBEDDINGS, BaseInfo, LayerInfo

if TYPE_CHECKING:
    from torch import nn


def inventory(model: nn.Module, *, head: Sequence[str] = (), output: Sequence[str] = ()) -> BaseInfo:
    """Return the layers of a model, which may be on the meta device.

    head: modules without pretrained weights. output: the output embedding. Both by dotted name.
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
    parameters = {key: p for key, p in module._parameters.items() if p is not None}
    if not parameters:
        return None
    kind, sizes = _shape(module)
    bias = parameters.pop("bias", None)
    return LayerInfo(
        name=name,
        kind=kind,
        **sizes,
        weight_numel=sum(p.numel() for p in parameters.values()),
        bias_numel=0 if bias is None else bias.numel(),
        beyond_adapters=0 if kind in ADAPTABLE else sum(p.numel() for p in parameters.values() if p.dim() > 1),
        offset=_offset(name, module),
    )


def _offset(name: str, module: nn.Module) -> int:
    """Return how many rows of a table of positions come before the first token's.

    OPT and BART keep two rows free; RoBERTa and its relatives begin after the row of the padding token.
    """
    if not name.endswith(POSITION_EMBEDDINGS):
        return 0
    padding: Any = getattr(module, "padding_idx", None)
    return int(getattr(module, "offset", 0) or 0) + (0 if padding is None else int(padding) + 1)


def _shape(module: nn.Module) -> tuple[str, dict[str, int]]:
    """Return the kind and the sizes of a layer.

    A subclass whose caller or forward needs more than the layer itself goes by its class, which is not adaptable:
    MultiheadAttention's out_proj, position tables that compute their own indices, convolutions that pad by themselves
    or standardize their weight. A Linear with a forward of its own may be a plain product (Falcon's) or not (BitNet's,
    routers): what it computes tells (`lorabench.adapters.acting`).
    """
    from torch import nn

    kind = type(module).__name__
    weight = module._parameters.get("weight")
    if kind == "Conv1D" and weight is not None and weight.dim() == 2:
        # transformers.pytorch_utils.Conv1D: weight [I, O]
        return kind, {"in_features": weight.shape[0], "out_features": weight.shape[1]}
    if isinstance(module, nn.Linear) and kind != "NonDynamicallyQuantizableLinear":
        return "Linear", {"in_features": module.in_features, "out_features": module.out_features}
    if isinstance(module, nn.Embedding):
        is_plain = _computes_as(module, nn.Embedding) or hasattr(module, "embed_scale")
        kind = "Embedding" if is_plain else kind
        return kind, {"in_features": module.num_embeddings, "out_features": module.embedding_dim}
    if isinstance(module, nn.Conv2d) and _computes_as(module, nn.Conv2d) and module.padding_mode == "zeros":
        kernel = module.kernel_size[0] * module.kernel_size[1]
        sizes = {"in_features": module.in_channels, "out_features": module.out_channels}
        return "Conv2d", sizes | {"groups": module.groups, "kernel": kernel}
    return kind, {"in_features": 0, "out_features": 0}


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module of a kind has that kind's forward pass, and none of its own."""
    methods = [name for name in ("forward", "_conv_forward") if hasattr(kind, name)]
    same = all(getattr(type(module), name) is getattr(kind, name) for name in methods)
    return same and "forward" not in vars(module)
