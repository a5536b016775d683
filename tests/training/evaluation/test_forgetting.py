"""What a run forgets of another task: against transformers and scikit-learn, alone and packed, for all methods."""

import csv
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fixtures.runs import WORDS, make_base, make_data, make_decoder, make_run
from lorabench.config.errors import ConfigError, ExistingWork
from lorabench.config.runs import RunConfig
from lorabench.store.records import Store
from lorabench.sweep.resume import check_drift
from lorabench.tasks.probe import load_probe
from lorabench.training import preparation
from lorabench.training.evaluation import forgetting
from lorabench.training.evaluation.measures import AuxiliaryMeasures
from lorabench.training.train import Listener, Pack, open_session, train


def write_text(path, seed, n=120):
    g = torch.Generator().manual_seed(seed)
    lines = [" ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (4 + k % 9,), generator=g)) for k in range(n)]
    path.write_text("\n\n".join(f"{line} {k} {seed}" for k, line in enumerate(lines)))
    return path


def lm(file, name="text") -> dict:
    return {
        "kind": "causal_lm",
        "name": name,
        "source": "text",
        "file": str(file),
        "unit": "paragraph",
        "max_length": 24,
    }


def labelled(file, name="other") -> dict:
    return {"kind": "text_classification", "name": name, "source": "file", "file": str(file), "max_length": 32}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    bases = {"bert": make_base(root / "bert", "bert")} | {k: make_decoder(root / k, k) for k in ("gpt2", "llama")}
    other = root / "other.csv"
    rng = np.random.default_rng(9)
    with open(other, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["text", "label"])
        for i in range(240):  # three labels that frozen features tell in part only
            words = [WORDS[j] for j in rng.integers(0, len(WORDS), 9)]
            score = 2 * words.count("red") + words.count("dog") - words.count("tree") + rng.normal()
            out.writerow([" ".join([*words, str(i)]), ["low", "middle", "high"][int(score > 0) + int(score > 1.2)]])
    return {
        **bases,
        "data": make_data(root / "data.csv"),
        "other": other,
        "text": write_text(root / "text.txt", 5),
        "plain": write_text(root / "plain.txt", 6),
    }


def lm_run(places, kind="gpt2", **changes) -> RunConfig:
    task = lm(places["text"]) | {"probe": lm(places["plain"], "plain")}
    return make_run(places[kind], places["data"], **{"role": "confirm", "trainer.max_steps": 6, **changes}, task=task)


def label_run(places, kind="bert", **changes) -> RunConfig:
    settings = {"role": "confirm", "trainer.max_steps": 6, "task.probe": labelled(places["other"]), **changes}
    return make_run(places[kind], places["data"], **settings)


def reference_loss(model, run) -> float:
    """Mean token loss over the probe's test split, one text at a time."""
    probe = load_probe(run, preparation.prepare(run).head)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for e in probe.splits["test"]:
            ids = torch.as_tensor(e["input_ids"], dtype=torch.int64)[None]
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total -= float(logp.gather(1, ids[0, 1:, None]).sum())
            tokens += ids.shape[1] - 1
    return total / tokens


def load_lm(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loss_before_is_the_bases_own(places, tmp_path, kind):
    run = lm_run(places, kind)
    (record,) = train(Pack("p0", (run,)), Store(tmp_path))
    assert record.status == "completed", record.error
    tolerance = 1e-10 if kind == "gpt2" else 1e-6  # Llama's norms are float32 whatever its type
    assert record.metrics["probe/plain/before"] == pytest.approx(
        reference_loss(load_lm(places[kind]), run), abs=tolerance
    )
    assert record.metrics["probe/plain/examples"] == len(load_probe(run, preparation.prepare(run).head).splits["test"])
    assert record.metrics["probe/plain/loss"] != record.metrics["probe/plain/before"]
    assert record.resources["beside_seconds"] > 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_language_models_own_test_loss_before_training_is_recorded(places, tmp_path, method):
    changes = {} if method == "lora" else {"method.name": "full", "optimizer.lr": 1e-3}
    run = lm_run(places, **changes)
    (record,) = train(Pack("p0", (run,)), Store(tmp_path))
    total, tokens, model = 0.0, 0, load_lm(places["gpt2"])
    for e in preparation.prepare(run).encoded.splits["test"]:
        ids = torch.as_tensor(e["input_ids"], dtype=torch.int64)[None]
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total, tokens = total - float(logp.gather(1, ids[0, 1:, None]).sum()), tokens + ids.shape[1] - 1
    assert record.metrics["base/loss"] == pytest.approx(total / tokens, abs=1e-10)
    assert record.metrics["base/loss"] != record.metrics["test/loss"]
    assert {k.removeprefix("base/") for k in record.metrics if k.startswith("base/")} == {
        k.removeprefix("test/") for k in record.metrics if k.startswith("test/")
    }


def test_a_base_with_a_new_head_has_no_score_before(places, tmp_path):
    (record,) = train(Pack("p0", (label_run(places),)), Store(tmp_path))
    assert record.status == "completed" and not [k for k in record.metrics if k.startswith("base/")]


def test_full_fine_tuning_is_measured_before_and_after_it_changed_the_base(places, tmp_path):
    run, store = lm_run(places, **{"method.name": "full", "optimizer.lr": 1e-3}), Store(tmp_path)
    (record,) = train(Pack("p0", (run,)), store)
    model = load_lm(places["gpt2"])
    assert record.metrics["probe/plain/before"] == pytest.approx(reference_loss(model, run), abs=1e-10)
    model.load_state_dict(load_file(store.run_dir(run.run_id) / "adapter" / "weights.safetensors"), strict=False)
    assert record.metrics["probe/plain/loss"] == pytest.approx(reference_loss(model, run), abs=1e-6)  # saved in float32
    assert abs(record.metrics["probe/plain/loss"] - record.metrics["probe/plain/before"]) > 1e-3


def test_the_accuracy_before_is_that_of_a_linear_classifier_on_the_bases_states(places, tmp_path):
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel

    run = label_run(places)
    (record,) = train(Pack("p0", (run,)), Store(tmp_path))
    probe = load_probe(run, preparation.prepare(run).head)
    model = AutoModel.from_pretrained(places["bert"], dtype=torch.float64, attn_implementation="eager").eval()
    x, y = {}, {}
    with torch.no_grad():
        for split, examples in probe.splits.items():
            ids = [torch.as_tensor(e["input_ids"], dtype=torch.int64)[None] for e in examples]
            x[split] = torch.cat([model(input_ids=i).last_hidden_state.mean(1) for i in ids]).numpy()
            y[split] = [e["label"] for e in examples]
    mean, spread = x["train"].mean(0), x["train"].std(0)
    reference = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit((x["train"] - mean) / spread, y["train"])
    want = reference.score((x["test"] - mean) / spread, y["test"])
    assert record.metrics["probe/other/before"] == pytest.approx(want, abs=1e-12)
    assert 0.4 < want < 1, "a probe that is at chance or perfect would say little"


def packed_and_solo(tmp_path, runs):
    assert len({r.pack_key for r in runs}) == 1
    packed = train(Pack("p0", tuple(runs)), Store(tmp_path / "packed"))
    solo = [train(Pack(f"s{i}", (r,)), Store(tmp_path / "solo"))[0] for i, r in enumerate(runs)]
    return packed, solo


RANKS = ({"method.r": 1, "seed": 0}, {"method.r": 4, "seed": 1, "optimizer.lr": 2e-2})


def test_a_pack_forgets_what_its_runs_forget_alone(places, tmp_path):
    packed, solo = packed_and_solo(tmp_path, [lm_run(places, **c) for c in RANKS])
    for a, b in zip(packed, solo, strict=True):
        assert a.metrics["probe/plain/loss"] == pytest.approx(b.metrics["probe/plain/loss"], abs=1e-10)
        assert a.metrics["probe/plain/before"] == b.metrics["probe/plain/before"]
    assert packed[0].metrics["probe/plain/loss"] != packed[1].metrics["probe/plain/loss"]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_features_of_a_pack_are_those_of_its_runs_alone(places, tmp_path, kind):
    packed, solo = packed_and_solo(tmp_path, [label_run(places, kind, **c) for c in RANKS])
    assert [r.metrics["probe/other/accuracy"] for r in packed] == [r.metrics["probe/other/accuracy"] for r in solo]


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "ia3"])
def test_what_has_not_trained_has_forgotten_nothing(places, tmp_path, method):
    run = lm_run(places, "llama", **{"method.name": method})
    with open_session(Pack("p0", (run,)), Store(tmp_path), Listener()) as s:
        probe = load_probe(run, s.prepared.head)
        before = forgetting.base_score(s, probe)
        assert forgetting.score(s, probe, [0]) == ([before] if method in ("lora", "pissa") else pytest.approx([before]))
        assert s.base.model.training, "the pack trains on as it was"


def test_a_head_leaves_the_features_alone(places, tmp_path):
    (record,) = train(Pack("p0", (label_run(places, **{"method.name": "head"}),)), Store(tmp_path))
    assert record.status == "completed", record.provenance
    assert record.metrics["probe/other/accuracy"] == record.metrics["probe/other/before"]


def test_a_decoder_can_be_probed_by_classification_too(places, tmp_path):
    task = lm(places["text"]) | {"probe": labelled(places["other"])}
    run = make_run(places["gpt2"], places["data"], role="confirm", **{"trainer.max_steps": 3}, task=task)
    (record,) = train(Pack("p0", (run,)), Store(tmp_path))
    assert 0 < record.metrics["probe/other/accuracy"] <= 1


def test_the_base_is_measured_once(places, tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting, "_base_scores", {})
    asked = []
    score = forgetting.score
    monkeypatch.setattr(forgetting, "score", lambda s, p, slices: asked.append(list(slices)) or score(s, p, slices))
    for seed in (0, 1):
        train(Pack(f"p{seed}", (lm_run(places, seed=seed),)), Store(tmp_path))
    assert asked == [[], [0], [0]]


def test_the_probe_along_training(places, tmp_path):
    """What forgetting is matched by: every evaluation's row has the probe; training is none the other for it."""
    store, settings = Store(tmp_path), {"trainer.max_steps": 6, "trainer.eval_interval": 2, "trainer.keep": "last"}
    task = lm(places["text"]) | {"probe": lm(places["plain"], "plain")}

    def run(r: int, **more) -> RunConfig:
        return make_run(
            places["gpt2"], places["data"], role="confirm", **{**settings, "method.r": r}, task={**task, **more}
        )

    one, four = train(Pack("p0", (run(1, probe_along=True), run(4, probe_along=True))), store)
    rows = {x.run_id: [row for row in store.history(x.run_id) if "val/loss" in row] for x in (one, four)}
    assert [row["step"] for row in rows[one.run_id]] == [2, 4, 6]
    for x in (one, four):
        assert rows[x.run_id][-1]["probe/plain/loss"] == pytest.approx(x.metrics["probe/plain/loss"], abs=1e-12)
        assert len({row["probe/plain/loss"] for row in rows[x.run_id]}) == 3
    (alone,) = train(Pack("p1", (run(4),)), store)
    assert not any("probe/plain/loss" in row for row in store.history(alone.run_id))
    scores = {k: v for k, v in alone.metrics.items() if "/" in k}
    assert scores == pytest.approx({k: four.metrics[k] for k in scores}, abs=1e-10)


def test_tuning_runs_are_not_probed(places, tmp_path):
    (record,) = train(Pack("p0", (lm_run(places, role="tune"),)), Store(tmp_path))
    assert not [k for k in record.metrics if k.startswith(("probe/", "style/"))]
    assert "beside_seconds" not in record.resources


def test_fewer_examples_of_the_probe(places):
    run = lm_run(places, **{"task.probe_examples": 20})
    run = RunConfig.from_dict({**run.to_dict(), "task": {**run.to_dict()["task"], "probe_examples": 20}})
    few, many = (load_probe(r, preparation.prepare(r).head).splits["test"] for r in (run, lm_run(places)))
    assert len(few) == 20 < len(many)
    assert [e["example"] for e in few] == [e["example"] for e in many[:20]]


def test_a_probe_whose_data_changed_is_refused(places, tmp_path):
    (record,) = train(Pack("p0", (label_run(places),)), Store(tmp_path))
    check_drift(record, label_run(places))
    record.provenance["probe_fingerprint"] = "another"
    with pytest.raises(ExistingWork, match=r"task\.probe=.*the probe's data files are not those"):
        check_drift(record, label_run(places))


# -- identity and errors ---------------------------------------------------------------------------------------------


def test_along_takes_a_probe(places):
    with pytest.raises(ConfigError, match=r"task\.probe_along=True: false without task\.probe"):
        make_run(places["bert"], places["data"], **{"task.probe_along": True})


def test_a_probe_is_identity_and_none_is_not(places):
    plain = make_run(places["bert"], places["data"])
    assert not {"probe", "probe_examples", "style_prompts"} & plain.identity()["task"].keys()
    run = label_run(places)
    assert run.identity()["task"]["probe"]["file"] == str(places["other"])
    again = RunConfig.from_dict(run.to_dict())
    assert (again.run_id, again.pack_key, again.task.probe) == (run.run_id, run.pack_key, run.task.probe)


@pytest.mark.parametrize(
    ("probe", "key"),
    [
        (lambda p: "food_reviews", "task.probe=food_reviews: the settings of another task; task@task.probe=<name>"),
        (lambda p: {"name": "nothing"}, "task.probe.kind"),
        (lambda p: {"kind": "no_such_kind"}, "task.probe.kind=no_such_kind"),
        (lambda p: {"kind": "local"}, "task.probe.file"),
        (lambda p: labelled("missing.csv"), "task.probe.file=missing.csv"),
        (lambda p: labelled(p["other"]) | {"max_length": 1}, "task.probe.max_length"),
        (lambda p: labelled(p["other"]) | {"bogus": 1}, "task.probe.bogus=1: unknown key"),
        (lambda p: labelled(p["other"]) | {"train_examples": 10**6}, "task.probe.train_examples"),
        (lambda p: labelled(p["data"]), "task.probe=other: another task than the one that is trained on"),
        (lambda p: lm(p["plain"]), "task.probe=text: a task of text classification"),
        (
            lambda p: labelled(p["other"]) | {"kind": "planted", "metric": "loss"},
            "task.probe=other: a task of language",
        ),
        (lambda p: labelled(p["other"]) | {"probe": labelled(p["data"])}, "task.probe.probe"),
        (lambda p: labelled(p["other"]) | {"test_examples": 5}, "task.probe=other: at least 10 examples"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_probes_that_cannot_be(places, probe, key):
    with pytest.raises(ConfigError) as e:
        preparation.check_run(make_run(places["bert"], places["data"], **{"task.probe": probe(places)}))
    assert str(e.value).startswith(key), e.value


@pytest.mark.parametrize("argument", ["task.probe=food_reviews", "task@task.probe=nosuch", "task@task.probe=tweets"])
def test_a_bad_probe_leaves_nothing(cli, argument):
    code, out = cli(argument, "task.train_examples=50", "sweep.name=x")
    assert code == 2 and "task" in out, out
    assert os.listdir() == []


def test_a_probe_by_the_name_of_its_file(cli, places):
    """Another task's file, mounted whole, with settings of its own."""
    code, out = cli(
        "task=text_file",
        f"task.file={places['data']}",
        "task@task.probe=text_file",
        f"task.probe.file={places['other']}",
        "task.probe.max_length=16",
        "task.probe_examples=40",
        "sweep.dry_run=true",
    )
    assert code == 0, out
    assert os.listdir() == []


def test_nothing_is_measured_where_the_task_asks_for_nothing(places, tmp_path):
    run = make_run(places["gpt2"], places["data"], role="confirm", task=lm(places["text"]))
    with open_session(Pack("p0", (run,)), Store(tmp_path), Listener()) as s:
        measures = AuxiliaryMeasures(s)
        assert (measures.probe, measures.style, measures.samples) == (None, None, None)
