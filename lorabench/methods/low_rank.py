"""What LoRA and its relatives on matrices of low rank share: their settings, layers, ranks and scalings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.config import alpha_rules
from lorabench.config.contracts.method import AdapterSpec, Method, SlicePlan
from lorabench.config.contracts.model import BaseInfo, LayerInfo
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.config.method_names import display_name
from lorabench.methods.targets import (
    check_regex,
    check_targets,
    match_layers,
    pattern_value,
    targets_text,
    whole_modules,
)

LINEAR_KINDS = ("Linear", "Conv1D")


@dataclass(frozen=True)
class LowRank(Method):
    """One adapter on every targeted layer, and the head if the task brings a new one."""

    name: str = knob("lora", help="method")
    r: int = knob(8, help="rank; at most min(in, out) of every targeted layer", low=1, varies=True)
    alpha: Any = knob(16.0, help="a number, or a multiple of the rank such as 2r", above=0, varies=True)
    dropout: float = knob(0.0, help="on the adapter's input", low=0, high=0.95, varies=True)
    target_modules: Any = knob(
        "all-linear",
        varies=True,
        help="suffixes [query, value]; words of q k v o attention mlp all joined by +; all-linear; or a regex",
    )
    layers: list[int] | None = knob(None, help="indices of the blocks to adapt; null: all", varies=True)
    init: str = knob(
        "kaiming",
        help="how A starts; B starts at zero except for orthogonal",
        choices=("kaiming", "gaussian", "orthogonal"),
        varies=True,
    )
    use_rslora: bool = knob(False, help="scale by alpha / sqrt(r) instead of alpha / r", varies=True)
    rank_pattern: dict[str, int] = knob({}, help="r of the layers whose name ends like the key (a regex)", varies=True)
    alpha_pattern: dict[str, float] = knob({}, help="alpha of the layers whose name ends like the key", varies=True)
    modules_to_save: list[str] | None = knob(None, help="modules that train whole, beside a new head")
    match_parameters: int | None = knob(
        None,
        help="choose r so that the adapters train this many parameters; null: r as given",
        low=1,
        added="0.1.0",
        varies=True,
    )

    pack_group: ClassVar[str | None] = "lora"

    def __post_init__(self) -> None:
        """Turn an alpha such as `2r` into its number, so that a run's identity is the number."""
        alpha = self.alpha
        if isinstance(alpha, str):
            rule = alpha_rules.parse(alpha)
            if rule and rule.times_r and not rule.use_rslora:
                alpha = rule.alpha(self.r)
            else:
                try:
                    alpha = float(alpha)
                except ValueError:  # `validate` names the setting
                    return
        if isinstance(alpha, (int, float)) and not isinstance(alpha, bool):
            object.__setattr__(self, "alpha", float(alpha))

    def validate(self, key: str) -> None:
        if not isinstance(self.alpha, float):
            raise ConfigError(f"{key}.alpha", self.alpha, "a number above 0, or a multiple of the rank such as 2r")
        check_targets(key, self.target_modules, self.layers)
        for pattern in self.rank_pattern:
            check_regex(f"{key}.rank_pattern", pattern)
        for pattern in self.alpha_pattern:
            check_regex(f"{key}.alpha_pattern", pattern)
        if any(r < 1 for r in self.rank_pattern.values()):
            raise ConfigError(f"{key}.rank_pattern", self.rank_pattern, "values above 0")
        if not all(0 < alpha < math.inf for alpha in self.alpha_pattern.values()):
            raise ConfigError(f"{key}.alpha_pattern", self.alpha_pattern, "values above 0")
        if self.match_parameters and self.rank_pattern:
            raise ConfigError(f"{key}.match_parameters", self.match_parameters, "null with method.rank_pattern")
        if self.init == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            allowed = "even for init=orthogonal (half of the directions go to A, half to B)"
            raise ConfigError(f"{key}.r", self.r, allowed)

    def plan(self, base: BaseInfo, *, seed: int) -> SlicePlan:
        modules = whole_modules(base, self.modules_to_save)
        layers = match_layers(base, self.target_modules, self.layers, modules)
        self._check_patterns("rank_pattern", self.rank_pattern, layers)
        self._check_patterns("alpha_pattern", self.alpha_pattern, layers)
        self._check_ranks(layers)
        return SlicePlan(seed=seed, adapters={x.name: self.spec(x) for x in layers}, modules=modules)

    def _rank(self, layer: LayerInfo) -> tuple[int, str]:
        """Return the rank asked for on a layer, and the setting that asks for it."""
        r = pattern_value(self.rank_pattern, layer.name, self.r)
        return r, "method.r" if r == self.r else "method.rank_pattern"

    def _check_ranks(self, layers: list[LayerInfo]) -> None:
        """Raise `ConfigError` for a rank that a layer cannot have, naming the bound that all layers allow."""
        for layer in sorted(layers, key=_max_rank):
            r, key = self._rank(layer)
            if r > (bound := _max_rank(layer)):
                shape = f"{layer.in_features * layer.kernel}×{layer.out_features}"
                raise ConfigError(key, r, f"at most {bound}: layer {layer.name} is {shape}")

    @staticmethod
    def _check_patterns(field: str, patterns: dict[str, Any], layers: list[LayerInfo]) -> None:
        for pattern in patterns:
            if not any(pattern_value({pattern: True}, layer.name, False) for layer in layers):
                raise ConfigError(f"method.{field}", patterns, f"{pattern!r} matches no targeted layer")

    def spec(self, layer: LayerInfo) -> AdapterSpec:
        """Return the adapter of one layer. Raises `ConfigError` for a rank or a start that the layer cannot have."""
        r, key = self._rank(layer)
        if r % layer.groups:
            raise ConfigError(key, r, f"a multiple of {layer.groups}, the groups of layer {layer.name}")
        if self.init == "orthogonal" and layer.kind == "Conv2d":
            raise ConfigError("method.init", self.init, f"kaiming or gaussian: layer {layer.name} is a convolution")
        alpha = float(pattern_value(self.alpha_pattern, layer.name, self.alpha))
        scaling = alpha_rules.scaling(alpha, r, use_rslora=self.use_rslora)
        return AdapterSpec(r=r, scaling=scaling, alpha=alpha, dropout=self.dropout, init=self.init)

    def label(self) -> dict[str, Any]:
        return {
            "method": display_name(self.name, use_rslora=self.use_rslora),
            "r": self.r,
            "alpha": self.alpha,
            "targets": targets_text(self.target_modules),
        }


def _max_rank(layer: LayerInfo) -> int:
    return min(layer.in_features * layer.kernel, layer.out_features)


@dataclass(frozen=True)
class FromWeight(LowRank):
    """LoRA's settings, on linear layers, without dropout: A and B start as a part of the weight."""

    def validate(self, key: str) -> None:
        super().validate(key)
        if self.dropout:
            name = self.label()["method"]
            raise ConfigError(f"{key}.dropout", self.dropout, f"0 for {name}: it would drop parts of the weight itself")

    def spec(self, layer: LayerInfo) -> AdapterSpec:
        check_is_linear(self.name, self.target_modules, layer)
        return super().spec(layer)


def check_is_linear(method: str, target_modules: Any, layer: LayerInfo) -> None:
    """Raise `ConfigError` for a layer without a weight matrix, where a method is defined on matrices."""
    if layer.kind not in LINEAR_KINDS:
        raise _unfit_layer(method, target_modules, layer, "linear layers")


def check_is_no_embedding(method: str, target_modules: Any, layer: LayerInfo) -> None:
    """Raise `ConfigError` for an embedding, where a method needs an A that is drawn: an embedding's starts at zero."""
    if layer.kind not in (*LINEAR_KINDS, "Conv2d"):
        raise _unfit_layer(method, target_modules, layer, "layers that are no embeddings")


def _unfit_layer(method: str, target_modules: Any, layer: LayerInfo, fit: str) -> ConfigError:
    allowed = f"{fit} for method={method}; {layer.name} is {layer.kind}"
    return ConfigError("method.target_modules", target_modules, allowed)
