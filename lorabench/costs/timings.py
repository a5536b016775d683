"""How long a finished run's weights take to load, to switch and to answer, beside its base: repeats on this machine.

Three copies of one base: the plain one; one that adapters are put on, which shares its weights; one that they are
merged into. Ways that are compared take turns, so that a machine busy with something else hits them alike.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorabench.adapters import inject
from lorabench.adapters.bank import Bank
from lorabench.adapters.files import load_slice
from lorabench.adapters.merge import merge
from lorabench.config.contracts.method import SlicePlan
from lorabench.config.contracts.model import BaseInfo
from lorabench.config.errors import ConfigError
from lorabench.training.saved_run import SavedRun

BATCHES = (1, 32)
WARM_UP = 2  # calls before the clock
FEW = 5  # repeats of what touches the disk or every weight
Use = Callable[[int], AbstractContextManager[Any]]
Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles of some seconds, and how many they are."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high), "n": len(values)}


@dataclass(frozen=True)
class Bench:
    """One base in three copies: `plain`, `served` (the same weights in modules of its own), `merged`."""

    plain: nn.Module
    served: nn.Module
    merged: nn.Module
    info: BaseInfo
    load: Spread  # seconds of loading it
    bytes: int  # of its weight files, else of its parameters


def open_bench(saved: SavedRun, dtype: str, repeats: int) -> Bench:
    """Return the base of a run, ready to be timed. Raises `ConfigError` where its files are gone or changed."""
    seconds = []
    for _ in range(min(repeats, 3)):
        start = time.monotonic()
        base = saved.base(dtype=dtype)
        seconds.append(time.monotonic() - start)
    model = base.model.eval()
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    size = sum(t.numel() * t.element_size() for t in model.parameters())
    if files := saved.run.model.weight_files():
        size = sum(path.stat().st_size for path in files)
    return Bench(model, copy.deepcopy(model, shared), copy.deepcopy(model), base.info, spread(seconds), size)


def disk_bytes(folder: Path) -> int:
    """Return the bytes of a saved slice's files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


@torch.no_grad()
def time_cell(
    b: Bench, folders: Sequence[Path], *, tokens: int, repeats: int, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Return the times of one cell. folders: its saved weights, then those to switch to. tick: after each of STEPS
    parts.

    Seconds: "load" from disk onto the base that is there, "switch" between two that are loaded, "merge" one out and
    another in; "latency" by batch size, of "plain", "served" and "merged", and their ratio in the same round.
    Full fine-tuning is never served beside its base: loading and switching write all weights.
    """
    slices = [load_slice(folder) for folder in folders]
    full = slices[0][1].full
    few = min(repeats, FEW)
    found: dict[str, Any] = {}
    found["load"] = spread(_time_loading_full(b, folders[0], few) if full else _time_loading(b, folders[0], few))
    tick()
    found["switch"] = spread(_time_switching_full(b, slices, few) if full else _time_switching(b, folders, repeats))
    tick()
    found["merge"] = None if full else spread(_time_merging(b, slices, few))
    tick()
    found["latency"] = {}
    for batch in BATCHES:
        found["latency"][str(batch)] = _time_answers(b, folders[0], slices[0], batch, tokens, repeats)
        tick()
    return found


STEPS = 3 + len(BATCHES)


# -- load and switch -------------------------------------------------------------------------------------------------


@contextmanager
def serve_slices(model: nn.Module, info: BaseInfo, folders: Sequence[Path]) -> Iterator[Use]:
    """Put saved slices on a base inside the block: in a bank where it takes their kind, else in one stack. Gives
    `use(k)`."""
    slices = [load_slice(folder) for folder in folders]
    if all(spec.kind == "lora" for _, plan in slices for spec in plan.adapters.values()):
        bank = Bank(model, info)
        for k, (state, plan) in enumerate(slices):
            bank.add(str(k), state, plan)
        try:
            with bank.use("0"):
                pass  # built here, not at the first answer
            yield lambda k: bank.use(str(k))
        finally:
            bank.close()
        return
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    switch: Callable[[str], None] | None = getattr(model, "set_attn_implementation", None)
    stack = inject(model, [_without_dropout(plan) for _, plan in slices], info=info)
    try:
        if attention is not None and switch is not None:
            switch(attention)  # eager is for training with dropout
        for k, (state, _) in enumerate(slices):
            stack.load_slice(k, state)
        yield lambda k: stack.active([k])
    finally:
        stack.remove()


def _without_dropout(plan: SlicePlan) -> SlicePlan:
    return replace(plan, adapters={name: replace(spec, dropout=0.0) for name, spec in plan.adapters.items()})


def _time_loading(b: Bench, folder: Path, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.monotonic()
        with serve_slices(b.served, b.info, [folder]):
            seconds.append(time.monotonic() - start)
    return seconds


def _time_switching(b: Bench, folders: Sequence[Path], repeats: int) -> list[float]:
    """Return the seconds of switching from one slice that is in use to another."""
    seconds = []
    with serve_slices(b.served, b.info, folders) as use:
        for k in range(WARM_UP + repeats):
            start = time.monotonic()
            with use(k % len(folders)):
                seconds.append(time.monotonic() - start)
    return seconds[WARM_UP:]


def _time_merging(b: Bench, slices: Sequence[tuple[Mapping[str, Tensor], SlicePlan]], repeats: int) -> list[float]:
    """Return the seconds of taking one slice out and merging another, with the originals kept, so that nothing adds
    up."""
    seconds, done = [], merge(b.merged, *slices[0], keep=True)
    for k in range(repeats):
        start = time.monotonic()
        done.unmerge()
        done = merge(b.merged, *slices[(k + 1) % len(slices)], keep=True)
        seconds.append(time.monotonic() - start)
    done.unmerge()
    return seconds


def _time_loading_full(b: Bench, folder: Path, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.monotonic()
        _write(b.merged, load_slice(folder)[0])
        seconds.append(time.monotonic() - start)
    _write(b.merged, b.plain.state_dict(keep_vars=True))
    return seconds


def _time_switching_full(
    b: Bench, slices: Sequence[tuple[Mapping[str, Tensor], SlicePlan]], repeats: int
) -> list[float]:
    seconds = []
    for k in range(repeats):
        start = time.monotonic()
        _write(b.merged, slices[k % len(slices)][0])
        seconds.append(time.monotonic() - start)
    _write(b.merged, b.plain.state_dict(keep_vars=True))
    return seconds


def _write(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ConfigError("adapter", f"{name} {list(tensor.shape)}", "tensors that fit this base")
        own[name].copy_(tensor)


# -- latency ---------------------------------------------------------------------------------------------------------


def _time_answers(
    b: Bench, folder: Path, own: tuple[Mapping[str, Tensor], SlicePlan], batch: int, tokens: int, repeats: int
) -> dict[str, Spread]:
    """Return the seconds of one forward pass over `batch` texts of `tokens` tokens."""
    given = random_texts(b.plain, batch, tokens)
    done = merge(b.merged, *own, keep=True)
    try:
        ways: dict[str, Callable[[], Any]] = {"plain": lambda: b.plain(**given), "merged": lambda: b.merged(**given)}
        if own[1].full:
            return _summary(time_in_turns(ways, repeats))
        with serve_slices(b.served, b.info, [folder]) as use, use(0):
            return _summary(time_in_turns({**ways, "served": lambda: b.served(**given)}, repeats))
    finally:
        done.unmerge()


def random_texts(model: nn.Module, batch: int, tokens: int) -> dict[str, Tensor]:
    """Return token ids drawn at random, without padding. Raises `ConfigError` for a base that reads no text."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size, limit = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if not size:
        raise ConfigError("sweep", type(model).__name__, "bases that read text: costs are measured on token ids")
    shape = (batch, min(tokens, limit or tokens))
    ids = torch.randint(0, size, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def time_in_turns(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round; who goes first changes from round to round."""
    names, seconds = list(ways), {name: list[float]() for name in ways}
    for i in range(-WARM_UP, repeats):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            start = time.monotonic()
            ways[name]()
            if i >= 0:
                seconds[name].append(time.monotonic() - start)
    return seconds


def _summary(seconds: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """Return the spread of each way, and of the ratios of rounds: what serving costs beside merged weights."""
    found = {name: spread(values) for name, values in seconds.items()}
    if "served" in seconds:
        found["ratio"] = spread([a / b for a, b in zip(seconds["served"], seconds["merged"], strict=True)])
    return found
