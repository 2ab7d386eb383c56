import math
import re
from xml.etree import ElementTree

import pandas as pd
import pytest

from semcons_ray.reporting.drawing import CLIENT_COLOURS, client_colours
from semcons_ray.reporting.figures import MAX_LINES, draw_figures
from semcons_ray.reporting.tables import read_run
from semcons_ray.reporting.timeline import MAX_WORKERS, merged, without_pauses
from tests.reporting.builder import HOSTILE, forget_rounds_after, write_run

ALL = ["nll", "rouge_l", "similarity", "wins", "agreement", "churn", "bytes", "energy", "timeline"]


def figures(folder, **shape):
    return {figure.name: figure for figure in draw_figures(read_run(write_run(folder, **shape)))}


def edit(folder, name, change):
    frame = pd.read_parquet(folder / name)
    change(frame)
    frame.to_parquet(folder / name, index=False)
    return {figure.name: figure for figure in draw_figures(read_run(folder))}


def test_every_figure_is_an_svg_that_names_nothing_outside(tmp_path):
    drawn = figures(tmp_path / "run")
    assert list(drawn) == ALL
    ids = []
    for figure in drawn.values():
        ElementTree.fromstring(figure.svg)
        addresses = set(re.findall(r'https?://[^"\s<]+', figure.svg))
        assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, never fetched
        ids += re.findall(r' id="([^"]+)"', figure.svg)
    assert len(ids) == len(set(ids))


def test_every_caption_says_how_its_numbers_are_known(tmp_path):
    for source in ("measured", "estimated"):
        drawn = figures(tmp_path / source, energy_source=source)
        assert source in drawn["energy"].caption
        assert all(re.search(r"\b[Mm]easured\b", drawn[name].caption) for name in ALL if name != "energy")


def test_titles_say_the_finding(tmp_path):
    drawn = figures(tmp_path / "run")
    assert drawn["nll"].title == "Mean test NLL fell from 2.00 to 1.60"
    assert drawn["rouge_l"].title == "Mean ROUGE-L rose from 0.00 to 0.20"
    assert drawn["wins"].title == "Wins are spread: no client won more than 2 of 5 prompts in round 2"
    assert drawn["agreement"].title == "Clients agree at a mean cosine of 0.40"
    assert drawn["churn"].title == "The pseudo-label of 40% of prompts changed in round 2"
    assert drawn["bytes"].title == "453 B a round crossed the wire"
    assert drawn["energy"].title == "Loading models took 36% of 330 J (estimated)"  # 120 J beside 120, 60 and 30
    # 12 + 12 + 6 + 3 seconds of work, and 3 of idling.
    assert drawn["timeline"].title == "Loading models took 36% of work time; workers were busy 92% of the time"


def test_a_run_that_got_worse_says_so_and_when_it_was_best(tmp_path):
    folder = write_run(tmp_path / "run", num_rounds=3)

    def overfit(metrics):
        metrics["nll"] = metrics["round"].map({0: 2.0, 1: 1.5, 2: 1.8, 3: 2.4})

    drawn = edit(folder, "metrics.parquet", overfit)
    assert drawn["nll"].title == "Mean test NLL rose from 2.00 to 2.40; best after round 1 (1.50)"


def test_a_run_that_only_got_worse_was_not_best_later(tmp_path):
    folder = write_run(tmp_path / "run")

    def worsen(metrics):
        metrics["nll"] = 2.0 + metrics["round"]

    assert edit(folder, "metrics.parquet", worsen)["nll"].title == "Mean test NLL rose from 2.00 to 4.00"


def test_one_client_that_takes_all_is_named(tmp_path):
    folder = write_run(tmp_path / "run", num_rounds=1)

    def collapse(rows):
        rows["chosen"] = (rows["client_id"] == 2) & (rows["prompt_id"] > 0)

    drawn = edit(folder, "consensus/round_001.parquet", collapse)
    assert drawn["wins"].title == "Client 2 won 4 of 5 prompts in round 1"


def test_local_only_has_neither_bytes_nor_consensus(tmp_path):
    assert list(figures(tmp_path / "run", local_only=True)) == ["nll", "rouge_l", "similarity", "energy", "timeline"]


def test_energy_that_is_unavailable_is_not_drawn(tmp_path):
    assert "energy" not in figures(tmp_path / "run", energy_source="unavailable")


def test_a_metric_that_was_never_measured_is_not_drawn(tmp_path):
    folder = write_run(tmp_path / "run")

    def forget(metrics):
        metrics["rouge_l"] = math.nan
        metrics.loc[(metrics["client_id"] == 1) & (metrics["round"] == 1), "nll"] = math.nan

    assert list(edit(folder, "metrics.parquet", forget)) == [name for name in ALL if name != "rouge_l"]


@pytest.mark.parametrize(
    "shape",
    [
        {"num_clients": 1, "num_rounds": 1, "num_prompts": 1},
        {"num_clients": 2, "num_rounds": 1, "lost": {1: (0, 1)}},
        {"num_clients": 4, "models": ("org/$a_{", "b<c>&\"'", "packaged:d"), "lost": {1: (0,), 2: (0, 3)}},
    ],
)
def test_small_mixed_and_broken_runs_are_drawn(tmp_path, shape):
    for figure in figures(tmp_path / "run", **shape).values():
        ElementTree.fromstring(figure.svg)


def test_a_run_that_only_measured_the_base_is_drawn(tmp_path):
    run = read_run(forget_rounds_after(write_run(tmp_path / "run"), 0))
    assert [figure.title for figure in draw_figures(run)] == [
        "Mean test NLL is 2.000",
        "Mean ROUGE-L is 0.000",
        "Mean similarity is 0.300",
        "Loading models took 100% of 120 J (estimated)",
        "Loading models took 100% of work time; workers were busy 100% of the time",
    ]


def test_one_client_has_no_mean(tmp_path):
    drawn = figures(tmp_path / "run", num_clients=1)
    assert drawn["nll"].title.startswith("Test NLL fell")
    assert "mean over clients" not in drawn["nll"].caption


def test_models_that_differ_are_named_and_not_compared(tmp_path):
    drawn = figures(tmp_path / "run", models=("org/one", "org/two"))
    assert list(drawn) == ["bits_per_byte", *ALL]
    assert "1 · two" in drawn["nll"].svg
    assert drawn["nll"].title == "Test NLL of each client"
    assert ">mean<" not in drawn["nll"].svg
    assert "compare levels within a model only" in drawn["nll"].caption
    assert "compare levels" not in drawn["rouge_l"].caption + drawn["bits_per_byte"].caption
    assert drawn["bits_per_byte"].title == "Mean bits per byte fell from 0.83 to 0.67"
    assert ">mean<" in drawn["bits_per_byte"].svg


def test_many_clients_are_shaded_and_take_no_more_room_than_few(tmp_path):
    sizes = [len(figures(tmp_path / f"{count}", num_clients=count, num_prompts=1)["nll"].svg) for count in (120, 360)]
    assert sizes[1] < 1.05 * sizes[0]
    lines = figures(tmp_path / "lines", num_clients=MAX_LINES, num_prompts=1)["nll"]
    assert "FillBetween" not in lines.svg
    assert "thin lines are all 100" in lines.caption


def test_shades_hold_the_middle_of_clients_with_their_last_measurement(tmp_path):
    """Of 101 clients, client c has NLL 2 - 0.1 (c + 1) after round 1, the last for all but the first; so quantile q is
    that of client 100 (1 - q)."""
    drawn = figures(tmp_path / "run", num_clients=101, num_prompts=1, lost={2: (*range(1, 101),)})["nll"]
    assert "The dark band holds the middle half of 101 clients, the light one the middle 90%" in drawn.caption
    for band, (low, high) in enumerate([(95, 5), (75, 25)], start=1):
        path = re.search(rf'id="nll-FillBetweenPolyCollection_{band}".*? d="([^"]*)"', drawn.svg, re.DOTALL)[1]
        points = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]
        end, start = max(x for x, _ in points), min(x for x, _ in points)
        heights = {side: sorted(y for x, y in points if x == side) for side in (start, end)}
        assert heights[start][0] == heights[start][-1]  # one base model
        pixels = heights[end][-1] - heights[end][0]
        below_base = heights[end][-1] - heights[start][0]
        assert pixels / below_base == pytest.approx((low - high) / (low + 1), rel=0.01)


def test_a_mean_says_of_how_many_clients_it_is_new(tmp_path):
    drawn = figures(tmp_path / "run", lost={2: (1,)})
    said = "2 of 3 clients measured in round 2; others count with their last measurement."
    assert all(said in drawn[name].caption for name in ("nll", "rouge_l", "similarity"))
    assert "others count" not in figures(tmp_path / "whole")["nll"].caption


def test_a_mean_that_is_no_number_is_said_to_be_none(tmp_path):
    folder = write_run(tmp_path / "run")

    def diverge(metrics):
        metrics.loc[(metrics["client_id"] == 1) & (metrics["round"] == 2), "nll"] = math.nan

    assert edit(folder, "metrics.parquet", diverge)["nll"].title == "Mean test NLL is no number after round 2"


def test_a_last_round_without_answers_is_no_round_of_the_consensus(tmp_path):
    drawn = figures(tmp_path / "run", num_rounds=3, answer_last_round=False)
    assert list(drawn) == ALL
    assert drawn["wins"].title.endswith("in round 2")
    assert drawn["agreement"].title == "Clients agree at a mean cosine of 0.40"
    assert drawn["churn"].title == "The pseudo-label of 40% of prompts changed in round 2"


def test_answers_that_stand_alone_have_no_agreement_to_draw(tmp_path):
    folder = write_run(tmp_path / "run")
    for number in (1, 2):
        rows = pd.read_parquet(folder / f"consensus/round_{number:03d}.parquet")
        rows.assign(agreement=math.nan).to_parquet(folder / f"consensus/round_{number:03d}.parquet", index=False)
    assert [figure.name for figure in draw_figures(read_run(folder))] == [name for name in ALL if name != "agreement"]


def test_reference_answers_are_won_by_nobody(tmp_path):
    drawn = figures(tmp_path / "run", settings={"algorithm": {"rule": "reference", "answer_last_round": True}})
    assert list(drawn) == [name for name in ALL if name != "wins"]


def test_many_clients_stay_small_and_say_what_is_left_out(tmp_path):
    drawn = figures(tmp_path / "run", num_clients=MAX_WORKERS + 8, num_rounds=12, num_prompts=60)
    assert sum(len(figure.svg) for figure in drawn.values()) < 1_500_000
    assert "thin lines are all 48" in drawn["nll"].caption
    assert "Shown are the 40 of 48 workers with most work." in drawn["timeline"].caption


def test_a_client_keeps_its_colour_in_every_figure(tmp_path):
    drawn = figures(tmp_path / "run")
    for name in ("nll", "rouge_l", "similarity", "wins"):
        assert all(colour.lower() in drawn[name].svg for colour in CLIENT_COLOURS[:3])
    assert len(set(client_colours(range(64)).values())) == 64
    assert list(client_colours([3, 5]).values()) == list(CLIENT_COLOURS[:2])


def test_a_stopped_run_does_not_stretch_the_timeline(tmp_path):
    folder = write_run(tmp_path / "run")

    def stop_before_the_last_round(frame):
        frame.loc[frame["round"] == 2, "started_at"] += 7200.0

    edit(folder, "ledger.parquet", stop_before_the_last_round)
    drawn = edit(folder, "rounds.parquet", stop_before_the_last_round)
    assert "stopped 2 h 00 min" in drawn["timeline"].svg
    assert "time since the first work (s)" in drawn["timeline"].svg


def test_a_driver_whose_clock_is_off_does_not_spoil_the_timeline(tmp_path):
    folder = write_run(tmp_path / "run")

    def two_hours_ahead(rounds):
        rounds["started_at"] += 7200.0

    ElementTree.fromstring(edit(folder, "rounds.parquet", two_hours_ahead)["timeline"].svg)


def test_pauses_are_cut_out_of_the_axis():
    squeeze, pauses, end = without_pauses([(0.0, 40.0), (30.0, 50.0), (70.0, 100.0), (1000.0, 1020.0)])
    assert pauses == [(100.0, 1000.0)]  # 20 s of nobody at work are idling; 900 s after 100 s of run are a stop
    assert [squeeze(seconds) for seconds in (0.0, 60.0, 100.0, 550.0, 1000.0, 1010.0)] == [0, 60, 100, 100, 100, 110]
    assert end == 120.0


def test_bars_that_touch_are_one():
    assert merged([(5.0, 6.0), (0.0, 2.0), (1.0, 1.5), (2.5, 3.0)], gap=0.5) == [(0.0, 3.0), (5.0, 6.0)]


def test_the_same_run_gives_the_same_figures(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert draw_figures(run) == draw_figures(run)


def test_hostile_names_are_escaped(tmp_path):
    drawn = figures(tmp_path / "run", models=(HOSTILE, "m"))
    assert all("<script" not in figure.svg and "<img" not in figure.svg for figure in drawn.values())
    assert all(ElementTree.fromstring(figure.svg) is not None for figure in drawn.values())
