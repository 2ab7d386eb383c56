"""Settings of Sphinx. Its source folder is the repository's root, so that READMEs are pages where they are."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from semcons_ray import __version__  # noqa: E402

project = "semcons_ray"
author = "The semcons_ray developers"
project_copyright = "The semcons_ray developers. Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_the_code"]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    *(f"{folder}/{below}README.md" for folder in ("cluster", "experiments", "examples") for below in ("", "**/")),
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = [".*", "build", "mutants", "runs", "tests", "semcons_ray", "**/.*", "**/results"]

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "literal"
nitpicky = True
# Names of other packages, and of ours that have no page: no inventory of them is loaded, as a build needs no network.
nitpick_ignore_regex = [("py:.*", r"(?!semcons_ray\.\w+$).*")]

html_theme = "furo"
html_title = f"semcons_ray {version}"
html_extra_path = ["_extra"]
html_show_sourcelink = False
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "monokai"
