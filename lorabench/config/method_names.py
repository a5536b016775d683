"""What tables, figures and texts call the methods, and in which order they stand there."""

from __future__ import annotations

LORA, RSLORA = "LoRA", "rsLoRA"
DORA, RSDORA = "DoRA", "rsDoRA"
LORA_PLUS, LORA_FA, PISSA, OLORA, VERA, IA3 = "LoRA+", "LoRA-FA", "PiSSA", "OLoRA", "VeRA", "IA3"
BITFIT, HEAD_ONLY, FULL = "BitFit", "head only", "full"

PLAIN_LORA = (LORA, RSLORA)  # one method under two scalings
ORDER = (LORA, RSLORA, LORA_PLUS, LORA_FA, DORA, RSDORA, PISSA, OLORA, VERA, IA3, BITFIT, HEAD_ONLY, FULL)

_BY_MODULE = {
    "lora": LORA,
    "loraplus": LORA_PLUS,
    "lorafa": LORA_FA,
    "dora": DORA,
    "pissa": PISSA,
    "olora": OLORA,
    "vera": VERA,
    "ia3": IA3,
    "bitfit": BITFIT,
    "head": HEAD_ONLY,
    "full": FULL,
}
_UNDER_RSLORA = {"lora": RSLORA, "dora": RSDORA}


def display_name(name: str, *, use_rslora: bool = False) -> str:
    """Return what a method is called. name: `method.name`; one that is not known here is its own name."""
    shown = _BY_MODULE.get(name, name)
    return _UNDER_RSLORA.get(name, shown) if use_rslora else shown


def in_words(method: str) -> str:
    """Return a display name as a sentence has it: `full fine-tuning` for `full`."""
    return "full fine-tuning" if method == FULL else method
