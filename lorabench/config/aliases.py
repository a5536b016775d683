"""What other tools call a setting or a result. Pure: names in, our names out."""

from __future__ import annotations

from collections.abc import Sequence

# Our settings, and what others call them (lower case; W&B exports put `config.` or nothing in front, transformers' Trainer
# PEFT's settings under `peft_config.default.`).
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


def settings_of(names: Sequence[str]) -> dict[str, str]:
    """Setting -> column, for columns whose name is one of ours or of `ALIASES`; the first of several."""
    plain = {
        name: name.lower().strip().removeprefix("config.").removeprefix("peft_config.default.").replace(" ", "_")
        for name in names
    }
    found: dict[str, str] = {}
    for key, aliases in ALIASES.items():
        hits = [name for name, low in plain.items() if low == key or low in aliases]
        if hits:
            found[key] = hits[0]
    return found
