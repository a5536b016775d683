"""Where training starts: every draw depends on (seed, name) alone, never on pack-mates, padding ranks or the device."""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.config.contracts.method import AdapterSpec


def draw_seed(seed: int, name: str, what: str) -> int:
    """Return the seed of one draw: 63 bits of the SHA-256 over the run's seed, the layer's name and what is drawn."""
    raw = hashlib.sha256(f"{seed}\0{name}\0{what}".encode()).digest()
    return int.from_bytes(raw[:8], "little") >> 1


def adapter_start(
    spec: AdapterSpec, seed: int, name: str, a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return (lora_A, lora_B) before training, float32 on the CPU, of shapes `a` [r, I, ...] and `b` [O, r, ...].

    PEFT's distributions: kaiming_uniform(a=sqrt 5), which is U(-1, 1) / sqrt(fan_in), and zeros; `gaussian`
    N(0, 1/r) by its standard deviation 1/r, and zeros; `orthogonal` both non-zero with B @ A = 0.
    """
    generator = torch.Generator().manual_seed(draw_seed(seed, name, "lora_A"))
    if spec.init == "orthogonal":
        return _orthogonal(a, b, generator)
    start = torch.empty(a)
    if spec.init == "gaussian":
        start.normal_(std=1 / a[0], generator=generator)
    else:
        bound = 1 / math.sqrt(math.prod(a[1:]))
        start.uniform_(-bound, bound, generator=generator)
    return start, torch.zeros(b)


def _orthogonal(a: tuple[int, ...], b: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a start with B @ A = 0 and neither of them zero, as PEFT does for an even r on a linear layer.

    Source: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
    """
    r = a[0]
    q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
    start_a = (torch.randn(a[1], r // 2, generator=generator) @ q[0::2]).T / 10
    start_b = torch.randn(r // 2, b[0], generator=generator).T @ q[1::2] / 10
    return start_a.contiguous(), start_b.contiguous()


def embedding_start(
    spec: AdapterSpec, seed: int, name: str, a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return PEFT's start of an embedding's adapter, whatever `init` says: A zeros, B standard normal."""
    generator = torch.Generator().manual_seed(draw_seed(seed, name, "lora_B"))
    return torch.zeros(a), torch.empty(b).normal_(generator=generator)


@torch.no_grad()
def weight_start(weight: Tensor, spec: AdapterSpec) -> tuple[Tensor, Tensor]:
    """Return (lora_A [r, I], lora_B [O, r]) as parts of a weight [O, I], float32, as PEFT takes them.

    pissa: scaling * B @ A are the r largest singular components; olora: B, A are the first r columns and rows of Q, R.
    """
    r = spec.r
    if spec.init == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:r] / spec.scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


Projections = dict[tuple[Any, ...], tuple[Tensor, Tensor]]  # by (r, seed, I, O, type, device)


def projection(known: Projections, spec: AdapterSpec, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return VeRA's frozen A [r, I] and B [O, r] for all layers, drawn as PEFT draws them: U(-b, b), b = sqrt(6 /
    fan_in).

    known: pairs drawn before, which are returned again; like: gives type and device.
    """
    found = (spec.r, *spec.projection, like.dtype, like.device)
    if found not in known:
        seed, inputs, outputs = spec.projection
        generator = torch.Generator().manual_seed(seed)
        pair = []
        for shape in ((spec.r, inputs), (outputs, spec.r)):
            bound = math.sqrt(6 / shape[1])
            pair.append(torch.empty(shape).uniform_(-bound, bound, generator=generator).to(like))
        known[found] = (pair[0], pair[1])
    return known[found]


@torch.no_grad()
def module_start(model: nn.Module, module: nn.Module, seed: int, name: str) -> dict[str, Tensor]:
    """Return fresh parameters of a module without pretrained weights, as its model would draw them; float32 on the CPU.

    The model's own `_init_weights` (transformers) where it covers a parameter, else torch's `reset_parameters`.
    Raises RuntimeError for a parameter neither covers.
    """
    fresh = copy.deepcopy(module).to(device="cpu", dtype=torch.float32)
    marked: list[Any] = [*fresh.modules(), *fresh.parameters()]
    for part in marked:
        part._is_hf_initialized = False  # else transformers 5 takes it for loaded and skips it
    for p in fresh.parameters():
        p.fill_(math.nan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed(seed, name, "module"))
        initialise = getattr(model, "_init_weights", None)
        if initialise is not None:
            fresh.apply(initialise)
        for part in fresh.modules():
            reset = getattr(part, "reset_parameters", None)
            if reset is not None and any(bool(p.isnan().any()) for p in part.parameters(recurse=False)):
                reset()
    for key_, p in fresh.named_parameters():
        if bool(p.isnan().any()):
            raise RuntimeError(f"no initialisation is known for {name}.{key_}: give its module a `reset_parameters`")
    return {k: p.detach().clone() for k, p in fresh.named_parameters()}
