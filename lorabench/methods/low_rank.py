"""What LoRA and its relatives on matrices of low rank have in common: their settings, layers, ranks and scales."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.config import alpha_rules
from lorabench.config.contracts.method import AdapterSpec, Method, SlicePlan
from lorabench.config.contracts.model import BaseInfo, LayerInfo
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.config.method_names import display_name
from lorabench.methods.targets import pattern_value, resolve, whole_modules


@dataclass(frozen=True)
class LowRank(Method):
    """One adapter on every targeted layer, and the head if the task brings a new one."""

    name: str = knob("lora", help="method")
    r: int = knob(8, help="rank; at most min(in, out) of every targeted layer", low=1, varies=True)
    alpha: Any = knob(16.0, help="a number, or a multiple of the rank such as 2r", above=0, varies=True)
    dropout: float = knob(0.0, help="on the adapter's input", low=0, high=0.95, varies=True)
    target_modules: Any = knob(
        "all-linear", varies=True,
        help="suffixes [query, value]; words of q k v o attention mlp all joined by +; all-linear; or a regex",
    )  # fmt: skip
    layers: list[int] | None = knob(None, help="indices of the blocks to adapt; null: all", varies=True)
    init: str = knob(
        "kaiming", help="how A starts; B starts at zero except for orthogonal",
        choices=("kaiming", "gaussian", "orthogonal"), varies=True,
    )  # fmt: skip
    use_rslora: bool = knob(False, help="scale by alpha / sqrt(r) instead of alpha / r", varies=True)
    rank_pattern: dict[str, int] = knob({}, help="r of the layers whose name ends like the key (a regex)", varies=True)
    alpha_pattern: dict[str, float] = knob({}, help="alpha of the layers whose name ends like the key", varies=True)
    modules_to_save: list[str] | None = knob(None, help="modules that train whole, beside a new head")
    match_parameters: int | None = knob(
        None, help="choose r so that the adapters train this many parameters; null: r as given", low=1, added="0.1.0",
        varies=True,
    )  # fmt: skip

    pack_group: ClassVar[str | None] = "lora"

    def __post_init__(self) -> None:
        """`2r` becomes its number here, so that a run's identity is the number."""
        alpha = self.alpha
        if isinstance(alpha, str):
            if (rule := alpha_rules.parse(alpha)) and rule.times_r and not rule.use_rslora:
                alpha = rule.alpha(self.r)
            else:
                try:
                    alpha = float(alpha)
                except ValueError:
                    return
        if isinstance(alpha, (int, float)) and not isinstance(alpha, bool):
            object.__setattr__(self, "alpha", float(alpha))

    def validate(self, key: str) -> None:
        if not isinstance(self.alpha, float):
            raise ConfigError(f"{key}.alpha", self.alpha, "a number above 0, or a multiple of the rank such as 2r")
        check_targets(key, self.target_modules, self.layers)
        for field, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                _check_regex(f"{key}.{field}", pattern)
        for field, bad in (("rank_pattern", [v for v in self.rank_pattern.values() if v < 1]),
                           ("alpha_pattern", [v for v in self.alpha_pattern.values() if not 0 < v < math.inf])):  # fmt: skip
            if bad:
                raise ConfigError(f"{key}.{field}", getattr(self, field), "values above 0")
        if self.match_parameters and self.rank_pattern:
            raise ConfigError(f"{key}.match_parameters", self.match_parameters, "null with method.rank_pattern")
        if self.init == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ConfigError(
                f"{key}.r", self.r, "even for init=orthogonal (half of the directions go to A, half to B)"
            )

    def plan(self, base: BaseInfo, *, seed: int) -> SlicePlan:
        modules = whole_modules(base, self.modules_to_save)
        layers = resolve(base, self.target_modules, self.layers, modules)
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field):
                if not any(pattern_value({pattern: True}, x.name, False) for x in layers):
                    raise ConfigError(f"method.{field}", getattr(self, field), f"{pattern!r} matches no targeted layer")
        return SlicePlan(seed=seed, adapters={x.name: self._spec(x) for x in layers}, modules=modules)

    def _spec(self, layer: LayerInfo) -> AdapterSpec:
        r = pattern_value(self.rank_pattern, layer.name, self.r)
        key = "method.r" if r == self.r else "method.rank_pattern"
        inputs, outputs = layer.in_features * layer.kernel, layer.out_features
        if r > min(inputs, outputs):
            raise ConfigError(key, r, f"at most {min(inputs, outputs)}: layer {layer.name} is {inputs}×{outputs}")
        if r % layer.groups:
            raise ConfigError(key, r, f"a multiple of {layer.groups}, the groups of layer {layer.name}")
        if self.init == "orthogonal" and layer.kind == "Conv2d":
            raise ConfigError("method.init", self.init, f"kaiming or gaussian: layer {layer.name} is a convolution")
        alpha = float(pattern_value(self.alpha_pattern, layer.name, self.alpha))
        scaling = alpha_rules.scaling(alpha, r, use_rslora=self.use_rslora)
        return AdapterSpec(r=r, scaling=scaling, alpha=alpha, dropout=self.dropout, init=self.init)

    def label(self) -> dict[str, Any]:
        target = self.target_modules
        return {
            "method": display_name(self.name, use_rslora=self.use_rslora), "r": self.r, "alpha": self.alpha,
            "targets": target if isinstance(target, str) else "+".join(target),
        }  # fmt: skip


def only(config: Any, layer: LayerInfo, kinds: tuple[str, ...], what: str) -> None:
    """For methods that not every layer can carry. Raises `ConfigError` for a layer of another kind."""
    if layer.kind not in kinds:
        allowed = f"{what} for method={config.name}; {layer.name} is {layer.kind}"
        raise ConfigError("method.target_modules", config.target_modules, allowed)


def linear_only(config: Any, layer: LayerInfo) -> None:
    """For methods that are defined on matrices."""
    only(config, layer, ("Linear", "Conv1D"), "linear layers")


def drawn_only(config: Any, layer: LayerInfo) -> None:
    """For methods in which A is what is drawn: an embedding's starts at zero."""
    only(config, layer, ("Linear", "Conv1D", "Conv2d"), "layers that are no embeddings")


@dataclass(frozen=True)
class FromWeight(LowRank):
    """LoRA's settings, on linear layers, without dropout: A and B start as a part of the weight (`adapters/variants.py`)."""

    def validate(self, key: str) -> None:
        super().validate(key)
        if self.dropout:
            name = self.label()["method"]
            raise ConfigError(f"{key}.dropout", self.dropout, f"0 for {name}: it would drop parts of the weight itself")

    def _spec(self, layer: LayerInfo) -> AdapterSpec:
        linear_only(self, layer)
        return super()._spec(layer)


def check_targets(key: str, target: Any, layers: list[int] | None, *, field: str = "target_modules") -> None:
    """Raise `ConfigError` unless this can name layers: a string, or a list of strings; and blocks by index or None."""
    names = target if isinstance(target, list) else [target]
    if not names or not all(isinstance(x, str) and x for x in names):
        raise ConfigError(f"{key}.{field}", target, "a non-empty list of names, or a string")
    _check_regex(f"{key}.{field}", target)
    if layers == []:
        raise ConfigError(f"{key}.layers", [], "indices of blocks, or null for all")


def _check_regex(key: str, pattern: Any) -> None:
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as e:
            raise ConfigError(key, pattern, f"a valid regular expression ({e})") from e
