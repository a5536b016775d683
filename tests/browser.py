"""A page in a real headless browser: what it measures of itself, and what it prints."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"no headless browser: none of {', '.join(PROGRAMS)} is installed"
)

HARNESS = """<!doctype html><meta charset="utf-8"><title>harness</title>
<iframe id="page" src="PAGE" style="width:WIDTHpx;height:HEIGHTpx;border:0"></iframe>
<script>
const measure = (doc, win) => { SCRIPT };
addEventListener("load", () => {
  const frame = document.getElementById("page");
  const out = document.createElement("pre");
  out.id = "out";
  out.textContent = JSON.stringify(measure(frame.contentDocument, frame.contentWindow));
  document.body.replaceChildren(out);
});
</script>"""


def measured(page: Path, script: str, *, width: int, height: int = 800) -> Any:
    """What `script` (a function body of `doc` and `win`) returns for the page in a window so many CSS pixels wide."""
    harness = page.with_name("harness.html")
    text = HARNESS.replace("PAGE", page.name).replace("WIDTH", str(width)).replace("HEIGHT", str(height))
    harness.write_text(text.replace("SCRIPT", script), encoding="utf-8")
    out = chromium(page.parent, "--dump-dom", harness.as_uri())
    found = re.search(r'<pre id="out">(.*?)</pre>', out, re.S)
    assert found, out[-500:]
    return json.loads(html.unescape(found[1]))


def chromium(folder: Path, *argv: str) -> str:
    """Its standard output, without any network."""
    assert BROWSER
    flags = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--hide-scrollbars", "--allow-file-access-from-files", "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9", f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    done = subprocess.run([BROWSER, *flags, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout
