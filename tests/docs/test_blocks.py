"""Blocks of code in the pages work: they are run, in order, on a tiny model; YAML is read as what it is."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semcons_ray.commands.cli import main
from semcons_ray.config import dump_yaml, parse_yaml, validate_config
from semcons_ray.studies.comparison import load_comparison
from semcons_ray.studies.search_space import load_sweep
from tests.docs.pages import Block, blocks, name_of, shown_pages

CODE = ("bash", "console", "json", "python", "sh", "toml", "yaml")
REAL_MODEL = "packaged:smollm2-135m-instruct"
"""A tiny one takes its place."""

STUDIES = {"comparison": load_comparison, "sweep": load_sweep}


def says_what_it_is_for(block: Block) -> bool:
    if block.words.startswith("not run: ") or (block.file and " " not in block.file):
        return True
    kinds = {"bash": ("run",), "python": ("run",), "yaml": ("experiment", *STUDIES)}
    return block.first in kinds.get(block.language, ())


@pytest.mark.parametrize("page", shown_pages(), ids=name_of)
def test_each_block_of_code_is_run_or_says_why_not(page: Path) -> None:
    assert not [block.place for block in blocks(page) if block.language in CODE and not says_what_it_is_for(block)]
    assert not [block.place for block in blocks(page) if not block.language]


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of a page's blocks, with tiny settings as its config.yaml; modules that blocks write are
    forgotten again."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    experiment: dict[str, Any] = {
        "num_rounds": 2,
        "data": {"source": str(tiny_data), "examples_per_client": 8, "num_test": 6},
        "prompts": {"budget": 6},
        "model": {"name": str(tiny_llama), "dtype": "float32", "max_length": 64},
        "generation": {"max_new_tokens": 8},
        "evaluation": {"num_answers": 3},
        "resources": {"fleet": "local", "device": "cpu"},
    }
    (here / "config.yaml").write_text(dump_yaml(experiment))
    (tmp_path / "run.yaml").write_text(dump_yaml(experiment))
    (tmp_path / "compare.yaml").write_text(dump_yaml({"seeds": [0], "experiment": experiment}))
    (tmp_path / "sweep.yaml").write_text(dump_yaml({"experiment": experiment}))
    yield here
    for name in {*sys.modules} - before:
        if (path := getattr(sys.modules[name], "__file__", None)) and Path(path).is_relative_to(here):
            del sys.modules[name]


RUN = [page for page in shown_pages() if any(block.language in CODE for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_blocks_of_a_page_work(page: Path, folder: Path, tiny_llama: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.words.startswith("not run: "):
            continue
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.content.replace(REAL_MODEL, str(tiny_llama)), encoding="utf-8")
        if block.first == "run" and block.language == "python":
            exec(compile(block.content, block.place, "exec"), names)
        elif block.first == "run":
            expected = int(block.words.partition(" ")[2] or 0)
            for line in block.content.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    assert words[0] == "semcons", f"{block.place}: only semcons is run"
                    assert main(over(words[1:], folder.parent)) == expected, f"{block.place}: {line}"
        elif block.first == "experiment":
            validate_config(parse_yaml(block.content), where=block.place)
        elif block.first in STUDIES:
            STUDIES[block.first](folder / block.file if block.file else written(block, folder), {})


def written(block: Block, folder: Path) -> Path:
    path = folder / f"block-{block.line}.yaml"
    path.write_text(block.content, encoding="utf-8")
    return path


def over(words: list[str], tiny: Path) -> list[str]:
    """A command with tiny settings laid over its files."""
    if words[0] not in ("run", "compare", "sweep"):
        return words
    behind = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    return [*words[:behind], str(tiny / f"{words[0]}.yaml"), *words[behind:]]
