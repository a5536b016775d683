"""What every model, task and method inherits: defaults that are no settings, and names that tables know."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lorabench.config.components import component_names, load_component
from lorabench.config.contracts.component import Component, attribute
from lorabench.config.errors import ConfigError
from lorabench.config.fields import field_dict
from lorabench.config.method_names import ORDER, display_name, in_words


@dataclass(frozen=True)
class Contract(Component):
    @attribute
    def size(self) -> int:
        return 3

    @attribute
    def doubled(self) -> int:
        return 2 * self.size


def test_a_default_is_no_setting() -> None:
    @dataclass(frozen=True)
    class Config(Contract):
        name: str = "x"

    assert (Config().size, Config().doubled) == (3, 6)
    assert dataclasses.asdict(Config()) == field_dict(Config(), role="identity") == {"name": "x"}


def test_a_field_a_class_variable_or_a_property_replaces_a_default() -> None:
    @dataclass(frozen=True)
    class Field(Contract):
        size: int = 5

    @dataclass(frozen=True)
    class Required(Contract):
        size: int

    @dataclass(frozen=True)
    class Variable(Contract):
        size: ClassVar[int] = 5

    @dataclass(frozen=True)
    class Property(Contract):
        @property
        def size(self) -> int:
            return 5

    assert {x.doubled for x in (Field(), Required(5), Variable(), Property())} == {10}
    assert field_dict(Field(), role="identity") == {"size": 5} and field_dict(Variable(), role="identity") == {}
    with pytest.raises(TypeError, match="size"):
        Required()  # type: ignore[call-arg]
    assert Field().replace(size=7) == Field(7)


HEAD = """
from dataclasses import dataclass
from lorabench.config.contracts.model import Model

@dataclass(frozen=True)
"""
BODY = """
    file: str
    kind: str = "local"
    name: str = "mine"
"""
METHODS = "".join(f"    def {name}(self, *_, **__): ...\n" for name in ("info", "processor", "load", "fingerprint"))


def load_model(tmp_path: Path, bases: str, body: str = BODY + METHODS) -> Any:
    path = tmp_path / "mine.py"
    path.write_text(f"{HEAD}class Config{bases}:{body}")
    config: Any = load_component("model", "local", str(path))
    return config(file=str(path))


@pytest.mark.parametrize("bases", ["", "(Model)"])
def test_a_model_of_the_users_own_has_the_defaults(tmp_path: Path, bases: str) -> None:
    model = load_model(tmp_path, bases)
    assert (model.source, model.dropout, model.attention) == ("", None, "auto")
    assert model.local_file == str(tmp_path / "mine.py")
    assert list(dataclasses.asdict(model)) == ["file", "kind", "name"]
    model.validate("model")


def test_a_model_that_inherits_the_contract_must_define_its_methods(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.file=.*: its Config must define fingerprint"):
        load_model(tmp_path, "(Model)", BODY + METHODS.replace("def fingerprint", "def other"))


def test_every_method_has_a_display_name_and_a_place_in_tables() -> None:
    for name in component_names("method"):
        config: Any = load_component("method", name, None)
        method = config()
        assert method.label()["method"] == display_name(name) in ORDER, name
        assert set(method.label()) == {"method", "r", "alpha", "targets"}, name
        assert method.r == (method.label()["r"] or 0), name


def test_names_under_rslora_and_in_sentences() -> None:
    assert [display_name(name, use_rslora=True) for name in ("lora", "dora", "pissa")] == ["rsLoRA", "rsDoRA", "PiSSA"]
    assert (display_name("new"), in_words("full"), in_words("LoRA")) == ("new", "full fine-tuning", "LoRA")
