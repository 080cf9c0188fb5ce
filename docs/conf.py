"""How Sphinx builds the documentation: `make docs`."""

import tomllib
from pathlib import Path

root = Path(__file__).parents[1]

project = "transfermium"
author = "The transfermium developers"
copyright = f"2026, {author}"
release = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "transfermium"
