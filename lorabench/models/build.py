"""From a model's folder to a frozen base, or to its layers on the meta device. Transformers is known here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorabench.config.contracts.model import Base, BaseInfo, HeadSpec
from lorabench.config.errors import ConfigError
from lorabench.models import folder as files
from lorabench.models.inventory import inventory

ATTENTION = ("auto", "eager", "sdpa")
HEADS = ("classifier", "score")  # what a classifier's last layer is called; trained always, as in PEFT
EMPTY = 1000  # tokens: where a folder has no vocabulary transformers makes one up of special tokens, and says nothing
DEPTH = re.compile(r"layer_?drop|drop_?path")  # whole layers skipped: another thing than dropping features


def load_config(folder: Path, head: HeadSpec, dropout: float | None) -> Any:
    """The folder's configuration with the task's labels and this run's dropout. Raises `ConfigError`."""
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
        raise ConfigError(files.KEY, str(folder), f"transformers cannot read its config.json: {_first_line(e)}") from e
    if dropout is not None:
        set_dropout(config, dropout)
    return config


def set_dropout(config: Any, p: float) -> None:
    """Set every dropout probability of a configuration, of attention and classifier too, to `p`.

    Layer drop and stochastic depth are switched off by 0 and left alone by any other number.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            set_dropout(value, p)
        numeric = value is None or isinstance(value, (int, float)) and not isinstance(value, bool)
        if "drop" in name and numeric and (p == 0 or not DEPTH.search(name)):
            setattr(config, name, p)


def empty_model(config: Any, head: HeadSpec) -> Any:
    """The model on the meta device: shapes, no weights. Raises `ConfigError` when the base cannot do the task."""
    import torch

    with quiet(), torch.device("meta"):
        return _auto(head, config).from_config(config)


def _auto(head: HeadSpec, config: Any) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto

    auto = getattr(transformers, head.auto_class)
    where, kind = config.name_or_path, type(config).__name__
    if type(config) not in auto._model_mapping:
        raise ConfigError(files.KEY, where, f"transformers has no {head.auto_class} for a {kind}")
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if head.auto_class == "AutoModelForCausalLM" and masked and not getattr(config, "is_decoder", False):
        raise ConfigError(files.KEY, where, f"{kind} reads in both directions; language modelling needs a decoder")
    return auto


def describe(folder: Path, head: HeadSpec, dropout: float | None) -> BaseInfo:
    """The layers of a base, from its configuration and the headers of its weight files: no weights are read."""
    model = empty_model(load_config(folder, head, dropout), head)
    return inventory(model, head=untrained(model, _missing(model, folder)), output=_output(model))


def _missing(model: Any, folder: Path) -> set[str]:
    """Names of parameters the checkpoint lacks or holds in another shape: transformers' own loading rules, run on the
    meta device, so that renamed, fused, prefixed and tied weights count as it counts them."""
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    how = LoadStateDictConfig(
        device_map={"": torch.device("meta")}, ignore_mismatched_sizes=True, dtype=torch.float32,
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
    )  # fmt: skip
    with quiet():
        found, _ = convert_and_load_state_dict_in_model(model, _headers(folder), how)
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(found)
    return set(found.missing_and_mismatched())


def _headers(folder: Path) -> dict[str, Any]:
    """Every tensor of the weight files by name, on the meta device."""
    import torch
    from safetensors import safe_open

    held: dict[str, Any] = {}
    for path in files.weight_files(folder):
        try:
            with safe_open(path, framework="pt") as f:
                names = list(f.keys())
                held |= {name: torch.empty(f.get_slice(name).get_shape(), device="meta") for name in names}
        except Exception as e:  # safetensors raises its own error class for a torn or foreign file
            raise ConfigError(files.KEY, str(path), f"not a readable safetensors file: {_first_line(e)}") from e
    return held


def untrained(model: Any, missing: set[str]) -> tuple[str, ...]:
    """The largest modules whose parameters are all in `missing`, and the classifier's last layer in any case.

    Raises `ConfigError` when the body itself has no weights.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = missing & own
    body = {name for name in own if name.startswith(f"{model.base_model_prefix}.")} or own  # a bare body has no prefix
    if own and missing >= body:
        why = f"its weight files hold none of the weights of {type(model).__name__}"
        raise ConfigError(files.KEY, model.name_or_path, why)
    found = {name for name, child in model.named_children() if name in HEADS and any(True for _ in child.parameters())}
    for key in missing:
        parts = key.split(".")[:-1]
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        found.add(next((p for p in prefixes if {n for n in own if n.startswith(f"{p}.")} <= missing), ".".join(parts)))
    inside = {a for a in found for b in found if a != b and a.startswith(f"{b}.")}
    return tuple(sorted(found - inside - {""}))


def _output(model: Any) -> tuple[str, ...]:
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return tuple(name for name, module in model.named_modules() if layer is not None and module is layer)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, padding on the right; where it has no padding token the end token pads."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # tokenizers raise many kinds of errors for a missing or foreign file
        raise ConfigError(files.KEY, str(folder), f"its tokenizer does not load: {_first_line(e)}") from e
    if names := type(tokenizer).vocab_files_names.values():
        there = any((folder / name).is_file() for name in ("tokenizer.json", *names))
        if not there and len(tokenizer) < EMPTY:
            own = " or ".join(dict.fromkeys(("tokenizer.json", *names)))
            why = f"it holds no tokenizer (no {own}): texts would be unknown tokens; save the base's own there"
            raise ConfigError(files.KEY, str(folder), why)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(files.KEY, str(folder), "its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def end_tokens(model: Any, processor: Any) -> list[int]:
    """Tokens that end a reply: what the base stops at, and what a task ends its replies with."""
    own = model.generation_config.eos_token_id
    found = own if isinstance(own, list) else [own]
    return sorted({x for x in (*found, processor.eos_token_id) if x is not None})


def load_base(folder: Path, head: HeadSpec, *, dropout: float | None, dtype: str, attention: str) -> Base:
    """Weights read, frozen, in eval mode. New heads are drawn from a fixed seed and leave the global generator alone.

    dtype: float32, bfloat16 or float64. attention: eager or sdpa. Raises `ConfigError`.
    """
    import torch

    config = load_config(folder, head, dropout)
    auto = _auto(head, config)
    tokenizer = load_tokenizer(folder)
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, found = auto.from_pretrained(
                folder, config=config, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False,
                local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True, **options,
            )  # fmt: skip
    except ValueError as e:
        if "attention" not in str(e).lower():
            raise ConfigError(files.KEY, str(folder), _first_line(e)) from e
        raise ConfigError("model.attention", attention, f"this base does not offer it: {_first_line(e)}") from e
    missing = set(found["missing_keys"]) | {key for key, *_ in found["mismatched_keys"]}
    if dropout is not None:  # probabilities written into the code rather than the configuration
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
    model.eval().requires_grad_(False)
    info = inventory(model, head=untrained(model, missing), output=_output(model))
    for name in info.output:
        model.get_submodule(name).register_forward_pre_hook(_in_one_piece)
    return Base(model, tokenizer, info, files.fingerprint(folder))


def _in_one_piece(head: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A decoder cuts the last positions out of its hidden states; given such a view, torch copies a frozen weight once an
    example (on a CPU in bf16 hundreds of times slower, and the copies are gigabytes)."""
    return (args[0].contiguous(), *args[1:])


@contextmanager
def quiet() -> Iterator[None]:
    """Load reports, progress bars and advice of transformers stay off the terminal; its settings are put back."""
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
