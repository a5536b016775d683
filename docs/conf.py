"""Sphinx configuration of the pages under docs/: `make docs` builds them, with warnings as errors."""

from __future__ import annotations

project = "lorabench"
extensions = ["myst_parser", "sphinx_copybutton"]
html_theme = "furo"
html_title = "lorabench"
html_show_copyright = False
exclude_patterns = ["_build", "examples", "notebook.ipynb"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]  # override lines with globs are no valid shell to Pygments
