"""How Sphinx builds these pages: Markdown through MyST, the reference from the docstrings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from sphinx.util.nodes import make_refnode

import gaborium

project = "Gaborium"
author = "The Gaborium developers"
copyright = author
version = release = gaborium.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"Gaborium {release}"
html_static_path = ["_static"]
html_css_files = ["gaborium.css"]
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Convention", "Reference"]

# A link to a name of ours must lead somewhere; those of torch and Python have no page here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!gaborium).*"), ("py:.*", r"gaborium\.layers\.Record")]


def public(app: Any, environment: Any, node: Any, text: Any) -> Any:
    """Lead a link from where a name is defined to where it is documented: the package itself."""
    name = f"gaborium.{node.get('reftarget', '').rpartition('.')[2]}"
    entry = environment.get_domain("py").objects.get(name)
    if node.get("refdomain") != "py" or entry is None:
        return None
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text, name)


def setup(app: Any) -> None:
    app.connect("missing-reference", public)
