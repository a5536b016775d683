"""Replies and predictions before and after: the same for all runs, those of transformers, and how far a tone moved."""

import json

import pytest
import torch

from fixtures.runs import WORDS, make_base, make_data, make_decoder, make_run
from lorabench.config.errors import ConfigError
from lorabench.store.records import Store
from lorabench.tasks.causal_lm import Config as LanguageModelling
from lorabench.training import preparation
from lorabench.training.evaluation import replies
from lorabench.training.evaluation.style import split_in_halves
from lorabench.training.train import Listener, Pack, open_session, train


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    g = torch.Generator().manual_seed(2)
    pairs = root / "pairs.jsonl"
    with open(pairs, "w") as f:
        for i in range(400):
            said = " ".join(WORDS[int(j)] for j in torch.randint(0, len(WORDS), (3 + i % 6,), generator=g))
            row = {"prompt": f"{said} {i}", "reply": f"dog dog {WORDS[i % 3]} cat", "talk": f"d{i // 2}"}
            f.write(json.dumps(row) + "\n")
    return {
        "bert": make_base(root / "bert", "bert"),
        "llama": make_decoder(root / "llama", "llama"),
        "data": make_data(root / "data.csv"),
        "pairs": pairs,
    }


def chat_run(places, **changes):
    task = {
        "kind": "causal_lm",
        "name": "chat",
        "source": "file",
        "file": str(places["pairs"]),
        "prompt_column": "prompt",
        "response_column": "reply",
        "group_column": "talk",
        "max_length": 32,
        "style_prompts": 40,
    }
    settings = {"role": "confirm", "trainer.max_steps": 4, **changes}
    run = make_run(places["llama"], places["data"], task=task, **settings)
    return run


def shown(store, run):
    return json.loads((store.run_dir(run.run_id) / "samples.json").read_text())


def test_replies_are_those_of_transformers_one_at_a_time(places, tmp_path):
    from transformers import AutoModelForCausalLM

    run = chat_run(places)
    model = AutoModelForCausalLM.from_pretrained(
        places["llama"], dtype=torch.float64, attn_implementation="eager"
    ).eval()
    with open_session(Pack("p0", (run,)), Store(tmp_path), Listener()) as s:
        prompts = [replies.prompt_tokens(e) for e in s.prepared.encoded.splits["test"][:9]]
        ours = replies.base_replies(s, prompts)
        assert s.base.model.training
    for prompt, said in zip(prompts, ours, strict=True):
        ids = torch.as_tensor(prompt, dtype=torch.int64)[None]
        for _ in range(replies.MAX_NEW_TOKENS):  # greedy, by hand, without a cache
            with torch.no_grad():
                chosen = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, chosen.view(1, 1)], dim=1)
            if int(chosen) == 102:
                break
        want = s.base.processor.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()
        assert said == want
    assert len(set(map(len, prompts))) > 1, "prompts of one length would not show that each finds its place"


@pytest.mark.slow
def test_a_pack_says_what_its_runs_say_alone(places, tmp_path):
    runs = [
        chat_run(places, **{"method.r": r, "optimizer.lr": lr, "trainer.max_steps": 40})
        for r, lr in ((1, 1e-5), (8, 3e-2))
    ]
    packed, solo = Store(tmp_path / "packed"), Store(tmp_path / "solo")
    together = train(Pack("p0", tuple(runs)), packed)
    alone = [train(Pack(f"s{i}", (r,)), solo)[0] for i, r in enumerate(runs)]
    for run, a, b in zip(runs, together, alone, strict=True):
        assert a.status == "completed", a.error
        assert shown(packed, run) == shown(solo, run)
        own = {k: v for k, v in a.metrics.items() if k.startswith("style/")}
        assert own and own == {k: v for k, v in b.metrics.items() if k.startswith("style/")}
    first, second = (shown(packed, r) for r in runs)
    assert [x["before"] for x in first] == [x["before"] for x in second]
    assert [x["after"] for x in first] != [x["after"] for x in second]
    assert [x.keys() for x in first] == [{"prompt", "expected", "before", "after"}] * 8
    assert together[1].metrics["style/moved"] > 0.5 > abs(together[0].metrics["style/moved"])
    assert (
        together[1].metrics["style/moved_low"]
        <= together[1].metrics["style/moved"]
        <= together[1].metrics["style/moved_high"]
    )
    assert together[1].metrics["style/real"] > 0.5 > together[1].metrics["style/base"]
    halves = split_in_halves([r["group"] for r in preparation.load_data(runs[0].task).splits["test"]][:40])
    assert together[1].metrics["style/examples"] == len(halves[1])


def test_full_fine_tuning_shows_the_base_before_it_changed(places, tmp_path):
    full, lora = chat_run(places, **{"method.name": "full"}), chat_run(places)
    for run in (full, lora):
        (record,) = train(Pack("p0", (run,)), Store(tmp_path))
        assert record.status == "completed", record.error
    found = Store(tmp_path).arrays(lora.run_id, "test")
    talk = {r["example"]: r["group"] for r in preparation.load_data(lora.task).splits["test"]}
    assert found is not None
    pairs = {(talk[e], int(g)) for e, g in zip(found["example"].tolist(), found["group"], strict=True)}
    assert len(pairs) == len(set(talk.values())) < len(talk), "replies of one dialogue are one draw of the test set"
    of_full, of_lora = (shown(Store(tmp_path), run) for run in (full, lora))
    assert [x["before"] for x in of_full] == [x["before"] for x in of_lora]


def test_labels_before_and_after(places, tmp_path):
    store = Store(tmp_path)
    runs = [make_run(places["bert"], places["data"], role="confirm", seed=seed) for seed in (0, 1)]
    records = train(Pack("p0", tuple(runs)), store)
    rows = preparation.load_data(runs[0].task).splits["test"]
    smallest = sorted(rows, key=lambda r: r["example"])[:8]
    for run in runs:
        items = shown(store, run)
        assert [(x["text"], x["expected"]) for x in items] == [(r["text"], r["label"]) for r in smallest]
        found = store.arrays(run.run_id, "test")
        said = dict(zip(found["example"].tolist(), found["prediction"].tolist(), strict=True))
        assert [x["after"] for x in items] == [("north", "south")[said[r["example"]]] for r in smallest]
        with open_session(Pack("p1", (run,)), store, Listener()) as s:
            s.base.model.eval()
            batch = s.module.task.collate(
                [e for r in smallest for e in s.prepared.encoded.splits["test"] if e["example"] == r["example"]]
            )
            start = s.module.task.step(s.base.model, batch).rows["prediction"].tolist()
        assert [x["before"] for x in items] == [("north", "south")[i] for i in start]
    assert {r.status for r in records} == {"completed"}
    before = (store.run_dir(runs[0].run_id) / "samples.json").read_bytes()
    train(Pack("p0", tuple(runs)), store)
    assert (store.run_dir(runs[0].run_id) / "samples.json").read_bytes() == before


def test_tuning_runs_leave_no_samples(places, tmp_path):
    run = make_run(places["bert"], places["data"], **{"trainer.max_steps": 2})
    train(Pack("p0", (run,)), Store(tmp_path))
    assert not (Store(tmp_path).run_dir(run.run_id) / "samples.json").exists()


def test_what_style_asks_for(places):
    with pytest.raises(ConfigError, match=r"task\.style_prompts=5: 0, or at least 20"):
        LanguageModelling(source="chitchat", style_prompts=5).validate("task")
    with pytest.raises(ConfigError, match=r"task\.style_prompts=30: 0, or at least 20 on prompts with responses"):
        LanguageModelling(source="bbc", style_prompts=30).validate("task")
    run = chat_run(places)
    with pytest.raises(ConfigError, match=r"task\.style_prompts=200: at most \d+, the pairs held out"):
        preparation.check_run(
            type(run).from_dict({**run.to_dict(), "task": {**run.to_dict()["task"], "style_prompts": 200}})
        )
