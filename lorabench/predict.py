"""`python -m lorabench.predict <run or sweep dir> "text"`: a trained run on texts of yours, beside what the base alone says."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.errors import ConfigError
from lorabench.runtime.command import command
from lorabench.runtime.terminal import make_console, plain, say

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from lorabench.config.contracts.model import Base
    from lorabench.training.saved_run import SavedRun

BATCH = 32


@dataclass(frozen=True)
class Answer:
    """What base and trained run say to one text: a reply, or (label, probability) pairs, most probable first."""

    text: str
    base: str | list[tuple[str, float]]
    trained: str | list[tuple[str, float]]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m lorabench.predict", description="Classify or reply, base and trained run side by side."
    )
    p.add_argument(
        "run",
        type=Path,
        help="a run's directory, <sweep>/runs/<run_id>, or a sweep's: the best confirmed run of its recommended cell",
    )
    p.add_argument(
        "text",
        nargs="+",
        help="texts; - reads one a line from standard input; where two texts make an example, both with a tab between",
    )
    p.add_argument("--cell", help="of a sweep, another cell than the recommended one: its id, or its name in tables")
    p.add_argument("--top", type=int, default=3, help="labels shown a text (default 3)")
    p.add_argument("--max-new-tokens", type=int, default=48, help="longest reply (default 48)")
    p.add_argument(
        "--trust", action="store_true", help="let Python files run that the record names (local, extra_metrics)"
    )
    return p


def predict(saved: SavedRun, texts: Sequence[str], *, max_new_tokens: int = 48) -> list[Answer]:
    """Return answers in the order of the texts, in the types and with the attention the run was evaluated with.

    The base answers from the run's own start: nothing is trained, adapters add nothing, and a classification head is at
    its initial draw. Raises `ConfigError` for texts that are empty or too long, and runs that neither classify nor
    reply.
    """
    import torch

    from lorabench.adapters import inject

    kinds: dict[str, Callable[..., Iterator[Any]]]
    kinds = {"AutoModelForSequenceClassification": _classify, "AutoModelForCausalLM": _reply}
    answer = kinds.get(saved.head.auto_class)
    if answer is None or not saved.run.task.reads_text:
        raise ConfigError(
            "run", str(saved.path), f"a run that classifies text or writes it; this one is {saved.head.auto_class}"
        )
    empty = [t for t in texts if not t.strip()]
    if empty or not texts:
        raise ConfigError("text", empty[0] if empty else "", "some words")
    lone = [t for t in texts if _is_paired(saved) and not all(part.strip() for part in t.partition("\t")[::2])]
    if lone:
        raise ConfigError("text", lone[0], "two texts with a tab between them: this run was trained on pairs")
    state, plan = saved.weights()
    base = saved.base(dtype=saved.record.provenance.get("base_dtype", "float32"))
    stack = inject(base.model, [plan], info=base.info)
    base.model.eval()
    with torch.no_grad():
        before = list(answer(saved, base, texts, max_new_tokens))
        try:
            stack.load_slice(0, state)
        except ValueError as e:
            raise ConfigError("run", str(saved.path), f"weights that fit the base: {e}") from e
        after = list(answer(saved, base, texts, max_new_tokens))
    return [Answer(*row) for row in zip(texts, before, after, strict=True)]


def _is_paired(saved: SavedRun) -> bool:
    """Whether an example is two texts."""
    return saved.run.task.paired


def _classify(saved: SavedRun, base: Base, texts: Sequence[str], _: int) -> Iterator[list[tuple[str, float]]]:
    from lorabench.tasks.encoding import model_inputs

    task, names = saved.run.task, saved.head.label_names
    parts = [text.partition("\t")[::2] if _is_paired(saved) else (text, None) for text in texts]
    for i in range(0, len(texts), BATCH):
        examples = [task.encode_text(text, base.processor, pair) for text, pair in parts[i : i + BATCH]]
        logits: Tensor = base.model(**model_inputs(task.collate(examples, base.processor))).logits
        for row in logits.double().softmax(-1).tolist():
            yield sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])


def _reply(saved: SavedRun, base: Base, texts: Sequence[str], max_new_tokens: int) -> Iterator[str]:
    """Give greedy replies, one text at a time: without padding, so that neighbours cannot change them."""
    import torch

    from lorabench.models.pretrained import end_tokens, quiet

    model: Any = base.model
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for text in texts:
        ids = torch.as_tensor(saved.run.task.encode_text(text, base.processor)["input_ids"], dtype=torch.int64)[None]
        if limit is not None and ids.shape[1] + max_new_tokens > limit:
            raise ConfigError(
                "--max-new-tokens",
                max_new_tokens,
                f"at most {max(limit - ids.shape[1], 0)} after this text; the base reads {limit} tokens",
            )
        with quiet():  # its advice about sampling settings that greedy decoding does not use
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=base.processor.pad_token_id,
                eos_token_id=end_tokens(model, base.processor),
            )
        yield base.processor.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def table(saved: SavedRun, answers: Sequence[Answer], *, top: int) -> Table:
    """Return a table of base and trained run side by side; texts are shown as text, whatever they contain."""
    from rich.table import Table

    labels = bool(saved.head.label_names)
    made = Table(show_lines=True)
    made.add_column("text", overflow="fold", ratio=2)
    made.add_column(
        plain(f"{saved.run.model.name}, head at its initial draw" if labels else f"{saved.run.model.name} alone"),
        overflow="fold",
        ratio=2,
    )
    made.add_column(plain(f"with {saved.label}"), overflow="fold", ratio=2)
    if labels:
        made.caption = "The base alone has no trained head for these labels: its column is what training started from, not what it knows."
    for a in answers:
        made.add_row(*(plain(x) for x in (a.text, _answer_text(a.base, top), _answer_text(a.trained, top))))
    return made


def _answer_text(answer: str | list[tuple[str, float]], top: int) -> str:
    if isinstance(answer, str):
        return answer or "(nothing)"
    return "\n".join(f"{p:6.1%}  {label}" for label, p in answer[:top])


def _texts(arguments: Sequence[str]) -> list[str]:
    texts: list[str] = []
    for argument in arguments:
        if len(argument) < 200 and os.path.isfile(argument):
            raise ConfigError("text", argument, "a text; this names a file, whose lines are read with - < FILE")
        texts += [line.strip() for line in sys.stdin if line.strip()] if argument == "-" else [argument]
    return texts


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Exit 0: answered; 2: bad input."""
    args = parser().parse_args(argv)
    for name in ("top", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ConfigError("--" + name.replace("_", "-"), getattr(args, name), "at least 1")
    from lorabench.results.best_run import best_run
    from lorabench.training.saved_run import open_run

    found = best_run(args.run, args.cell)
    saved = open_run(found.path, trust=args.trust)
    if found.why:
        say(f"taken from sweep {args.run.resolve().name}: {found.why}")
    answers = predict(saved, _texts(args.text), max_new_tokens=args.max_new_tokens)
    make_console().print(table(saved, answers, top=args.top))


if __name__ == "__main__":
    sys.exit(main())
