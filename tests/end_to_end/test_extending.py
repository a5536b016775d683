"""The code of docs/extending.md works as it stands there: a task of images, a model and a method, in one sweep."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import lorabench.methods
from lorabench import export, status
from lorabench.analyze import __main__ as analyze
from lorabench.store.records import Store

FILES = ("images.py", "convnet.py", "norms.py")


@pytest.fixture
def files(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's blocks as files; its method stands among those of the package."""
    page = (repo / "docs/extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    folder = tmp_path / "own"
    folder.mkdir()
    for name, block in zip(FILES, blocks, strict=True):
        (folder / name).write_text(block, encoding="utf-8")
    methods = tmp_path / "methods"
    shutil.copytree(Path(lorabench.methods.__path__[0]), methods)
    shutil.copy(folder / "norms.py", methods)
    monkeypatch.setattr(lorabench.methods, "__path__", [str(methods)])
    (folder / "conf/method").mkdir(parents=True)
    (yaml,) = re.findall(r"The YAML file is one line, `(.*?)`", page)
    (folder / "conf/method/norms.yaml").write_text(f"{yaml}\n", encoding="utf-8")
    return folder


def test_the_page_trains_and_reports(cli, files, undrawn):
    own = [
        "--config-dir",
        str(files / "conf"),
        "-m",
        "task=local",
        f"task.file={files / 'images.py'}",
        "+task.images=120",
    ]
    own += ["model=local", f"model.file={files / 'convnet.py'}", "optimizer.lr=1e-2,1e-3", "sweep.confirm_seeds=[1,2]"]
    own += ["trainer.max_steps=20", "trainer.batch_size=8", "sweep.name=s"]
    for methods in (["method=head,norms"], ["method=lora", "method.r=2", "method.target_modules=[stem,deep]"]):
        code, out = cli(*own, *methods)
        assert code == 0, out
    records = list(Store(Path("sweeps/s")).records())
    assert {r.status for r in records} == {"completed"}
    assert {r.config["method"]["name"] for r in records} == {"lora", "norms", "head"}
    for record in records:
        assert "tokens" not in record.resources, "images have no tokens"
        assert record.resources["examples"] == 152, "20 batches of 8, of which two held the 4 that were left of 84"
    for command, trust in ((status, []), (analyze, ["--trust"])):
        assert command.main(["sweeps/s", *trust]) == 0
    (trained, *_) = (r.run_id for r in records if r.role == "confirm" and r.config["method"]["name"] == "lora")
    assert export.main([f"sweeps/s/runs/{trained}", "--out", "adapter", "--trust"]) == 0
    assert Path("adapter/adapter_model.safetensors").is_file()
    assert export.main([f"sweeps/s/runs/{trained}", "--out", "merged", "--merged", "--trust"]) == 2
    page = Path("reports/s/report.html").read_text(encoding="utf-8")
    assert "colours" in page and "norms" in page
    words = re.sub(r"<(style|script|svg)\b.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    assert not re.search(r"\d\s*tokens|tokens a second", words)
