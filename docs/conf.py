"""How the documentation is built: `sphinx-build -W docs build/docs`, or `python docs/build.py`. No network is used."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generate  # noqa: E402

project = "activation-pipeline"
author = "The activation-pipeline authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["README.md", "_parts/*"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # pages that are included begin with a heading of their own

html_theme = "furo"
html_title = "activation-pipeline"
html_static_path = ["_static"]
html_css_files = ["page.css"]
smartquotes = False  # an option is --option
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100


def markdown(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Docstrings here say `code` with one backtick and mean their asterisks."""
    parts = re.split(r"`([^`]+)`", "\n".join(lines))
    for at, part in enumerate(parts):
        parts[at] = f"``{part}``" if at % 2 else re.sub(r"([*|])|(?<=\w)(_)(?!\w)", r"\\\1\2", part)
    lines[:] = "".join(parts).split("\n")


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", markdown)
    app.connect("builder-inited", lambda app: generate.write_parts(DOCS / "_parts"))
    return {"parallel_read_safe": True}
