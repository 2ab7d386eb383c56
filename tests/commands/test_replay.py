"""`semcons replay`, `semcons break-even` and `semcons show`."""

from pathlib import Path
from typing import Any

import pytest

from semcons_ray.commands.cli import main
from semcons_ray.config import dump_yaml
from semcons_ray.modeling.shapes import SHAPES
from semcons_ray.timeline.profiles import table
from tests.invariants.test_virtual_time import FEDERATION, run, straggling


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Path:
    """A finished run with a federation of its own."""
    return run(straggling(tiny_config, "local_only", {}), tmp_path_factory.mktemp("runs") / "own", fleet="local")


def test_a_run_is_replayed_in_its_own_federation_or_in_a_files(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(own)]) == 0
    assert "3 fast, 1 slow" in capsys.readouterr().out
    file = tmp_path / "F.yaml"
    file.write_text(dump_yaml({"federation": {"devices": {"raspberry-pi-5": 1}}}))
    assert main(["replay", str(own), "--federation", str(file), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "raspberry-pi-5 by fibre" in said
    assert str(tmp_path / "out") in said
    assert (tmp_path / "out" / "timeline.svg").is_file()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "F.yaml"),
        ("federation: {devices: {h100: 1}, links: {dls: 1}}", "did you mean dsl"),
        ("federation: {devices: {h100: 0}}", "federation.devices.h100"),
        ("federation: {devices: [h100]}", "federation.devices"),
        ("federation: 3", "federation"),
        ("clients: {}", "has no section federation"),
        ("federation: {links: {dsl: 1}}", "federation.links"),
        ("- federation", "F.yaml"),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_2(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    file = tmp_path / "F.yaml"
    if content is not None:
        file.write_text(content)
    assert main(["replay", str(own), "--federation", str(file)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("semcons: ")
    assert err.count("\n") == 1


def test_a_model_that_is_not_known_or_too_large_is_one_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, said in (("llama-9", "there is no model llama-9"), ("llama-3.1-405b", "memory")):
        assert main(["replay", str(own), "--model", model]) == 2
        assert said in capsys.readouterr().err


def test_break_even_of_two_runs(
    own: Path, tmp_path: Path, tiny_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run(straggling(tiny_config, "fedavg_lora", {}), tmp_path / "averages", fleet="local")
    models = ("--models", "own=laptop-cpu", "llama-3.1-8b=rtx-4090")
    told = ("break-even", str(own), str(other), *models, "--links", "dsl", "lan", "dsl")
    assert main([*told, "--out", str(tmp_path / "map")]) == 0
    said = capsys.readouterr().out
    assert f"Virtual hours of {own} for each of {other}" in " ".join(said.split())
    assert (tmp_path / "map" / "map.svg").is_file()
    for wrong, words in (
        (("--against", "x"), "there is no arm x"),
        (("--links", "dls"), "did you mean dsl"),
        (("--models", "own=h100", "own=rtx-4090"), "a model is there twice"),
    ):
        assert main([*told, *wrong]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("kind", ["devices", "links", "regions"])
def test_show_lists_every_profile(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", kind]) == 0
    rows = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1].isalnum()}
    assert {*table(kind)} <= rows


def test_show_lists_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "models"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in SHAPES)


def test_a_federations_file_can_be_laid_over_a_runs(tmp_path: Path) -> None:
    from semcons_ray.config import load_config

    file = tmp_path / "F.yaml"
    file.write_text(dump_yaml({"federation": FEDERATION}))
    assert load_config([{"num_rounds": 1}, str(file)]).federation.devices == FEDERATION["devices"]
