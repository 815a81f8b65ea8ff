"""Sphinx: the pages beside this file, and the reference from the docstrings."""

import lasnn_sj

project = "lasnn_sj"
author = "the lasnn_sj authors"
version = release = lasnn_sj.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"lasnn_sj {version}"
html_show_copyright = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_inherit_docstrings = False  # those of SpikingJelly are written for its own pages
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shape", "notes_style")]
exclude_patterns = ["_build"]
myst_heading_anchors = 2
