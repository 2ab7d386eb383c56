import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from semcons_ray.reporting.sweep import SweepResult, render_sweep, write_sweep_report
from semcons_ray.reporting.tables import short_keys

MIX = json.dumps({"packaged:one": 1, "org/two": 2})


def trials(**changes: list[Any]) -> pd.DataFrame:
    columns: dict[str, list[Any]] = {
        "trial": ["a", "b", "c", "d", "e"],
        "prompts.budget": [6, 12, 6, 12, 12],
        "clients.mix": ["{}", "{}", MIX, MIX, MIX],
        "status": ["finished", "finished", "finished", "finished", "stopped"],
        "rounds": [2, 2, 2, 2, 1],
        "failed": [0, 0, 3, 0, 1],
        "bits_per_byte": [2.0, 1.0, 1.5, 3.0, 0.5],
        "mean_nll": [math.nan] * 5,
        "rouge_l": [0.1, 0.4, 0.2, 0.3, 0.9],
        "total_bytes": [100, 400, 200, 300, 10],
        "seconds": [4.0, 1.0, 2.0, 3.0, 0.1],
        "joules": [10.0, 20.0, 5.0, math.nan, 1.0],
        "cost_usd": [0.0] * 5,
        "energy_source": ["estimated"] * 5,
    }
    return pd.DataFrame({**columns, **changes})


def result(**more: Any) -> SweepResult:
    values = {"name": "tiny <b>", "keys": ("prompts.budget", "clients.mix"), "metric": "bits_per_byte"}
    values |= {"higher_is_better": False, "loss": "bits_per_byte", "trials": trials()}
    return SweepResult(**{**values, **more})


def test_fronts_hold_finished_trials_that_none_beats() -> None:
    assert result().fronts() == {"total_bytes": ["a", "c", "b"], "seconds": ["b"], "joules": ["c", "b"]}
    best = result(metric="rouge_l", higher_is_better=True).fronts()
    assert best == {"total_bytes": ["a", "c", "d", "b"], "seconds": ["b"], "joules": ["c", "b"]}


def test_what_was_paid_is_shown_where_something_was() -> None:
    assert "paid" not in render_sweep(result(), width=200)
    shown = render_sweep(result(trials=trials(cost_usd=[0.0, 1.5, 0.0, 0.0, math.nan])), width=200)
    assert "US$ 1.50" in shown
    assert "nan" not in shown


def test_effects_average_the_other_keys_out() -> None:
    effects = result().effects().set_index(["key", "value"])
    assert effects["mean"].to_dict() == {
        ("prompts.budget", "6"): 1.75,
        ("prompts.budget", "12"): 2.0,
        ("clients.mix", "none"): 1.5,
        ("clients.mix", "1 one, 2 two"): 2.25,
    }
    assert effects.loc[("prompts.budget", "12"), ["trials", "lowest", "highest"]].tolist() == [2, 1.0, 3.0]
    assert effects.loc[("prompts.budget", "12"), "std"] == pytest.approx(math.sqrt(2))
    assert result().spans() == {"prompts.budget": 0.25, "clients.mix": 0.75}


def test_values_are_in_ascending_order_and_numbers_where_they_belong() -> None:
    table = trials(**{"prompts.budget": [12, 6, 100, 12, 6], "clients.mix": ["true", "10", "9", "b", "a"]})
    table["threshold"] = [0.5, None, 0.25, 0.5, None]
    table["own"] = [True, False, True, False, True]
    effects = result(keys=("prompts.budget", "clients.mix", "threshold", "own"), trials=table).effects()
    by_key = {key: rows["value"].tolist() for key, rows in effects.groupby("key")}
    assert by_key == {
        "prompts.budget": ["6", "12", "100"],
        "clients.mix": ["9", "10", "b", "true"],
        "threshold": ["0.25", "0.5", "null"],
        "own": ["false", "true"],
    }
    numbers = effects.set_index(["key", "value"])["number"].dropna()
    assert numbers.to_dict() == {("prompts.budget", str(number)): number for number in (6, 12, 100)}


def marks(page: str, figure: str, axis: int = 1) -> list[tuple[str, float]]:
    """Labels on an axis of a figure, and where they are."""
    drawn = page[page.index(f'id="figure-{figure}"') :].split("</figure>")[0]
    of_axis = drawn[drawn.index(f'id="{figure}-matplotlib.axis_{axis}"') :].split("matplotlib.axis_")[1]
    found = re.findall(r'<text[^>]*?x="([\d.]+)"[^>]*>([^<]+)</text>|translate\(([\d.]+) [^>]*>([^<]+)</text>', of_axis)
    return [(second or fourth, float(first or third)) for first, second, third, fourth in found]


def test_numbers_are_drawn_at_their_distance_on_an_ascending_axis(tmp_path: Path) -> None:
    table = trials(**{"prompts.budget": [16, 2, 4, 16, 2]}, bits_per_byte=[1.0, 3.0, 2.0, 1.5, 9.0])
    write_sweep_report(result(trials=table.iloc[[0, 3, 2, 1]]), "space: {}", tmp_path / "report.html")
    places = dict(marks((tmp_path / "report.html").read_text(encoding="utf-8"), "effect-prompts-budget"))
    assert (places["16"] - places["2"]) / (places["4"] - places["2"]) == pytest.approx(7.0, rel=1e-3)


def test_trials_are_named_by_what_differs(tmp_path: Path) -> None:
    table = trials(**{"training.batch_size": [4] * 5, "generation.batch_size": [8, 16, 8, 16, 8], "seed": [0] * 5})
    swept = result(keys=("training.batch_size", "generation.batch_size", "seed", "prompts.budget"), trials=table)
    assert swept.describe(table.iloc[0]) == "batch_size=8, budget=6"
    heading = render_sweep(swept, 160).splitlines()[1]
    assert heading.split()[:2] == ["batch_size", "budget"]
    assert short_keys(swept.keys) == {
        "training.batch_size": "training.batch_size",
        "generation.batch_size": "generation.batch_size",
        "seed": "seed",
        "prompts.budget": "budget",
    }
    write_sweep_report(swept, "space: {}", tmp_path / "report.html")
    assert "Best by mean bits per byte: batch_size=8, budget=6; 2.000" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_and_no_last_column_is_cut_however_narrow_the_terminal(width: int) -> None:
    table = trials(**{f"section.a_rather_long_key_{index}": [index, 1, 2, 3, 4] for index in range(6)})
    swept = result(keys=tuple(name for name in table if str(name).startswith("section.")), trials=table)
    lines = render_sweep(swept, width).splitlines()
    assert not any("…" in line for line in lines)
    (row,) = [line.split() for line in lines if line.startswith("0 ")]
    assert row == ["0", "1", "2", "3", "4", "5", "2.000", "0.100", "100", "B", "4.0", "s", "10", "J", "bytes"]


def test_many_numbers_are_put_into_quarters() -> None:
    rates = [index / 100 for index in range(1, 21)]
    columns = {name: [1.0] * 20 for name in ("rouge_l", "total_bytes", "seconds", "joules", "cost_usd")}
    table = pd.DataFrame({"trial": [f"t{i}" for i in range(20)], "rate": rates, "bits_per_byte": rates, **columns})
    effects = result(keys=("rate",), trials=table.assign(status="finished", rounds=1)).effects()
    assert effects["trials"].tolist() == [5, 5, 5, 5]
    assert effects["mean"].tolist() == pytest.approx([0.03, 0.08, 0.13, 0.18])


def test_the_page_shows_three_fronts_and_every_effect_and_needs_nothing_else(tmp_path: Path) -> None:
    write_sweep_report(result(), "space: {}", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r'<figure id="figure-([\w-]+)"', page)
    assert figures[:3] == ["front-total-bytes", "front-seconds", "front-joules"]
    assert figures[3:] == ["effect-prompts-budget", "effect-clients-mix"]
    for cost, members in result().fronts().items():
        section = page[page.index(f'id="front-{cost}"') :].split("</section>")[0]
        assert section.count("<tr>") == 1 + len(members)
    assert "tiny &lt;b&gt;" in page
    assert "tiny <b>" not in page
    assert "default-src 'none'" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert len(page) < 1_000_000


def test_the_table_names_fronts_and_what_did_not_finish() -> None:
    text = render_sweep(result(), 160)
    lines = {line.split()[0]: line for line in text.splitlines() if line[:1].isdigit()}
    assert "stopped after round 1 (1 visit failed)" in text
    assert "bytes, energy (3 visits failed)" in text
    assert "bytes, time, energy" in text
    assert lines
    assert "clients.mix 0.750, prompts.budget 0.250" in text


def test_nats_a_token_stand_beside_the_metric_where_all_trials_have_one_model(tmp_path: Path) -> None:
    assert list(result().shown) == ["bits_per_byte", "rouge_l"]
    assert "NLL" not in render_sweep(result(), 160)
    one = result(loss="nll", trials=trials(mean_nll=[1.25] * 5))
    assert list(one.shown) == ["bits_per_byte", "mean_nll", "rouge_l"]
    assert "mean test NLL" in render_sweep(one, 160)
    write_sweep_report(one, "space: {}", tmp_path / "report.html")
    assert "<td>1.250</td>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert list(result(metric="rouge_l", loss="nll").shown) == ["rouge_l", "mean_nll"]


def test_a_sweep_in_which_nothing_finished_has_a_report_all_the_same(tmp_path: Path) -> None:
    unfinished = result(trials=trials(status=["unfinished"] * 5))
    write_sweep_report(unfinished, "space: {}", tmp_path / "report.html")
    assert "unfinished after round 2" in render_sweep(unfinished, 160)
