"""What the pages name exists: settings, commands, files and columns; and all that there is, is named."""

import re
import tomllib
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pandas as pd
import pytest
import yaml

from semcons_ray import __version__
from semcons_ray.config import ExperimentConfig, Settings, dump_config, find_setting, setting_keys
from semcons_ray.parts import BUILT_IN
from semcons_ray.runs.experiment import run_experiment
from tests.docs.pages import ROOT, all_pages, blocks, literals, name_of, reference, shown_pages

SECTIONS = {name for name, field in ExperimentConfig.model_fields.items() if isinstance(field.default, Settings)}
OF_THE_PAST = ("CHANGELOG.md", "corrections.md")
"""Pages that also name what there was."""


@pytest.mark.parametrize("page", [page for page in all_pages() if page.name not in OF_THE_PAST], ids=name_of)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    named = [re.match(r"(?:--)?([a-z_]+(?:\.[a-z_]+)+)(?=$|[ :=])", text) for text in literals(page)]
    keys = {found[1] for found in named if found and found[1].partition(".")[0] in SECTIONS}
    assert not {key for key in keys if find_setting(key) is None and not key.endswith((".py", ".yaml", ".parquet"))}


@pytest.mark.parametrize("page", shown_pages(), ids=name_of)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    texts = [*literals(page), *(block.content for block in blocks(page) if block.language in ("bash", "text"))]
    named = {found for text in texts for found in re.findall(r"(?:^|[`\n])semcons ([a-z-]+)", text)}
    assert named <= {*re.findall(r"^## semcons ([\w-]+)$", reference.commands(), re.M)}


def test_every_setting_is_told_with_its_default() -> None:
    told = reference.settings()
    assert re.findall(r"^```\{setting\} (\S+)$", told, re.M) == sorted_as_told([*setting_keys()])
    rank = re.search(r"\{setting\} model\.lora\.rank\n(.*)\n\n(.*)\n```", told)
    assert rank and rank[1] == "A whole number from 1. Default: `8`"
    assert rank[2] == "Rank of the adapter: its size, and the bytes of weights, grow with it."
    assert "Default: `null`\n\nHow attention is computed" in told


def sorted_as_told(keys: list[str]) -> list[str]:
    """Settings of no section stand first."""
    return sorted(keys, key=lambda key: "." in key)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "a number above 0 up to 1"),
        ({"enum": ["iid", "natural"], "type": "string"}, "`iid` or `natural`"),
        ({"anyOf": [{"type": "integer", "minimum": 8}, {"type": "null"}]}, "a whole number from 8 or `null`"),
        ({"anyOf": [{"const": True}, {"const": "gaussian"}]}, "`true` or `gaussian`"),
        ({"type": "array", "items": {"type": "string"}}, "a list of: text"),
        ({"type": "string", "format": "date"}, "a date"),
    ],
)
def test_what_a_setting_takes_is_told_in_words(schema: dict[str, object], words: str) -> None:
    assert reference.values(schema) == words


def test_every_part_and_metric_is_told() -> None:
    told = reference.parts()
    for names in BUILT_IN.values():
        assert {f"`{name}`" for name in names} <= {*re.findall(r"^\| (`\w+`) \| \S", told, re.M)}
    choices = ExperimentConfig.model_json_schema()["$defs"]["EvaluationConfig"]["properties"]["metrics"]["items"]
    known = {*re.findall(r"`(\w+)`", reference.values(choices))}
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert {"nll", "rouge_l"} <= known <= {*re.findall(r"`(\w+)`", page)}


@pytest.mark.real
def test_files_and_columns_of_a_run_are_those_that_are_told(
    tiny_config: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_experiment(tiny_config(evaluation={"metrics": ["nll", "exact_match"]}), out)
    page = reference.filled((ROOT / "docs" / "run_folder.md").read_text(encoding="utf-8"))
    for part in re.split(r"^## ", page, flags=re.M)[1:]:
        title = part.partition("\n")[0]
        if title.endswith(".parquet"):
            told = {*re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", part, re.M)))}
            (first, *_) = sorted(out.glob(title.replace("NNN", "*")))
            assert {*pd.read_parquet(first).columns} - {"exact_match"} == told - {"option_nll"}, title
    files = page.partition("## Files")[2].partition("\n## ")[0]
    names = {name.strip("` ") for cell in re.findall(r"^\|([^|]*)\|", files, re.M)[2:] for name in cell.split(",")}
    missing = {name for name in names if not [*out.glob(re.sub("NNN", "*", name.rstrip("/")))]}
    in_some = {"state/TRACKER.json", "state/judge/", "lm_eval/round_NNN.parquet", "report.html", "code/"}
    in_some |= {"canaries.parquet", "audit/"}
    assert missing <= in_some
    written = {path.relative_to(out).parts[0] for path in out.iterdir()}
    assert written <= {name.partition("/")[0] for name in names}
    assert (out / "config.yaml").read_text() == dump_config(tiny_config(evaluation={"metrics": ["nll", "exact_match"]}))


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_versions_agree() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"authors", "cff-version", "message", "title"} <= {*cited}  # all that the format asks for
    assert str(cited["version"]) == __version__
    assert cited["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert cited["authors"] == [{"name": "The semcons_ray developers"}]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(\S+)\](?: - (\S+))?$", changes, re.M)
    assert headings[0][0] == "Unreleased"
    assert headings[1][0] == __version__
    assert all(date.fromisoformat(day) for _, day in headings if day)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {*re.findall(r"^### (.*)$", changes, re.M)} <= kinds
