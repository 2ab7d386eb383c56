"""Links of the pages: those inside the repository lead somewhere; those to other places are listed here."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.pages import ROOT, all_pages, anchors, links, name_of

HOSTS = {
    "ai.google.dev",
    "arxiv.org",
    "docs.ray.io",
    "github.com",
    "keepachangelog.com",
    "semver.org",
    "www.ray.io",
    "www.rfc-editor.org",
}
"""Where pages send their readers. Nothing is fetched from there by a test."""


@pytest.mark.parametrize("page", all_pages(), ids=name_of)
def test_each_link_leads_to_a_file_or_a_heading(page: Path) -> None:
    broken = [link for link in links(page) if not urlsplit(link).scheme and not leads_somewhere(page, link)]
    assert not broken


def leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = unquote(link).partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists() or not target.is_relative_to(ROOT):
        return False
    told = target / "README.md" if target.is_dir() else target
    return not anchor or (told.suffix == ".md" and told.is_file() and anchor in anchors(told))


def test_links_to_other_places_are_to_known_ones() -> None:
    found = {urlsplit(link)[:2] for page in all_pages() for link in links(page) if urlsplit(link).scheme}
    assert found == {("https", host) for host in HOSTS}


def test_a_link_that_leads_nowhere_is_seen() -> None:
    page = ROOT / "README.md"
    for link in ("docs/none.md", "docs/wire.md#none", "#none", "experiments/quality#none", "../README.md"):
        assert not leads_somewhere(page, link)
    for link in ("docs/wire.md#encoding", "#licence", "experiments/quality#when-to-begin", "docs/settings.md#training"):
        assert leads_somewhere(page, link)
