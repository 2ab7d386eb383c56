import io
import math

import pandas as pd
import pytest
from rich.console import Console

from semcons_ray.errors import RunFolderError
from semcons_ray.reporting.tables import (
    agreement,
    busy_share,
    by_round_and_stage,
    bytes_by_round,
    energy,
    format_number,
    format_seconds,
    held_by_round,
    mean_by_round,
    metric_by_round,
    metric_table,
    print_result,
    quality,
    read_run,
    render_result,
    short_model_name,
    task_table,
    totals,
    wins,
    work_by_stage,
)
from tests.reporting.builder import forget_rounds_after, ledger_row, metrics_row, write_items, write_run


@pytest.fixture
def run(tmp_path):
    """3 clients, 2 rounds, 5 prompts; client 1 is lost in round 2."""
    return read_run(write_run(tmp_path / "run", lost={2: (1,)}))


def test_a_run_folder_is_read_whole(run):
    assert run.num_rounds == 2
    assert sorted(set(run.consensus["round"])) == [1, 2]
    assert len(run.consensus) == 2 * 5 * 3
    assert run.config["prompts"]["budget"] == 5
    assert run.placement["workers"][2]["clients"] == [2]
    assert run.environment["cpu"] == "A CPU"


def test_local_only_has_no_consensus_but_its_columns(tmp_path):
    run = read_run(write_run(tmp_path / "run", local_only=True))
    assert run.consensus.empty
    assert wins(run.consensus).empty
    assert run.loss == "nll"
    assert bytes_by_round(run.ledger)["total_bytes"].tolist() == [0, 0]


def test_answers_of_a_round_that_is_not_done_are_left_out(tmp_path):
    run = read_run(forget_rounds_after(write_run(tmp_path / "run"), 1))
    assert (run.num_rounds, set(run.consensus["round"])) == (1, {1})
    assert "1 of 2 rounds" in render_result(run)


NEEDED = ("config.yaml", "rounds.parquet", "metrics.parquet", "ledger.parquet", "data.parquet", "environment.json",
          "placement.json", "consensus/round_002.parquet")  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_missing_is_named_in_one_line(tmp_path, name):
    folder = write_run(tmp_path / "run")
    (folder / name).unlink()
    with pytest.raises(RunFolderError) as caught:
        read_run(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_damaged_is_named_in_one_line(tmp_path, name):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes((folder / name).read_bytes()[:-9] + b"\x00: [\n{")
    with pytest.raises(RunFolderError) as caught:
        read_run(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="is not a folder"):
        read_run(tmp_path / "absent")


def test_a_column_that_is_missing_or_of_the_wrong_kind_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    metrics = pd.read_parquet(folder / "metrics.parquet")
    metrics.drop(columns="nll").to_parquet(folder / "metrics.parquet")
    with pytest.raises(RunFolderError, match=r"metrics\.parquet lacks column nll"):
        read_run(folder)
    metrics.assign(nll="low").to_parquet(folder / "metrics.parquet")
    with pytest.raises(RunFolderError, match=r"metrics\.parquet is damaged"):
        read_run(folder)


def test_json_that_is_no_object_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "placement.json").write_text("[1]")
    with pytest.raises(RunFolderError, match=r"placement\.json is damaged: it holds a list"):
        read_run(folder)


def test_quality_from_base_to_last_measurement(run):
    table = quality(run.metrics)
    assert table["base_nll"].tolist() == [2.0, 2.0, 2.0]
    # Client 1 was lost in round 2, so its last is round 1's 2 - 0.1 * 2.
    assert table["last_nll"].tolist() == pytest.approx([1.8, 1.8, 1.4])
    assert table["change_nll"].tolist() == pytest.approx([-0.2, -0.2, -0.6])
    assert table["last_round"].tolist() == [2, 1, 2]
    assert table["last_rouge_l"].tolist() == pytest.approx([0.2, 0.1, 0.2])
    assert table["change_similarity"].tolist() == pytest.approx([0.2, 0.1, 0.2])


def test_the_mean_keeps_the_last_measurement_of_a_client_that_sat_out(run):
    assert mean_by_round(run.metrics, "nll").tolist() == pytest.approx([2.0, 1.8, (1.8 + 1.8 + 1.4) / 3])
    assert math.isnan(metric_by_round(run.metrics, "nll").loc[2, 1])


def test_a_mean_has_all_clients_or_is_none():
    metrics = pd.DataFrame([metrics_row(0, 0, "m"), metrics_row(1, 0, "m"), metrics_row(1, 1, "m")])
    assert mean_by_round(metrics, "nll").to_dict() == pytest.approx({1: (1.9 + 1.8) / 2})  # client 1 had no base
    diverged = pd.concat([metrics, pd.DataFrame([metrics_row(2, 0, "m", nll=math.nan), metrics_row(2, 1, "m")])])
    assert held_by_round(diverged, "nll")[0].tolist() == pytest.approx([2.0, 1.9, math.nan], nan_ok=True)
    assert mean_by_round(diverged, "nll").tolist() == pytest.approx([1.85, math.nan], nan_ok=True)
    assert mean_by_round(metrics.assign(rouge_l=math.nan), "rouge_l").empty


def test_nats_a_token_have_a_mean_over_one_model_alone(tmp_path):
    run = read_run(write_run(tmp_path / "run", models=("org/one", "org/two")))
    assert run.loss == "bits_per_byte"
    assert mean_by_round(run.metrics, "nll").empty
    # 1, 0.5 and 1 bits per byte of the base models.
    assert mean_by_round(run.metrics, "bits_per_byte").tolist() == pytest.approx([2.5 / 3, 2.25 / 3, 2.0 / 3])


def test_a_run_that_went_on_may_lack_the_answers_of_what_was_its_last_round(tmp_path):
    # Three rounds, of which the second was the last when it was run: nobody answered then.
    folder = write_run(tmp_path / "run", num_rounds=3)
    (folder / "consensus/round_002.parquet").unlink()
    rounds = pd.read_parquet(folder / "rounds.parquet")
    rounds.loc[rounds["round"] == 2, ["num_labels", "mean_agreement"]] = 0, math.nan
    rounds.to_parquet(folder / "rounds.parquet", index=False)
    assert set(read_run(folder).consensus["round"]) == {1, 3}


def test_answers_that_gave_no_label_are_read_all_the_same(tmp_path):
    folder = write_run(tmp_path / "run")
    rounds = pd.read_parquet(folder / "rounds.parquet")
    rounds.assign(num_labels=0, mean_agreement=math.nan).to_parquet(folder / "rounds.parquet", index=False)
    assert set(read_run(folder).consensus["round"]) == {1, 2}


def test_what_was_never_measured_is_nan_and_not_zero():
    metrics = pd.DataFrame(
        [
            metrics_row(0, 0, "m", rouge_l=math.nan),
            metrics_row(1, 0, "m", rouge_l=math.nan, nll=math.nan),
            metrics_row(1, 7, "m", rouge_l=math.nan, nll=1.5),  # a base that was not measured
        ]
    )
    table = quality(metrics)
    assert table["last_nll"].tolist() == pytest.approx([math.nan, 1.5], nan_ok=True)  # and not the base's 2.0
    assert table["change_nll"].isna().all()
    assert table["last_round"].tolist() == [1, 1]
    assert table["last_rouge_l"].isna().all()
    assert metric_by_round(metrics, "rouge_l").empty


def test_bytes_by_round(run):
    table = bytes_by_round(run.ledger)
    assert table["uplink_bytes"].tolist() == [100 + 101 + 102, 100 + 102]
    assert table["downlink_bytes"].tolist() == [150, 100]
    assert table["total_bytes"].tolist() == [453, 302]


def test_work_by_stage_and_by_round(run):
    table = work_by_stage(run.ledger)
    assert table.index.tolist() == ["load", "fine_tune", "generate", "evaluate", "idle"]
    assert table["seconds"].tolist() == pytest.approx([12.0, 10.0, 5.0, 2.5, 2.5])
    assert table["joules"].tolist() == pytest.approx([120.0, 100.0, 50.0, 25.0, 0.0])
    assert table["share"].tolist() == pytest.approx([12 / 32, 10 / 32, 5 / 32, 2.5 / 32, 2.5 / 32])
    joules = by_round_and_stage(run.ledger, "energy_joules")
    assert joules["fine_tune"].tolist() == [0.0, 60.0, 40.0]
    assert joules.sum().sum() == pytest.approx(totals(run).joules)


def test_energy_says_how_it_is_known():
    def source(*rows):
        return energy(pd.DataFrame([ledger_row(1, 0, "w", stage, 0.0, 1.0, source) for stage, source in rows]))

    assert source(("embed", "measured"), ("idle", "estimated")) == (10.0, "measured")
    assert source(("embed", "measured"), ("load", "estimated")) == (20.0, "measured and estimated")
    assert source(("embed", "estimated"), ("load", "unavailable")) == (10.0, "estimated, partly unavailable")
    assert source(("idle", "estimated")) == (0.0, "estimated")
    joules, name = source(("embed", "unavailable"))
    assert math.isnan(joules)
    assert name == "unavailable"


def test_busy_share_is_of_workers_whose_idle_time_is_known():
    rows = [
        ledger_row(1, 0, "a", "generate", 0.0, 3.0),
        ledger_row(1, -1, "a", "idle", 0.0, 1.0),
        ledger_row(1, -1, "server", "embed", 0.0, 3.0),
    ]
    share = busy_share(pd.DataFrame(rows))
    assert share["a"] == 0.75
    assert math.isnan(share["server"])


def test_wins_count_pseudo_labels(run):
    # Client (prompt + round) % 3 of prompts 1 to 4: prompts 2; 3 and so on; client 1 is lost in round 2.
    assert wins(run.consensus).to_dict() == {1: {0: 1, 1: 1, 2: 2}, 2: {0: 2, 1: 0, 2: 1}}


def test_agreement_counts_a_prompt_once(run):
    table = agreement(run.consensus)
    assert table.loc[1].to_dict() == pytest.approx(
        {"mean": 0.4, "abstained": 0.2, "q10": 0.08, "q25": 0.2, "q50": 0.4, "q75": 0.6, "q90": 0.72}
    )


def test_totals(run):
    cost = totals(run)
    assert (cost.uplink_bytes, cost.downlink_bytes) == (505, 250)
    assert (cost.wall_seconds, cost.setup_seconds) == (12.0, 4.0)
    assert (cost.joules, cost.energy_source) == (295.0, "estimated")


def test_the_result_table_shows_numbers_units_and_sources(run):
    lines = [line.strip() for line in render_result(run, 120).splitlines()]
    cells = [[cell.strip() for cell in line.split("│")] for line in lines]
    assert ["0", "tiny-model", "2.000", "1.800", "−0.200", "0.200", "0.500"] in cells
    assert ["1", "tiny-model", "2.000", "1.800 (round 1)", "−0.200", "0.100", "0.400"] in cells
    mean = next(row for row in cells if row[0] == "mean")
    assert mean == ["mean", "2 of 3 clients measured in round 2", "2.000", "1.667", "−0.333", "0.167", "0.467"]
    assert "left out     1 visit failed; in round 2: client 1, round 2: it died" in lines
    assert "on the wire  505 B up, 250 B down (measured)" in lines
    assert "wall time    12.0 s, set-up 4.0 s of it (measured)" in lines
    assert "energy       295 J (estimated)" in lines


def table_rows(run):
    lines = render_result(run, 140).splitlines()
    return [[cell.strip() for cell in line.replace("┃", "│").split("│")] for line in lines]


def test_the_result_never_shows_the_base_as_the_last_without_saying_so(tmp_path):
    failed = read_run(write_run(tmp_path / "run", num_rounds=2, lost={1: (0,), 2: (0, 1)}))
    rows = {row[0]: row for row in table_rows(failed)}
    assert [rows[client][3] for client in ("0", "1", "2")] == ["2.000 (base)", "1.800 (round 1)", "1.400"]
    assert rows["mean"][1] == "1 of 3 clients measured in round 2"
    early = read_run(forget_rounds_after(write_run(tmp_path / "early"), 0))
    assert {row[3] for row in table_rows(early) if row[0] in "012" and len(row) > 1} == {"2.000 (base)"}
    folder = write_run(tmp_path / "rarely")  # in round 2 nothing was measured
    metrics = pd.read_parquet(folder / "metrics.parquet")
    metrics[metrics["round"] == 0].to_parquet(folder / "metrics.parquet", index=False)
    assert {row[3] for row in table_rows(read_run(folder)) if row[0] in "012" and len(row) > 1} == {"2.000 (base)"}


def test_the_result_of_models_that_differ_is_in_bits_per_byte(tmp_path):
    rows = table_rows(read_run(write_run(tmp_path / "run", models=("org/one", "org/two"))))
    headings = next(row for row in rows if row[0] == "client")
    assert headings[2:5] == ["base bits/byte", "last bits/byte", "change"]
    assert ["1", "two", "0.500", "0.400", "−0.100", "0.200", "0.500"] in rows
    assert ["mean", "", "0.833", "0.667", "−0.167", "0.200", "0.500"] in rows


def test_of_many_clients_the_result_shows_the_worst_and_says_how_many_others_there_are(tmp_path):
    run = read_run(write_run(tmp_path / "run", num_clients=55))  # the higher the id, the lower the NLL
    shown = [row[0] for row in table_rows(run) if len(row) == 7]
    assert shown == ["client", *map(str, range(40)), "mean"]
    assert "the 40 clients of the highest NLL; metrics.parquet has 15 more" in " ".join(render_result(run, 140).split())
    all_of_them = read_run(write_run(tmp_path / "few", num_clients=40))
    assert "Shown are" not in render_result(all_of_them, 140)
    assert len([row for row in table_rows(all_of_them) if len(row) == 7]) == 42


def test_the_result_says_when_energy_is_unavailable(tmp_path):
    text = render_result(read_run(write_run(tmp_path / "run", energy_source="unavailable")))
    assert "energy       unavailable" in text


def test_markup_in_a_name_is_only_text(tmp_path):
    run = read_run(write_run(tmp_path / "run", models=("org/[bold]m[/x]",), settings={"name": "[red]"}))
    text = render_result(run, 120)
    assert "[red]: 2 of 2 rounds" in text
    assert "x]" in text


def test_the_result_has_each_metric_with_its_interval_and_the_least_change_that_is_seen(tmp_path):
    run = read_run(write_items(write_run(tmp_path / "run", lost={2: (1,)})))
    text = render_result(run, 120)
    rows = {row[0]: row[1:] for row in table_rows(run)}
    assert rows["mean over clients"] == ["base", "last", "change", "least that is seen", "questions"]
    nll = rows["NLL"]
    assert nll[0].startswith("2.000 [1.8")
    assert nll[1].startswith("1.667 [1.5")  # client 1 as it was after round 1
    assert nll[2].startswith("−0.333 [−0.3")
    assert nll[4] == "40"
    assert rows["ROUGE-L"] == ["0.000 [0.000, 0.000]", "0.167 [0.167, 0.167]", "+0.167 [+0.167, +0.167]", "0.000", "20"]
    table = metric_table(run)
    assert table.index.tolist() == ["nll", "bits_per_byte", "rouge_l", "similarity"]
    # All models find the same questions hard, so their difference is known better than either.
    ratio = table.loc["nll", "smallest"] / (table.loc["nll", "base_high"] - table.loc["nll", "base_low"])
    assert ratio == pytest.approx(0.5 * 0.333 / 2.0, rel=0.01)
    assert "2,000 draws" in text
    assert "mean over clients" not in render_result(read_run(write_run(tmp_path / "older")))


def test_nats_a_token_of_several_models_have_no_interval(tmp_path):
    run = read_run(write_items(write_run(tmp_path / "run", models=("org/one", "org/two"))))
    assert metric_table(run).index.tolist() == ["bits_per_byte", "rouge_l", "similarity"]


def test_items_that_are_missing_or_damaged_are_named_in_one_line(tmp_path):
    folder = write_items(write_run(tmp_path / "run"))
    path = folder / "items/round_002.parquet"
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-9]), path.unlink):
        damage()
        with pytest.raises(RunFolderError, match=r"items/round_002\.parquet"):
            read_run(folder)


def test_scores_of_tasks_are_beside_those_of_the_base_model(tmp_path):
    folder = write_run(tmp_path / "run")
    metrics = pd.read_parquet(folder / "metrics.parquet")
    scores = {0: 0.25, 1: math.nan, 2: 0.75}
    metrics["lm_eval/mine/acc"] = metrics["round"].map(scores) + metrics["client_id"] / 100
    metrics["lm_eval/mine/acc_stderr"] = 0.1
    metrics.to_parquet(folder / "metrics.parquet", index=False)
    run = read_run(folder)
    assert ["mine/acc", "0.260 ± 0.196", "0.760 ± 0.196", "+0.500"] in table_rows(run)
    row = task_table(run.metrics).loc["mine/acc"]
    assert (row["base"], row["last"], row["change"]) == pytest.approx((0.26, 0.76, 0.5))


def test_the_result_goes_to_the_console_given(run):
    stream = io.StringIO()
    print_result(run, Console(file=stream, width=100, color_system=None))
    assert stream.getvalue() == render_result(run, 100)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (200, "3 min 20 s"), (3599.6, "1 h 00 min"),
     (18_120, "5 h 02 min"), (math.nan, "–")],
)  # fmt: skip
def test_seconds(value, text):
    assert format_seconds(value) == text


def test_numbers_and_names():
    assert format_number(-0.5) == "−0.500"
    assert format_number(0.5, 1, signed=True) == "+0.5"
    assert format_number(math.nan) == "–"
    assert [short_model_name(name) for name in ("org/model", "packaged:m", "/a/b/", "m", "/")] == [
        "model", "m", "b", "m", "/"]  # fmt: skip
