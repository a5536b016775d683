"""What of a command line or an error may be written down: secrets are masked by name and by value.

A value is a secret's where the environment holds it under a secret's name, such as HF_TOKEN or AWS_SECRET_ACCESS_KEY.
"""

from __future__ import annotations

import os
import re

MASK = "***"
MIN_CHARACTERS = 8  # of a value: a shorter one would mask words that only look like it
_WORDS = r"(?:API_?|ACCESS_?|SECRET_?)?KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL"
_SECRET_NAME = re.compile(rf"(?:^|_)(?:{_WORDS})S?(?:_|$)", re.IGNORECASE)
_SECRET_SETTING = re.compile(
    r"hydra\.launcher\.setup|(?:.*[._])?(?:(?:api|access|secret)_?key|token|secret|password|passwd|credentials?)",
    re.IGNORECASE,
)
_ASSIGNMENT = re.compile(rf"(\b[A-Z0-9_]*(?:{_WORDS})[A-Z0-9_]*=).*", re.DOTALL)


def mask_values(text: str) -> str:
    """Return a text without the values that the environment holds under a secret's name."""
    values = {v for k, v in os.environ.items() if _SECRET_NAME.search(k) and len(v) >= MIN_CHARACTERS}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    return text


def mask_word(word: str) -> str:
    """Return a word of a command line as it may be shown.

    A launcher's `setup` and a setting with a secret's name lose their whole value, any other what follows the
    assignment of a variable with a secret's name.
    """
    key, equals, value = word.partition("=")
    if equals and value and _SECRET_SETTING.fullmatch(key.lstrip("+~")):
        return f"{key}={MASK}"
    return mask_values(_ASSIGNMENT.sub(rf"\1{MASK}", word))
