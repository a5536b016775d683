"""What other tools call our settings."""

from __future__ import annotations

from collections.abc import Sequence

# Our settings, and what others call them, in lower case and without the prefixes below.
ALIASES: dict[str, tuple[str, ...]] = {
    "method.name": ("method", "peft_type", "adapter", "tuner"),
    "method.r": ("r", "rank", "lora_r", "lora_rank"),
    "method.alpha": ("alpha", "lora_alpha"),
    "method.dropout": ("dropout", "lora_dropout"),
    "method.target_modules": ("target_modules", "targets", "modules"),
    "method.use_rslora": ("use_rslora", "rslora"),
    "method.use_dora": ("use_dora",),
    "optimizer.lr": ("lr", "learning_rate"),
    "optimizer.weight_decay": ("weight_decay",),
    "trainer.batch_size": ("batch_size", "per_device_train_batch_size", "train_batch_size"),
    "trainer.max_steps": ("max_steps", "steps", "total_steps", "global_step"),
    "trainer.max_epochs": ("epochs", "num_train_epochs"),
    "model.name": (
        "model",
        "base_model",
        "model_name",
        "base_model_name_or_path",
        "model_name_or_path",
        "_name_or_path",
    ),
    "task.name": ("task", "dataset", "dataset_name", "task_name"),
    "seed": ("seed",),
    "status": ("status", "state"),
}


# W&B's exports put the first in front of a setting, transformers' Trainer the second in front of PEFT's.
_PREFIXES = ("config.", "peft_config.default.")


def match_columns(columns: Sequence[str]) -> dict[str, str]:
    """Return setting to column, for the columns named like a setting or one of its aliases; of several the first."""
    plain = {column: _plain_name(column) for column in columns}
    matched: dict[str, str] = {}
    for setting, aliases in ALIASES.items():
        columns_of_it = [column for column, name in plain.items() if name == setting or name in aliases]
        if columns_of_it:
            matched[setting] = columns_of_it[0]
    return matched


def _plain_name(column: str) -> str:
    name = column.lower().strip()
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name.replace(" ", "_")
