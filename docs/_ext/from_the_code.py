"""Sphinx's side of `reference`: fills pages, links names of settings to where they are told, finds pages of folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import reference
from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Fill in what is made from the code."""
    source[0] = reference.filled(source[0])


def keep_indented(app: Sphinx, what: str, name: str, part: Any, options: Any, lines: list[str]) -> None:
    """An indented block of a docstring that follows a paragraph is shown as it is, such as a small table of names."""
    for place in range(len(lines) - 1, 1, -1):
        if lines[place].startswith("    ") and not lines[place - 1].strip() and re.match(r"\S", lines[place - 2]):
            lines[place:place] = ["::", ""]


class LinkFolders(SphinxTransform):
    """Makes a link to a folder one to the page of its README.md; where it has none, the text is not a link."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        """Go over the links of a page that are to no file."""
        for link in list(self.document.findall(addnodes.pending_xref)):
            if link.get("reftype") != "myst" or link.get("refdomain") == "doc":
                continue
            path, _, anchor = link["reftarget"].partition("#")
            _, folder = self.env.relfn2path(path, self.env.docname)
            page = self.env.path2doc(f"{folder}/README.md")
            if page in self.env.found_docs:
                link.attributes.update(refdomain="doc", reftarget=page, reftargetid=anchor or None)
            elif Path(folder).is_dir():
                link.replace_self(link.children)


class LinkSettings(SphinxPostTransform):
    """Makes a link of each name of a setting. Tests see to it that there is no name of none."""

    default_priority = 5

    def run(self, **_: Any) -> None:
        """Go over the texts in typewriter of a page."""
        known = self.env.get_domain("std").objects
        for literal in list(self.document.findall(nodes.literal)):
            key = literal.astext().partition(":")[0].partition(" ")[0].removeprefix("--")
            if "." in key and ("setting", key) in known and not isinstance(literal.parent, nodes.reference):
                docname, anchor = known["setting", key]
                link = make_refnode(self.app.builder, self.env.docname, docname, anchor, literal.deepcopy(), key)
                literal.replace_self(link)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of it with Sphinx."""
    app.add_object_type("setting", "setting", objname="setting")
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", keep_indented, priority=400)  # before sections are made of it
    app.add_transform(LinkFolders)
    app.add_lexer("hex", TextLexer)
    app.add_post_transform(LinkSettings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
