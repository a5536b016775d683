"""A base cut over processes (gloo, CPU): what each holds, and the numbers of one process for every kind of run."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fixtures.packs import assert_same, numbers, two_slices
from fixtures.runs import WORDS, make_base, make_data, make_decoder, make_run
from lorabench.config.runs import Pack, RunConfig
from lorabench.store import checkpoints
from lorabench.store.records import Record, Store
from lorabench.sweep.ranks import free_port, train
from lorabench.training import distributed, fsdp
from lorabench.training.train import Listener, check_isolation, open_session

pytestmark = pytest.mark.slow
CUT = {"trainer.devices": 2, "trainer.strategy": "fsdp"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shards")
    pairs, text = root / "pairs.jsonl", root / "text.txt"
    said = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(2, 5 + i % 6)) for i in range(400)]
    pairs.write_text(
        "".join(
            json.dumps({"prompt": f"{s} {i}", "reply": f"dog {WORDS[i % 3]} cat"}) + "\n" for i, s in enumerate(said)
        )
    )
    text.write_text("\n\n".join(f"{s} {i}" for i, s in enumerate(said)))
    decoders = {kind: make_decoder(root / kind, kind) for kind in ("gpt2", "llama")}
    bert = make_base(root / "bert", "bert", dropout=0.1)
    return {
        **decoders,
        "bert": bert,
        "data": make_data(root / "data.csv", rows=149),
        "other": make_data(root / "other.csv", rows=130),
        "pairs": pairs,
        "text": text,
    }


def both(packs: list[tuple[RunConfig, ...]], tmp_path: Path) -> tuple[Store, Store, list[Record], list[Record]]:
    """A pack in one process, the same in two."""
    stores = Store(tmp_path / "alone"), Store(tmp_path / "cut")
    one, two = (train(Pack("p0", pack), store) for pack, store in zip(packs, stores, strict=True))
    for record in two:
        assert record.status == "completed", record.provenance
        assert record.provenance["base_bytes_by_rank"] and record.provenance["devices"] == 2
    return *stores, one, two


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer.part_tokens": 64, "trainer.accumulate_grad_batches": 2, "trainer.gradient_checkpointing": True},
        {"method.name": "bitfit"},
        {"method.name": "dora", "method.target_modules": ["query", "dense"]},
        {"method.name": "pissa", "model.dropout": 0.0},
        {"method.name": "head", "trainer.early_stopping_patience": 1, "optimizer.lr": 1e-4},
        {"method.layers": [1], "model.dropout": 0.0},
    ],
    ids=["parts", "bitfit", "dora", "pissa", "head", "layers"],
)
def test_every_kind_of_run_is_that_of_one_process(
    places: dict[str, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    parts, settings = (places["bert"], places["data"]), {"trainer.max_steps": 20, "model.dropout": 0.1, **changes}
    packs = [(make_run(*parts, role="confirm", **settings, **more),) for more in ({}, CUT)]
    if "method.name" not in changes:
        packs = [two_slices(parts, 1, **changes), two_slices(parts, 2, **changes, **{"trainer.strategy": "fsdp"})]
    a, b, one, two = both(packs, tmp_path)
    for x, y in zip(one, two, strict=True):
        assert_same(a, b, x, y)


def test_a_process_may_hold_nothing_of_a_small_tensor(places: dict[str, Path], tmp_path: Path) -> None:
    """Four processes, a head whose weights have two rows; several parts a step, each summed into the shares."""
    settings = {"method.name": "full", "optimizer.lr": 1e-3, "trainer.max_steps": 8, "trainer.part_tokens": 16,
                "trainer.accumulate_grad_batches": 2, "trainer.gradient_checkpointing": True, "model.dropout": 0.1}  # fmt: skip
    packs = [
        (make_run(places["bert"], places["data"], role="confirm", **settings, **more),)
        for more in ({}, {**CUT, "trainer.devices": 4})
    ]
    stores = Store(tmp_path / "alone"), Store(tmp_path / "cut")
    (one,), (two,) = (train(Pack("p0", pack), store) for pack, store in zip(packs, stores, strict=True))
    assert_same(*stores, one, two)
    assert len(set(two.provenance["base_bytes_by_rank"])) > 1


@pytest.mark.parametrize(("kind", "method"), [("gpt2", "lora"), ("llama", "lora"), ("gpt2", "full")])
def test_what_is_measured_beside_the_test_is_that_of_one_process(
    places: dict[str, Path], tmp_path: Path, kind: str, method: str
) -> None:
    """Replies (as many steps as the slowest needs), forgetting, samples; GPT-2's embeddings are its output layer, too."""
    task = {"kind": "causal_lm", "name": "chat", "source": "file", "file": str(places["pairs"]), "prompt_column": "prompt",
            "response_column": "reply", "max_length": 32, "style_prompts": 24,
            "probe": {"kind": "causal_lm", "name": "plain", "source": "text", "file": str(places["text"]),
                      "unit": "paragraph", "max_length": 24}}  # fmt: skip
    packs = [
        (
            make_run(
                places[kind],
                places["data"],
                role="confirm",
                **{"method.name": method, "task": task, "trainer.max_steps": 6, **more},
            ),
        )
        for more in ({}, CUT)
    ]
    a, b, one, two = both(packs, tmp_path)
    close = 1e-10 if kind == "gpt2" else 1e-5  # Llama's norms are float32 whatever its type
    assert numbers(one[0]) == pytest.approx(numbers(two[0]), rel=close, abs=close)
    assert {"probe/plain/before", "style/adapted"} <= one[0].metrics.keys()
    x, y = ((s.run_dir(one[0].run_id) / "samples.json").read_bytes() for s in (a, b))
    assert x == y and b"after" in x


def test_a_probe_of_labels_runs_the_body_alone(places: dict[str, Path], tmp_path: Path) -> None:
    probe = {
        "kind": "text_classification",
        "name": "again",
        "source": "file",
        "file": str(places["other"]),
        "max_length": 32,
    }
    settings = {"role": "confirm", "trainer.max_steps": 4, "task.probe": probe}
    packs = [(make_run(places["bert"], places["data"], **settings, **more),) for more in ({}, CUT)]
    _, _, one, two = both(packs, tmp_path)
    assert one[0].metrics["probe/again/before"] == two[0].metrics["probe/again/before"]
    assert numbers(one[0]) == pytest.approx(numbers(two[0]), rel=1e-10)


def test_a_killed_pack_goes_on_as_if_it_had_not_been(places: dict[str, Path], tmp_path: Path) -> None:
    def kill(step: int, total: int) -> None:
        if step == 17:
            os.kill(multiprocessing.active_children()[-1].pid or 0, signal.SIGKILL)

    parts, settings = (places["bert"], places["data"]), {"trainer.checkpoint_interval": 5, "trainer.strategy": "fsdp"}
    pack = Pack("p0", two_slices(parts, 2, **settings))
    stores = Store(tmp_path / "undisturbed"), Store(tmp_path / "killed")
    one = train(pack, stores[0])
    with pytest.raises(distributed.ProcessLost):
        train(pack, stores[1], Listener(step=kill))
    assert len(checkpoints.list_checkpoints(checkpoints.pack_folder(stores[1].root, "p0"))) == 2
    two = train(pack, stores[1])
    for x, y in zip(one, two, strict=True):
        assert y.provenance["resumed"] == [15]
        assert numbers(x) == numbers(y)
        assert stores[0].history(x.run_id) == stores[1].history(x.run_id)
        files = [(s.run_dir(x.run_id) / "adapter/adapter_model.safetensors").read_bytes() for s in stores]
        assert files[0] == files[1]


def test_a_killed_pack_whose_base_trains_goes_on_as_if_it_had_not_been(places: dict[str, Path], tmp_path: Path) -> None:
    """Weights, moments and best weights are whole in the checkpoint, and each process takes its share of them again."""

    def kill(step: int, total: int) -> None:
        if step == 11:
            os.kill(multiprocessing.active_children()[-1].pid or 0, signal.SIGKILL)

    settings = {"method.name": "full", "optimizer.lr": 1e-3, "trainer.max_steps": 18, "trainer.eval_interval": 4}
    run = make_run(
        places["bert"], places["data"], role="confirm", **CUT, **settings, **{"trainer.checkpoint_interval": 5}
    )
    pack, stores = Pack("p0", (run,)), (Store(tmp_path / "undisturbed"), Store(tmp_path / "killed"))
    (one,) = train(pack, stores[0])
    with pytest.raises(distributed.ProcessLost):
        train(pack, stores[1], Listener(step=kill))
    newest, before = checkpoints.list_checkpoints(checkpoints.pack_folder(stores[1].root, "p0"))
    assert [checkpoints.step_of(path) for path in (newest, before)] == [10, 5]
    held = checkpoints.read(newest)[0]
    for kind in ("trained", "moment/exp_avg", "moment/exp_avg_sq", "best/0"):
        whole = sum(t.numel() for name, t in held.items() if name.startswith(f"{kind}/"))
        assert whole == one.resources["total_parameters"]
    newest.write_bytes(newest.read_bytes()[:-8])  # torn: the one before is taken
    (two,) = train(pack, stores[1])
    assert two.provenance["resumed"] == [5] and one.metrics["best_step"] < 18
    assert numbers(one) == numbers(two)
    assert stores[0].history(run.run_id) == stores[1].history(run.run_id)
    files = [(s.run_dir(run.run_id) / "adapter/weights.safetensors").read_bytes() for s in stores]
    assert files[0] == files[1]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_process_holds_half_of_the_base_in_memory(places: dict[str, Path], tmp_path: Path, method: str) -> None:
    """Of all float64 storages there are after a forward and a backward pass, those of parameters given up included; of a
    base that trains these are, after two steps, its weights, gradients and two moments."""
    pack = two_slices((places["bert"], places["data"]), 2, **{"trainer.strategy": "fsdp"})
    if method == "full":
        steps = {"trainer.max_steps": 2, "trainer.eval_interval": 3}
        pack = (make_run(places["bert"], places["data"], **{"method.name": "full", **CUT, **steps}),)
    found = in_two(_look, [r.to_dict() for r in pack], str(tmp_path))
    for whole, now in found:
        assert 0.5 <= now / whole < 0.6, found  # and two slices of adapters with their gradients


def in_two(call: Callable[..., Any], *told: Any) -> list[Any]:
    """What `call(rank, *told)` gives in each of two processes of a group."""
    context = multiprocessing.get_context("spawn")
    said, port = context.Queue(), free_port()
    processes = [context.Process(target=_joined, args=(rank, port, said, call, told)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = dict(said.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    return [found[0], found[1]]


def _joined(rank: int, port: int, said: Any, call: Callable[..., Any], told: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    distributed.join(rank, 2)
    said.put((rank, call(rank, *told)))
    said.close()
    said.join_thread()


def _look(rank: int, configs: list[dict[str, Any]], root: str) -> tuple[int, int]:
    pack = Pack("p0", tuple(RunConfig.from_dict(c) for c in configs))
    with open_session(pack, Store(root), Listener()) as session:
        full = configs[0]["method"]["name"] == "full"
        if full:
            session.trainer.fit(session.module, session.train_stream(), session.val_stream())
        else:
            check_isolation(session)
        found: dict[int, int] = {}
        gc.collect()
        for x in gc.get_objects():
            if issubclass(type(x), torch.Tensor) and type(x) is not DTensor and x.dtype == torch.float64:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return 8 * session.base.info.parameters * (4 if full else 1), sum(found.values())


class Routed(torch.nn.Module):
    """Two experts, of which an example takes one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        out: torch.Tensor = self.experts[expert](x)
        return out.square().sum()


def test_what_one_process_does_not_use_gets_the_gradient_of_the_other() -> None:
    model = Routed()
    (model(_example(0), 0) + model(_example(1), 1)).backward()
    found = in_two(_take_own_expert)
    for name, p in model.named_parameters():
        assert torch.allclose(torch.tensor(found[0][name] + found[1][name]), p.grad, rtol=1e-6)


def _example(i: int) -> torch.Tensor:
    return torch.arange(8.0).view(2, 4) + i


def _take_own_expert(rank: int) -> dict[str, list[Any]]:
    model = Routed()
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"),
        setup_environment=lambda: dist.init_process_group("gloo", rank=rank, world_size=2),
    )
    fsdp.shard(model, (), 0, strategy)
    model(_example(rank), rank).backward()
    return {name: fsdp.local_part(p.grad).tolist() for name, p in model.named_parameters()}
