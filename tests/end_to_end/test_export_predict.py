"""A trained run handed to other software, and asked about texts. The run directories here are made by hand, not trained."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from omegaconf import OmegaConf
from peft import PeftModel
from torch import Tensor, nn

from fixtures.runs import make_base, make_data
from lorabench import export, predict
from lorabench.adapters import inject
from lorabench.adapters.files import save_slice
from lorabench.config.errors import ConfigError
from lorabench.config.runs import RunConfig, parse_run
from lorabench.store.records import Record, Store
from lorabench.training.saved_run import open_run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 asks for it
TEXTS = ["the small dog runs south", "a big red house north of here", "cat"]
LORA = {"name": "lora", "r": 4, "alpha": 16.0}


def run_of(base: Path | str, data: Path, method: dict[str, Any], *, reply: bool = False) -> RunConfig:
    task: dict[str, Any] = {
        "kind": "text_classification",
        "name": "words",
        "source": "file",
        "file": str(data),
        "max_length": 32,
    }
    if reply:
        task = {"kind": "causal_lm", "name": "talk", "source": "file", "file": str(data), "max_length": 32,
                "prompt_column": "prompt", "response_column": "reply"}  # fmt: skip
    cfg = {
        "model": {"kind": "transformers", "name": "tiny", "source": str(base), "dropout": 0.0},
        "task": task,
        "method": method,
    }
    return parse_run(OmegaConf.create(cfg | {"seed": 3}), role="confirm")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("bases")

    def get(kind: str, reply: bool = False) -> Path:
        folder = root / f"{kind}-{reply}"
        if not folder.exists():
            make_base(folder, kind, dropout=0.1 if kind == "bert" else 0.0)
            if reply:  # with an output layer of its own, as a pretrained decoder has
                tf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
        return folder

    return get


def _logits(model: nn.Module, processor: Any) -> Tensor:
    with torch.no_grad():
        return model(**processor(TEXTS, padding=True, return_tensors="pt")).logits.double()


@pytest.fixture
def trained(sweep_dir: Path, tmp_path: Path, bases: Callable[..., Path]) -> Callable[..., tuple[Path, Tensor]]:
    """Makes a run directory; returns it with the logits of the stack that was saved there."""

    def make(
        kind: str = "bert",
        method: dict[str, Any] | None = None,
        *,
        reply: bool = False,
        seed: int = 0,
        source: str | None = None,
    ) -> tuple[Path, Tensor]:
        data = tmp_path / "data.csv"
        if reply:
            data.write_text("prompt,reply\n" + "".join(f"the dog {i},a cat {i}\n" for i in range(40)))
        else:
            make_data(data)
        run = run_of(source or bases(kind, reply), data, method or LORA, reply=reply)
        head = run.task.head(run.task.load())
        base = run.model.load(head)
        plan = run.method.plan(base.info, seed=run.seed)
        stack = inject(base.model, [plan], info=base.info)
        g = torch.Generator().manual_seed(seed)
        state = {k: t + 0.1 * torch.randn(t.shape, generator=g) for k, t in stack.slice_state(0).items()}
        stack.load_slice(0, state)
        store = Store(sweep_dir)
        folder = store.run_dir(run.run_id)
        save_slice(folder / "adapter", state, plan, info=base.info, run=run.to_dict(), head=head)
        provenance = {"head": {"auto_class": head.auto_class, "label_names": list(head.label_names)},
                      "model_fingerprint": base.fingerprint, "git": {"revision": "abc"}, "attention": "eager"}  # fmt: skip
        metrics = {"val/accuracy": 0.5, "test/accuracy": 0.75, "primary": "accuracy"}
        store.write(Record(run.run_id, "confirm", "completed", run.to_dict(), metrics, provenance=provenance))
        return folder, _logits(base.model, base.processor)

    return make


class TestExport:
    @pytest.mark.parametrize(("kind", "reply"), [("bert", False), ("gpt2", True), ("llama", True), ("llama", False)])
    def test_a_peft_folder(self, trained: Any, bases: Any, tmp_path: Path, kind: str, reply: bool) -> None:
        run, expected = trained(kind, reply=reply)
        out = tmp_path / "deep" / "out"
        assert export.main([str(run), "--out", str(out)]) == 0
        auto = tf.AutoModelForCausalLM if reply else tf.AutoModelForSequenceClassification
        tokenizer = tf.AutoTokenizer.from_pretrained(out)
        options = {} if reply else {"num_labels": 2, "pad_token_id": tokenizer.pad_token_id}
        told = "".join(f", {name}={value}" for name, value in options.items())
        assert f'from_pretrained("<this folder>"{told})' in (out / "README.md").read_text()
        model = PeftModel.from_pretrained(auto.from_pretrained(bases(kind, reply), **options).eval(), out).eval()
        assert (_logits(model, tokenizer) - expected).abs().max() < 1e-5
        assert [p.name for p in out.parent.iterdir()] == ["out"]

    @pytest.mark.parametrize(("kind", "reply"), [("bert", False), ("gpt2", True), ("llama", False)])
    def test_its_readme_loads_it_where_nothing_of_ours_is_known(
        self, trained: Any, bases: Any, tmp_path: Path, kind: str, reply: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a base out of a package, which only lorabench could find by its `package:` name."""
        package = tmp_path / "site" / "packaged_base"
        shutil.copytree(bases(kind, reply), package / "model")
        (package / "__init__.py").touch()
        monkeypatch.syspath_prepend(package.parent)
        run, expected = trained(kind, reply=reply, source="package:packaged_base/model")
        out = tmp_path / "out"
        assert export.main([str(run), "--out", str(out)]) == 0
        (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
        (tmp_path / "load.py").write_text(
            f"import sys, torch\n{code.replace('<this folder>', str(out))}"
            f"inputs = tokenizer({TEXTS!r}, padding=True, return_tensors='pt')\n"
            "torch.save(model.eval()(**inputs).logits.detach().double(), 'logits.pt')\n"
            "assert not any(name.startswith(('lorabench', 'packaged_base')) for name in sys.modules)\n"
        )
        python = [sys.executable, "-I", "-W", "ignore", "load.py"]
        done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert (torch.load(tmp_path / "logits.pt", weights_only=True) - expected).abs().max() < 1e-5

    def test_the_base_it_names(self, trained: Any, bases: Any, tmp_path: Path, capsys: Any) -> None:
        run, _ = trained()

        def named(out: str, *words: str) -> tuple[Any, Any]:
            assert export.main([str(run), "--out", str(tmp_path / out), *words]) == 0
            config = json.loads((tmp_path / out / "adapter_config.json").read_text())
            return config["base_model_name_or_path"], config["revision"]

        assert named("own") == (str(bases("bert", False).resolve()), None)
        assert named("hub", "--base", "owner/original") == ("owner/original", None)
        assert 'base_model: "owner/original"' in (tmp_path / "hub" / "README.md").read_text()
        for words, text in (
            (["--base", str(tmp_path)], f"--base={tmp_path}: a model's folder"),
            (["--base", "package:a/b"], "--base=package:a/b: a model's folder"),
            (["--base", "owner/original", "--merged"], "--base=owner/original: without --merged"),
        ):
            assert export.main([str(run), "--out", str(tmp_path / "none"), *words]) == 2
            assert text in capsys.readouterr().err and not (tmp_path / "none").exists()

    @pytest.mark.parametrize(
        ("kind", "reply", "method"),
        [
            ("bert", False, LORA),
            ("bert", False, LORA | {"target_modules": ["word_embeddings", "query"], "use_rslora": True}),
            ("bert", False, {"name": "head"}),
            ("bert", False, {"name": "bitfit"}),
            ("bert", False, {"name": "full"}),
            ("gpt2", True, LORA | {"target_modules": ["wte", "c_attn"]}),
            ("llama", True, {"name": "full"}),
        ],
    )
    def test_a_merged_checkpoint(
        self, trained: Any, tmp_path: Path, kind: str, reply: bool, method: dict[str, Any], capsys: Any
    ) -> None:
        run, expected = trained(kind, method, reply=reply)
        assert export.main([str(run), "--out", str(tmp_path / "out"), "--merged"]) == 0
        auto = tf.AutoModelForCausalLM if reply else tf.AutoModelForSequenceClassification
        model = auto.from_pretrained(tmp_path / "out").eval()
        assert (_logits(model, tf.AutoTokenizer.from_pretrained(tmp_path / "out")) - expected).abs().max() < 1e-5
        if not reply:
            assert model.config.id2label == {0: "north", 1: "south"}
        if kind == "bert":  # the run trained with dropout 0; the base's own goes out
            assert model.config.hidden_dropout_prob == 0.1
        if "wte" in str(method):
            assert "no longer tied" in capsys.readouterr().out

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_in_another_type(self, trained: Any, tmp_path: Path, dtype: str) -> None:
        run, expected = trained()
        assert export.main([str(run), "--out", str(tmp_path / "out"), "--merged", "--dtype", dtype]) == 0
        model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto").eval()
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        found = _logits(model, tf.AutoTokenizer.from_pretrained(tmp_path / "out"))
        assert (found - expected).abs().max() < 16 * torch.finfo(getattr(torch, dtype)).eps * expected.abs().max()
        assert f"rounded to {dtype}" in (tmp_path / "out" / "README.md").read_text()

    def test_the_card(self, trained: Any, tmp_path: Path) -> None:
        run, _ = trained()
        export.export(run, tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        assert (
            "LoRA, r = 4 on tiny, words" in card
            and "| test/accuracy | 0.75 |" in card
            and "Labels in order: north, south." in card
        )
        assert run.name in card and "git.revision | abc" in card
        assert str(tmp_path) not in card and "data.csv" in card  # no path of this machine

    @pytest.mark.parametrize("name", ["head", "bitfit", "full"])
    def test_what_peft_cannot_hold(self, trained: Any, tmp_path: Path, name: str, capsys: Any) -> None:
        run, _ = trained("bert", {"name": name})
        assert export.main([str(run), "--out", str(tmp_path / "out")]) == 2
        assert f"method.name={name}" in (err := capsys.readouterr().err) and "--merged" in err
        assert not (tmp_path / "out").exists()

    def test_where_it_may_go(self, trained: Any, tmp_path: Path, capsys: Any) -> None:
        run, _ = trained()
        (tmp_path / "empty").mkdir()
        assert export.main([str(run), "--out", str(tmp_path / "empty")]) == 0
        mine = tmp_path / "empty" / "README.md"
        mine.write_text("mine")
        for out in (tmp_path / "empty", mine):
            assert export.main([str(run), "--out", str(out)]) == 2
            assert f"--out={out}: a folder that does not exist yet, or an empty one" in capsys.readouterr().err
        assert mine.read_text() == "mine"
        assert export.main([str(run), "--out", str(tmp_path / "new"), "--dtype", "float16"]) == 2
        assert "--merged only" in capsys.readouterr().err

    @pytest.mark.parametrize("merged", [True, False])
    def test_nothing_half_done(
        self, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merged: bool, capsys: Any
    ) -> None:
        run, _ = trained()
        (tmp_path / "place").mkdir()

        def full_disk(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tf.PreTrainedTokenizerBase, "save_pretrained", full_disk)
        assert export.main([str(run), "--out", str(tmp_path / "place" / "out"), *["--merged"] * merged]) == 2
        assert "No space left" in capsys.readouterr().err
        assert list((tmp_path / "place").iterdir()) == []


class TestPredict:
    def test_probabilities_before_and_after(self, trained: Any) -> None:
        run, expected = trained()
        saved = open_run(run)
        answers = predict.predict(saved, TEXTS)
        for i, a in enumerate(answers):
            assert a.text == TEXTS[i] and [n for n, _ in a.trained] == sorted(
                ("north", "south"), key=lambda n: -dict(a.trained)[n]
            )
            found = [dict(a.trained)[n] for n in saved.head.label_names]
            assert torch.allclose(torch.tensor(found).double(), expected[i].softmax(-1), atol=1e-5)
        base = saved.base(dtype="float32")
        stack = inject(base.model, [saved.weights()[1]], info=base.info)  # the run's own start
        start = _logits(base.model, base.processor).softmax(-1)
        found = torch.tensor([[dict(a.base)[n] for n in saved.head.label_names] for a in answers])
        assert torch.allclose(found.double(), start, atol=1e-5) and not torch.allclose(
            found.double(), expected.softmax(-1), atol=1e-2
        )
        stack.remove()

    @pytest.mark.parametrize("method", [LORA, {"name": "full"}])
    def test_replies_are_greedy_and_the_merged_models_own(
        self, trained: Any, bases: Any, tmp_path: Path, method: dict[str, Any]
    ) -> None:
        run, _ = trained("llama", method, reply=True)
        answers = predict.predict(open_run(run), TEXTS, max_new_tokens=8)
        export.export(run, tmp_path / "out", merged=True)
        tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
        for folder, side in ((bases("llama", True), "base"), (tmp_path / "out", "trained")):
            model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
            for a in answers:
                ids = torch.tensor([tokenizer(f"{a.text}\n", add_special_tokens=False)["input_ids"]])
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=8,
                    do_sample=False,
                    eos_token_id=102,
                )
                assert getattr(a, side) == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert any(a.base != a.trained for a in answers)

    def test_the_command_line(self, trained: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        run, _ = trained()
        monkeypatch.setattr(sys, "stdin", io.StringIO("from the pipe\n\n[bold]not markup\x1b[31m\n"))
        assert predict.main([str(run), "given here", "-", "--top", "1"]) == 0
        out = capsys.readouterr().out
        assert "given here" in out and "from the pipe" in out and "[bold]not" in out and "\x1b" not in out
        assert "initial draw" in out and out.count("%") == 6

    def test_a_run_of_pairs_reads_both_texts(self, trained: Any) -> None:
        saved = open_run(trained()[0])
        task = replace(saved.run.task, pair_column="label")
        paired = replace(saved, run=replace(saved.run, task=task))
        (answer,) = predict.predict(paired, ["the dog\tnorth of here"])
        state, plan = saved.weights()
        base = saved.base(dtype="float32")
        stack = inject(base.model, [plan], info=base.info)
        stack.load_slice(0, state)
        with torch.no_grad():
            logits = base.model(**base.processor("the dog", "north of here", return_tensors="pt")).logits[0].double()
        found = torch.tensor([dict(answer.trained)[n] for n in saved.head.label_names]).double()
        torch.testing.assert_close(found, logits.softmax(-1), atol=1e-5, rtol=0)
        for half in ("the dog", "the dog\t", "\tthe dog"):
            with pytest.raises(ConfigError, match="text=\\s*the dog\\s*: two texts with a tab between them"):
                predict.predict(paired, [half])

    def test_bad_texts(self, trained: Any, capsys: Any) -> None:
        run, _ = trained("llama", reply=True)
        assert predict.main([str(run), __file__]) == 2
        assert "a text; this names a file" in capsys.readouterr().err
        for argv, text in (
            ([str(run), " "], "text= : some words"),
            ([str(run), "the dog", "--max-new-tokens", "100"], "--max-new-tokens=100: at most 62"),
            ([str(run), "the dog", "--max-new-tokens", "0"], "--max-new-tokens=0: at least 1"),
        ):
            assert predict.main(argv) == 2
            assert text in capsys.readouterr().err


def test_a_whole_sweep_gives_its_best_run_and_says_which(
    trained: Any, sweep_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    run, _ = trained()
    told = f"taken from sweep {sweep_dir.name}: LoRA r = 4 ("
    assert export.main([str(sweep_dir), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(told) and f"run {run.name}, seed 3" in out.splitlines()[0]
    assert f"run {run.name}" in (tmp_path / "out" / "README.md").read_text()
    assert predict.main([str(sweep_dir), "the small dog"]) == 0
    assert capsys.readouterr().out.startswith(told)


@pytest.mark.parametrize("face", [export, predict])
class TestWhatIsNoTrainedRun:
    def fails(self, face: Any, run: Path, text: str, capsys: Any) -> None:
        argv = [str(run), "a text"] if face is predict else [str(run), "--out", str(run.parent.parent / "out")]
        assert face.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and text in err and str(run) in err
        assert not (run.parent.parent / "out").exists()

    def test_places(self, face: Any, trained: Any, tmp_path: Path, sweep_dir: Path, capsys: Any) -> None:
        run, _ = trained()
        (tmp_path / "bare").mkdir()
        self.fails(face, tmp_path / "nowhere" / "x", "no such directory", capsys)
        self.fails(face, tmp_path / "bare", "holds no run.json", capsys)
        argv = ["a text"] if face is predict else ["--out", str(tmp_path / "out")]
        assert face.main([str(run), *argv, "--cell", "x"]) == 2
        assert "--cell=x: with a sweep's directory" in capsys.readouterr().err
        (run / "run.json").write_text("{")
        self.fails(face, run, "a record of this version", capsys)

    @pytest.mark.parametrize(
        ("status", "error", "text"),
        [("failed", "out of memory\nand more", "out of memory"), ("diverged", None, "it diverged")],
    )
    def test_runs_without_weights(
        self, face: Any, trained: Any, capsys: Any, status: str, error: str | None, text: str
    ) -> None:
        run, _ = trained()
        (run / "adapter").rename(run / "elsewhere")
        store = Store(run.parent.parent)
        record = store.read(run.name)
        assert record
        store.write(replace(record, status=status, error=error))
        self.fails(face, run, text, capsys)

    def test_a_base_that_changed(self, face: Any, trained: Any, capsys: Any) -> None:
        run, _ = trained()
        path = run / "run.json"
        record = json.loads(path.read_text())
        record["provenance"]["model_fingerprint"] = "0" * 64
        path.write_text(json.dumps(record))
        argv = [str(run), "a text"] if face is predict else [str(run), "--out", str(run / "out"), "--merged"]
        assert face.main(argv) == 2
        assert "model.source=" in (err := capsys.readouterr().err) and "these differ" in err

    def test_help_imports_nothing_heavy(self, face: Any) -> None:
        code = f"import sys, {face.__name__} as face\ntry: face.main(['--help'])\nexcept SystemExit: pass\n"
        code += "print('heavy' if {'torch', 'transformers', 'omegaconf', 'rich'} & set(sys.modules) else 'light')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.endswith("light\n") and "usage: python -m lorabench." in done.stdout
