"""Any transformers model: from a package, a local folder, or a hub by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.config.contracts.model import Base, BaseInfo, HeadSpec, Model
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.models import pretrained
from lorabench.models.folder import ALLOWED_SOURCES, fingerprint, model_folder, weight_files


@dataclass(frozen=True)
class Config(Model):
    """A base by its files. Only safetensors weights are read and no code of a model's own is run."""

    source: str = knob(help="package:<module>/<folder>, a local folder, or a hub id")
    kind: str = knob("transformers", help="how the base is loaded", choices=("transformers",))
    name: str = knob("base", help="what tables call it")
    revision: str | None = knob(None, help="branch, tag or commit of a hub id; null: its main branch")
    dropout: float | None = knob(None, help="every dropout of the base; null keeps the base's own", low=0, high=0.9)
    attention: str = knob("auto", help="auto: by device and length", choices=pretrained.ATTENTION)

    def validate(self, key: str) -> None:
        if not self.source.strip():
            raise ConfigError(f"{key}.source", self.source, f"allowed: {ALLOWED_SOURCES}")

    def folder(self) -> Path:
        """Return where the files are. Raises `ConfigError`."""
        return model_folder(self.source, self.revision)

    def info(self, head: HeadSpec) -> BaseInfo:
        return pretrained.describe(self.folder(), head, self.dropout)

    def processor(self) -> Any:
        """Return the tokenizer, padding on the right."""
        return pretrained.load_tokenizer(self.folder())

    def load(self, head: HeadSpec, *, dtype: str = "float32", attention: str = "eager") -> Base:
        return pretrained.load_base(self.folder(), head, dropout=self.dropout, dtype=dtype, attention=attention)

    def processor_fingerprint(self) -> str:
        """Return the SHA-256 over the processor's other files and its chat template as rendered."""
        return pretrained.processor_fingerprint(self.folder())

    def attentions(self) -> tuple[str, ...]:
        """Return which of `eager` and `sdpa` the model's class offers."""
        return pretrained.offered_attentions(self.folder())

    def weight_files(self) -> Sequence[Path]:
        return weight_files(self.folder())

    def transformers_folder(self) -> Path:
        """Return where the files are. Raises `ConfigError`."""
        return self.folder()

    def fingerprint(self) -> str:
        """Return the SHA-256 over the content of weights, configuration and tokenizer."""
        return fingerprint(self.folder())
