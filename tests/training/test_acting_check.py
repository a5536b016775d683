"""A run whose adapter would not act is refused before anything is written, and the targets offered instead work."""

from __future__ import annotations

import re

import pytest
import transformers as tf
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from fixtures.runs import make_data, minilm_folder
from lorabench.adapters import IdleAdapters
from lorabench.config.errors import ConfigError
from lorabench.config.runs import parse
from lorabench.models.inventory import inventory
from lorabench.store.records import Store
from lorabench.sweep.execute import execute
from lorabench.sweep.packs import Job, cell_label
from lorabench.training import acting
from lorabench.training.train import Pack, train


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mamba")
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm_folder())
    config = tf.MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4
    )
    tf.MambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def job(folder, root, **changes) -> Job:
    text = root / "text.txt"
    if not text.exists():
        rows = make_data(root / "rows.csv", 40).read_text().splitlines()[1:]
        text.write_text("\n\n".join(rows))
    cfg = OmegaConf.create(
        {
            "model": {"kind": "transformers", "name": "tiny", "source": str(folder)},
            "task": {"kind": "causal_lm", "source": "text", "file": str(text), "unit": "paragraph", "max_length": 24},
            "method": {"name": "lora", "r": 2},
            "optimizer": {},
            "trainer": {"max_steps": 1, "batch_size": 2, "accelerator": "cpu", "precision": "32"},
            "seed": 0,
            "sweep": {"name": "s", "dir": str(root / "sweep"), "progress": False},
            "report": {"dir": str(root / "report")},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False)
    run, settings = parse(cfg)
    return Job(run, settings, cell_label(run))


def offered(error: ConfigError) -> object:
    """What the error says to type, as Hydra reads it."""
    text = re.search(r"method\.target_modules=(?!all-linear)\S+$", str(error))
    assert text, str(error)
    return OverridesParser.create().parse_override(text[0]).value()


def test_a_run_alone_is_refused_and_nothing_is_written(mamba, tmp_path):
    with pytest.raises(ConfigError, match=r"method\.target_modules=all-linear.*mixer\.dt_proj.*no gradient") as caught:
        execute([job(mamba, tmp_path)])
    assert not (tmp_path / "sweep").exists() and not (tmp_path / "report").exists()
    instead = offered(caught.value)
    assert "dt_proj" not in instead
    (record,) = execute([job(mamba, tmp_path, **{"method.target_modules": instead})])
    assert record.status == "completed"


def test_where_no_check_came_first_the_run_fails_by_name(mamba, tmp_path):
    one = job(mamba, tmp_path)
    (record,) = train(Pack("p0", (one.run,)), Store(tmp_path / "sweep"))
    assert record.status == "failed" and "dt_proj" in record.error


def test_blocks_of_one_name_of_which_one_is_idle_are_offered_by_regex():
    config = tf.MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4)
    info = inventory(tf.MambaForCausalLM(config))
    names = [f"backbone.layers.{i}.mixer.in_proj" for i in range(2)]
    hint = acting._way_out(IdleAdapters([], names[:1], names[1:]), info)
    _, _, value = hint.partition("method.target_modules=")
    pattern = OverridesParser.create().parse_override(f"method.target_modules={value}").value()
    assert [name for name in names if re.fullmatch(str(pattern), name)] == names[1:]
