"""The Markdown pages of the repository: their headings, links, names and blocks of code."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs" / "_ext"))

import reference  # noqa: E402

LEFT_OUT = {"build", "mutants", "runs", "node_modules"}


def all_pages() -> list[Path]:
    """All pages but those of folders that are made."""
    found = sorted(ROOT.rglob("*.md"))
    inside = [(page, page.relative_to(ROOT).parts[:-1]) for page in found]
    return [page for page, above in inside if not any(name in LEFT_OUT or name[0] == "." for name in above)]


def shown_pages() -> list[Path]:
    """The pages of the documentation, and the front page."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return str(page.relative_to(ROOT))


@cache
def tokens(page: Path) -> list[Token]:
    """A page's Markdown, with its parts that are made from the code."""
    return MarkdownIt("commonmark").enable("table").parse(reference.filled(page.read_text(encoding="utf-8")))


@cache
def anchors(page: Path) -> set[str]:
    """What a link may name behind # in a page, as GitHub and MyST have it."""
    found: set[str] = set()
    for token, inside in zip(tokens(page), tokens(page)[1:], strict=False):
        if token.type == "heading_open":
            text = "".join(part.content for part in inside.children or [] if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
            found.add(f"{slug}-{count}" if slug in found else slug)
    return found


def _inside(page: Path) -> Iterator[Token]:
    for token in tokens(page):
        yield from token.children or []


def links(page: Path) -> list[str]:
    """Where a page's links and pictures lead."""
    names = {"link_open": "href", "image": "src"}
    return [str(token.attrs[names[token.type]]) for token in _inside(page) if token.type in names]


def literals(page: Path) -> list[str]:
    """Texts of a page in typewriter."""
    return [token.content for token in _inside(page) if token.type == "code_inline"]


@dataclass(frozen=True)
class Block:
    """A block of code. The words behind its language, which readers are not shown, say what tests do with it:

        run                               Python is executed, beside a config.yaml with tiny settings; Bash is calls of
                                          semcons, over which they are laid
        run 2                             the same, and each call ends with this exit code
        not run: WHY                      nothing
        experiment, comparison, sweep     YAML is read as settings of that kind
        file: NAME                        it is written to this file in the folder in which the page's blocks are run;
                                          may follow the words above
    """

    page: Path
    line: int
    language: str
    words: str
    content: str

    @property
    def place(self) -> str:
        """Where it stands."""
        return f"{name_of(self.page)}:{self.line}"

    @property
    def file(self) -> str:
        """The name of the file that it is; empty if it is none."""
        return self.words.partition("file: ")[2]

    @property
    def first(self) -> str:
        """The first of the words."""
        return self.words.partition(" ")[0]


def blocks(page: Path) -> list[Block]:
    """A page's blocks of code, in order."""
    found = []
    for token in tokens(page):
        if token.type == "fence":
            language, _, words = token.info.strip().partition(" ")
            found.append(Block(page, (token.map or [0])[0] + 1, language, words.strip(), token.content))
    return found
