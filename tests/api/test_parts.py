from pathlib import Path

import pytest

from semcons_ray.api.parts import rows
from semcons_ray.commands.cli import main
from semcons_ray.parts import BUILT_IN
from tests.parts.conftest import module, package, working_folder  # noqa: F401
from tests.parts.test_find import RULES, Install, Write


def test_all_parts_are_listed_with_their_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "3000")
    assert main(["parts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + sum(map(len, BUILT_IN.values()))
    (krum,) = [[cell.strip() for cell in line.split("│")] for line in lines if " multi_krum " in line]
    assert krum == [
        "rule", "multi_krum", "semcons_ray", "semcons_ray.consensus.rules:multi_krum", "num_byzantine=1",
        "The answer with the lowest Krum score: the sum of squared distances to its n - f - 2 nearest.",
    ]  # fmt: skip


@pytest.mark.usefixtures("working_folder")
def test_those_of_packages_are_listed_and_one_that_is_broken_says_why(
    module: Write, package: Install, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:
    name = module(RULES)
    package("lab", f"[semcons_ray.rules]\nlab_soft = {name}:Soft\nlab_gone = {name}:Gone\n")
    found = {row[1]: row for row in rows(["rule"])}
    assert found["lab_soft"][2:5] == ("lab", f"{name}:Soft", "temperature=0.1, steps=3, kind=None, how='a'")
    assert found["lab_gone"][5] == f"cannot be used: {name}:Gone: {name} has no Gone"
    assert main(["parts", "metric"]) == 0
    assert "lab_soft" not in capsys.readouterr().out


def test_an_unknown_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["parts", "rules"])
    assert "choose from" in capsys.readouterr().err


def test_help_names_protocols_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["parts", "--help"])
    said = capsys.readouterr().out
    assert "semcons_ray.consensus.rules:Rule" in said
    assert "semcons_ray.trackers" in said
    assert (Path(__file__).parents[2] / "semcons_ray/consensus/rules.py").is_file()
