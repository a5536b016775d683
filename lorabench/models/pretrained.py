"""A transformers model in a folder: its layers on the meta device, its tokenizer, its weights as a frozen base."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorabench.config.contracts.model import Base, BaseInfo, HeadSpec
from lorabench.config.errors import ConfigError
from lorabench.models import checkpoint
from lorabench.models.chat import stop_tokens
from lorabench.models.checkpoint import CLASSIFIER_HEADS, Loading
from lorabench.models.folder import SOURCE_KEY, file_digest, fingerprint, processor_files, weight_files
from lorabench.models.inventory import inventory

ATTENTION = ("auto", "eager", "sdpa")
# Where a folder has no vocabulary, transformers makes one up of fewer special tokens than this, and says nothing.
MIN_VOCABULARY = 1000
_SKIPS_LAYERS = re.compile(r"layer_?drop|drop_?path")  # settings that drop whole layers, not features


def load_config(folder: Path, head: HeadSpec, dropout: float | None) -> Any:
    """Return the folder's configuration with the task's labels and the run's dropout. Raises `ConfigError`.

    dropout: None keeps the model's own.
    """
    from transformers import AutoConfig

    labels: dict[str, Any] = {}
    if head.label_names:
        names = dict(enumerate(head.label_names))
        labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        labels |= {"num_labels": len(names), "problem_type": "single_label_classification"}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **labels)
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(SOURCE_KEY, str(folder), f"transformers cannot read its config.json: {_first_line(e)}") from e
    if dropout is not None:
        set_dropout(config, dropout)
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        text.pad_token_id = None  # no row; the tokenizer's own takes its place
    return config


def set_dropout(config: Any, p: float) -> None:
    """Set every dropout probability of a configuration, of attention and classifier too, to `p`.

    Layer drop and stochastic depth are switched off by 0 and left alone by any other number.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            set_dropout(value, p)
        numeric = value is None or isinstance(value, (int, float)) and not isinstance(value, bool)
        if "drop" in name and numeric and (p == 0 or not _SKIPS_LAYERS.search(name)):
            setattr(config, name, p)


@lru_cache(maxsize=64)
def offered_attentions(folder: Path) -> tuple[str, ...]:
    """Return which of `eager` and `sdpa` a folder's model class offers, by what the class itself says.

    Raises `ConfigError` for a config.json that cannot be read.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    config = type(load_config(folder, HeadSpec("AutoModel"), None))
    for auto_class in (AutoModel, AutoModelForCausalLM):
        if config in auto_class._model_mapping:
            found: Any = auto_class._model_mapping[config]
            classes = found if isinstance(found, (tuple, list)) else (found,)
            return ("eager", "sdpa") if all(c._supports_sdpa for c in classes) else ("eager",)
    return ("eager",)


def build_empty(config: Any, head: HeadSpec) -> Any:
    """Return the model on the meta device: shapes without weights. Raises `ConfigError` where it cannot do the task."""
    import torch

    with quiet(), torch.device("meta"):
        return _auto_class(head, config).from_config(config)


def _auto_class(head: HeadSpec, config: Any) -> Any:
    """Return the transformers Auto class that a task asks for. Raises `ConfigError` for a model without such a head."""
    import transformers
    from transformers.models.auto import modeling_auto

    auto_class = getattr(transformers, head.auto_class)
    where, kind = config.name_or_path, type(config).__name__
    if type(config) not in auto_class._model_mapping:
        raise ConfigError(SOURCE_KEY, where, f"transformers has no {head.auto_class} for a {kind}")
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if head.auto_class == "AutoModelForCausalLM" and masked and not getattr(config, "is_decoder", False):
        raise ConfigError(SOURCE_KEY, where, f"{kind} reads in both directions; language modelling needs a decoder")
    return auto_class


def describe(folder: Path, head: HeadSpec, dropout: float | None) -> BaseInfo:
    """Return the layers of a base from its configuration and the headers of its weight files. Reads no weights.

    Raises `ConfigError` where the files are not what their configuration says.
    """
    model = build_empty(load_config(folder, head, dropout), head)
    return _checked_inventory(model, _described_loading(model, folder), folder, head)


def describe_config(folder: Path, head: HeadSpec, dropout: float | None) -> BaseInfo:
    """Return the layers of a base from its configuration alone: all but a classifier's head counts as trained."""
    model = build_empty(load_config(folder, head, dropout), head)
    new = {name for name, _ in model.named_parameters() if name.partition(".")[0] in CLASSIFIER_HEADS}
    return inventory(model, head=untrained_modules(model, new), output=_output_embedding(model))


def _checked_inventory(model: Any, loading: Loading, folder: Path, head: HeadSpec) -> BaseInfo:
    """Return the layers of a model, on the meta device or loaded, whose tensors were found as `loading` says.

    Raises `ConfigError` where anything but a head is new.
    """
    notes = checkpoint.check_tensors(model, loading)
    loading = checkpoint.without_foreign_labels(model, loading, labels_in(folder), head)
    notes += checkpoint.head_note(model, loading, head)
    untrained = untrained_modules(model, loading.untrained)
    return replace(inventory(model, head=untrained, output=_output_embedding(model)), notes=notes)


def labels_in(folder: Path) -> dict[Any, str]:
    """Return the labels that a folder's config.json names, by number; empty where it names none."""
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {})


def _described_loading(model: Any, folder: Path) -> Loading:
    """Return which tensors a model on the meta device would find in a folder's files, and which nobody would take.

    These are transformers' own loading rules, run on the meta device, so that renamed, fused, prefixed and tied weights
    count as it counts them.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    rules = LoadStateDictConfig(
        device_map={"": torch.device("meta")},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
    )
    with quiet():
        loading, _ = convert_and_load_state_dict_in_model(model, _tensors_on_meta(folder), rules)
        model.tie_weights(missing_keys=loading.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(loading)
    return _loading(loading.missing_keys, loading.mismatched_keys, loading.unexpected_keys)


def _loading(missing: Iterable[str], mismatched: Iterable[Any], unexpected: Iterable[str]) -> Loading:
    """Return transformers' own lists of tensors as ours. mismatched: (name, shape in the files, shape in the model)."""
    return Loading(frozenset(missing), frozenset(key for key, *_ in mismatched), frozenset(unexpected))


def _tensors_on_meta(folder: Path) -> dict[str, Any]:
    """Return every tensor of the weight files by name, on the meta device."""
    import torch
    from safetensors import safe_open

    tensors: dict[str, Any] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as f:
                names = list(f.keys())
                tensors |= {name: torch.empty(f.get_slice(name).get_shape(), device="meta") for name in names}
        except Exception as e:  # safetensors raises its own error class for a torn or foreign file
            raise ConfigError(SOURCE_KEY, str(path), f"not a readable safetensors file: {_first_line(e)}") from e
    return tensors


def untrained_modules(model: Any, missing: set[str]) -> tuple[str, ...]:
    """Return the largest modules whose parameters are all missing, and the classifier's last layer in any case.

    missing: names of parameters without weights.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = missing & names
    modules = {
        name
        for name, child in model.named_children()
        if name in CLASSIFIER_HEADS and any(True for _ in child.parameters())
    }
    for key in missing:
        parts = key.split(".")[:-1]
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        all_missing = (p for p in prefixes if {n for n in names if n.startswith(f"{p}.")} <= missing)
        modules.add(next(all_missing, ".".join(parts)))
    inner = {a for a in modules for b in modules if a != b and a.startswith(f"{b}.")}
    return tuple(sorted(modules - inner - {""}))


def _output_embedding(model: Any) -> tuple[str, ...]:
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return tuple(name for name, module in model.named_modules() if layer is not None and module is layer)


def load_tokenizer(folder: Path) -> Any:
    """Return the folder's tokenizer, padding on the right; the end token pads where there is no padding token.

    Raises `ConfigError`.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # tokenizers raise many kinds of errors for a missing or foreign file
        raise ConfigError(SOURCE_KEY, str(folder), f"its tokenizer does not load: {_first_line(e)}") from e
    if names := type(tokenizer).vocab_files_names.values():
        has_file = any((folder / name).is_file() for name in ("tokenizer.json", *names))
        if not has_file and len(tokenizer) < MIN_VOCABULARY:
            missing = " or ".join(dict.fromkeys(("tokenizer.json", *names)))
            reason = f"it holds no tokenizer (no {missing}): texts would be unknown tokens; save the base's own there"
            raise ConfigError(SOURCE_KEY, str(folder), reason)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(SOURCE_KEY, str(folder), "its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    _check_vocabulary(folder, tokenizer)
    return tokenizer


def _check_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Raise `ConfigError` where a tokenizer has ids, its padding token's too, without a row in the embedding table."""
    from transformers import AutoConfig

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return  # load_config says what is wrong with it
    rows = getattr(config.get_text_config(), "vocab_size", None)
    largest = max((*tokenizer.get_vocab().values(), tokenizer.pad_token_id))
    if not isinstance(rows, int) or largest < rows:
        return
    whose = f", its padding token's {tokenizer.pad_token_id} among them" if tokenizer.pad_token_id >= rows else ""
    reason = (
        f"its tokenizer has ids up to {largest}{whose}, its embedding table {rows} rows. Save it with a row for each: "
        f"model.resize_token_embeddings({largest + 1}) in transformers, or use the tokenizer it was trained with"
    )
    raise ConfigError(SOURCE_KEY, str(folder), reason)


CONVERSATION = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


def processor_fingerprint(folder: Path) -> str:
    """Return the SHA-256 over a processor's other files and its chat template as rendered for a fixed conversation.

    A template that asks for the date is given the format it asks with, so that the hash is the same every day.
    """
    tokenizer = load_tokenizer(folder)
    rendered = ""
    if getattr(tokenizer, "chat_template", None):
        try:
            rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, strftime_now=lambda form: form)
        except Exception as e:  # templates raise errors of their own; whether this one trains is not asked here
            rendered = f"{type(e).__name__}: {_first_line(e)}"
    parts = [rendered, *(f"{p.name} {file_digest(p)}" for p in processor_files(folder))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def end_tokens(model: Any, processor: Any) -> list[int]:
    """Return the tokens that end a reply: those the base stops at, and those a task ends its replies with."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return sorted({token for token in (*stops, *stop_tokens(processor)) if token is not None})


def load_base(folder: Path, head: HeadSpec, *, dropout: float | None, dtype: str, attention: str) -> Base:
    """Return a folder's model with its weights, frozen and in eval mode. Raises `ConfigError`.

    New heads are drawn from a fixed seed and leave the global generator alone.
    dropout: None keeps the model's own. dtype: float32, bfloat16 or float64. attention: eager or sdpa.
    """
    import torch

    config = load_config(folder, head, dropout)
    auto_class = _auto_class(head, config)
    tokenizer = load_tokenizer(folder)
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, loading = auto_class.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except ValueError as e:
        if "attention" not in str(e).lower():
            raise ConfigError(SOURCE_KEY, str(folder), _first_line(e)) from e
        raise ConfigError("model.attention", attention, f"this base does not offer it: {_first_line(e)}") from e
    tensors = _loading(loading["missing_keys"], loading["mismatched_keys"], loading["unexpected_keys"])
    info = _checked_inventory(model, tensors, folder, head)
    _draw_label_layers(model, tensors, folder, head)
    if dropout is not None:  # probabilities written into the code rather than the configuration
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
    model.eval().requires_grad_(False)
    for name in info.output:
        model.get_submodule(name).register_forward_pre_hook(_make_contiguous)
    return Base(model, tokenizer, info, fingerprint(folder), {"files": list(info.notes)} if info.notes else {})


def _draw_label_layers(model: Any, loading: Loading, folder: Path, head: HeadSpec) -> None:
    """Draw the layers anew that the files hold for other labels than the task's, from a fixed seed."""
    import torch

    all_new = checkpoint.without_foreign_labels(model, loading, labels_in(folder), head).untrained
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, layer in checkpoint.label_layers(model, head).items():
            if f"{name}.weight" in all_new - loading.untrained:
                layer.weight.normal_(0.0, getattr(model.config, "initializer_range", None) or 0.02)
                if layer.bias is not None:
                    layer.bias.zero_()


def _make_contiguous(head: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy hidden states out of which a decoder cut the last positions, before the output embedding reads them.

    Given such a view, torch copies a frozen weight once an example: gigabytes, and in bf16 on a CPU hundreds of times
    slower.
    """
    return (args[0].contiguous(), *args[1:])


@contextmanager
def quiet() -> Iterator[None]:
    """Keep load reports, progress bars and advice of transformers off the terminal. Its settings are put back after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
