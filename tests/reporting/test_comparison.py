import io
import math
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from semcons_ray.errors import RunFolderError
from semcons_ray.reporting.comparison import (
    compare_runs,
    costs_by_round,
    summarize,
)
from semcons_ray.reporting.intervals import mean_and_half_width
from semcons_ray.reporting.pareto import arm_styles, pareto_front, write_pareto
from semcons_ray.reporting.summary import render_summary, summary_cells, summary_markdown
from semcons_ray.reporting.tables import read_run
from tests.reporting.builder import HOSTILE, write_items, write_run

T_OF_2 = 4.302652729911275  # 97.5th percentile of Student's t, from a table
LANDMARKS = {"reference": "averaging", "baseline": "alone"}
BY_NLL = {"loss": "nll", **LANDMARKS}


def arm(name, finals, total_bytes, *, base=2.0, middle=1.5, algorithm="semantic_consensus", joules=30.0):
    """An arm's rounds 0, 1 and 2 for seeds 0, 1, ... that end at `finals`."""
    return pd.DataFrame(
        [
            {
                "arm": name,
                "algorithm": algorithm,
                "seed": seed,
                "round": round,
                "mean_nll": nll,
                "worst_nll": nll + 0.5,
                "bits_per_byte": nll / 2,
                "worst_bits_per_byte": nll / 2 + 0.25,
                "rouge_l": 0.1 * round,
                "similarity": 0.2 * round,
                "train_loss": 1.0,
                "visits": 4 * round,
                "failed": 0,
                "uplink_bytes": sent,
                "downlink_bytes": 0,
                "total_bytes": sent,
                "untold": 0,
                "seconds": 10.0 * (round + 1) + seed,
                "cost_usd": 0.0,
                "joules": joules * (round + 1),
                "energy_source": "unavailable" if math.isnan(joules) else "estimated",
            }
            for seed, final in enumerate(finals)
            for round, (nll, sent) in enumerate(zip((base, middle, final), total_bytes, strict=True))
        ]
    )


@pytest.fixture
def rounds():
    return pd.concat(
        [
            arm("consensus", (1.2, 1.3, 1.1), (10, 50, 100)),
            arm("alone", (1.4, 1.6, 1.2), (0, 0, 0), algorithm="local_only"),
            arm("averaging", (1.0, 1.1, 0.9), (0, 80, 160), algorithm="fedavg_lora"),
            arm("heavy", (0.8, 0.8, 0.8), (200, 400, 600), algorithm="flora"),
        ],
        ignore_index=True,
    )


@pytest.fixture
def summary(rounds):
    return summarize(rounds, first="consensus", **BY_NLL)


def test_means_and_t_intervals(summary):
    assert summary.index.tolist() == ["consensus", "alone", "averaging", "heavy"]
    assert summary["nll"].tolist() == pytest.approx([1.2, 1.4, 1.0, 0.8])
    # Standard deviations of 0.1, 0.2, 0.1 and 0 over three seeds.
    widths = [T_OF_2 * deviation / math.sqrt(3) for deviation in (0.1, 0.2, 0.1, 0.0)]
    assert summary["nll_half_width"].tolist() == pytest.approx(widths)
    assert summary.loc["consensus", ["worst_nll", "rouge_l", "similarity"]].tolist() == pytest.approx([1.7, 0.2, 0.4])
    assert summary.loc["consensus", ["seconds", "joules"]].tolist() == pytest.approx([31.0, 90.0])
    assert summary["seeds"].tolist() == [3, 3, 3, 3]


def test_bytes_of_a_visit_and_how_many_fewer(summary):
    assert summary["bytes"].tolist() == [100, 0, 160, 600]
    assert summary["bytes_per_visit"].tolist() == [12.5, 0, 20, 75]
    assert summary["bytes_ratio"].tolist() == pytest.approx([1.6, math.inf, 1.0, 160 / 600])


def test_gap_closed_is_0_for_the_baseline_and_1_for_the_reference(summary):
    assert summary["gap_closed"].tolist() == pytest.approx([0.5, 0.0, 1.0, 1.5])


def test_no_gap_where_the_reference_is_no_better(rounds):
    table = summarize(rounds, loss="nll", first="consensus", reference="alone", baseline="averaging")
    assert table["gap_closed"].isna().all()


def test_differences_are_taken_seed_by_seed(summary):
    assert summary["difference"].tolist() == pytest.approx([0.0, 0.2, -0.2, -0.4])
    # Against consensus: alone +0.2, +0.3, +0.1; averaging always -0.2; heavy -0.4, -0.5, -0.3.
    widths = [T_OF_2 * deviation / math.sqrt(3) for deviation in (0.0, 0.1, 0.0, 0.1)]
    assert summary["difference_half_width"].tolist() == pytest.approx(widths, abs=1e-9)


def test_nll_at_equal_bytes(summary):
    # Consensus sent 100 B: averaging had by round 1, and heavy not even by round 0, which is always granted.
    assert summary["at_equal_bytes"].tolist() == pytest.approx([1.2, 1.4, 1.5, 2.0])


def test_models_that_differ_are_compared_in_bits_per_byte(rounds):
    # Averaging has the best bits per byte, but "heavy" the lowest NLL: its model cuts text into more tokens.
    mixed = rounds.assign(bits_per_byte=rounds["mean_nll"] / 2, worst_bits_per_byte=rounds["worst_nll"] / 2)
    mixed.loc[mixed["arm"] == "heavy", ["bits_per_byte", "worst_bits_per_byte"]] *= 4
    mixed.loc[mixed["arm"] == "consensus", ["mean_nll", "worst_nll"]] = math.nan
    table = summarize(mixed, loss="bits_per_byte", first="consensus", **LANDMARKS)
    assert table["bits_per_byte"].tolist() == pytest.approx([0.6, 0.7, 0.5, 1.6])
    assert table["worst_bits_per_byte"].tolist() == pytest.approx([0.85, 0.95, 0.75, 2.6])
    assert table["nll"].tolist() == pytest.approx([math.nan, 1.4, 1.0, 0.8], nan_ok=True)
    assert table["difference"].tolist() == pytest.approx([0.0, 0.1, -0.1, 1.0])
    assert table["gap_closed"].tolist() == pytest.approx([0.5, 0.0, 1.0, -4.5])
    assert table["at_equal_bytes"].tolist() == pytest.approx([0.6, 0.7, 0.75, 4.0])
    cells = summary_cells(table).set_index("arm")
    assert cells.columns[:3].tolist() == ["bits per byte", "worst client", "test NLL"]
    assert cells.loc["consensus"].tolist()[:3] == ["0.600 ± 0.124", "0.850", "–"]
    text = render_summary(table, "mixed", **LANDMARKS, width=120)
    assert "NLL" not in text
    assert "vs first: bits per byte less that of consensus" in text
    assert "compared in bits per byte" in text


def test_the_figure_of_models_that_differ_is_in_bits_per_byte(rounds, tmp_path):
    table = summarize(rounds.assign(mean_nll=math.nan), loss="bits_per_byte", first="consensus", **LANDMARKS)
    write_pareto(table, "mixed", tmp_path)
    assert "mean bits per byte after the last round" in (tmp_path / "pareto.svg").read_text(encoding="utf-8")


def test_visits_that_failed_are_counted_and_named(rounds):
    rounds.loc[(rounds["arm"] == "alone") & (rounds["round"] == 2) & (rounds["seed"] == 1), "failed"] = 2
    table = summarize(rounds, first="consensus", **BY_NLL)
    assert table["failed"].tolist() == [0, 2, 0, 0]
    assert summary_cells(table)["arm"].tolist()[1] == "alone (2 visits failed)"


def test_a_value_that_one_seed_lacks_is_not_averaged_over_the_others(rounds):
    rounds.loc[(rounds["arm"] == "alone") & (rounds["seed"] == 1), ["rouge_l", "joules"]] = math.nan
    row = summarize(rounds, first="consensus", **BY_NLL).loc["alone"]
    assert math.isnan(row["rouge_l"])
    assert math.isnan(row["joules"])


def test_an_arm_with_fewer_seeds_is_paired_by_those_it_has(rounds):
    some = rounds[(rounds["arm"] != "alone") | (rounds["seed"] == 1)]
    row = summarize(some, first="consensus", **BY_NLL).loc["alone"]
    assert (row["seeds"], row["nll"], row["difference"]) == pytest.approx((1, 1.6, 0.3))
    assert math.isnan(row["nll_half_width"])
    assert math.isnan(row["difference_half_width"])
    cells = summary_cells(summarize(some, first="consensus", **BY_NLL))
    assert cells["arm"].tolist()[1] == "alone (1 of 3 seeds)"
    assert cells["test NLL"].tolist()[1] == "1.600"


def test_what_needs_an_arm_that_is_not_there_is_nan(rounds):
    table = summarize(rounds[rounds["arm"].isin(["alone", "heavy"])], first="consensus", **BY_NLL)
    for column in ("bytes_ratio", "gap_closed", "difference", "at_equal_bytes"):
        assert table[column].isna().all(), column
    assert "vs first" not in render_summary(table, "t", **LANDMARKS).split("\n\n")[1]


def test_one_value_has_no_interval_and_two_have_a_wide_one():
    assert mean_and_half_width(np.array([3.0])) == (3.0, pytest.approx(math.nan, nan_ok=True))
    assert mean_and_half_width(np.array([1.0, 3.0])) == pytest.approx((2.0, 12.706204736))


def test_costs_by_round_leave_out_evaluation_and_idling(tmp_path):
    run = read_run(write_run(tmp_path / "run", lost={2: (1,)}))
    table = costs_by_round(run.metrics, run.rounds, run.ledger)
    assert table.index.tolist() == [0, 1, 2]
    # Client 1 was lost in round 2 and counts with its 1.8 of round 1.
    assert table["mean_nll"].tolist() == pytest.approx([2.0, 1.8, (1.8 + 1.8 + 1.4) / 3])
    assert table["worst_nll"].tolist() == pytest.approx([2.0, 1.9, 1.8])
    assert table["bits_per_byte"].tolist() == pytest.approx([1.0, 0.9, (0.9 + 0.9 + 0.7) / 3])
    assert table["worst_bits_per_byte"].tolist() == pytest.approx([1.0, 0.95, 0.9])
    assert table["failed"].tolist() == [0, 0, 1]
    assert table["rouge_l"].tolist() == pytest.approx([0.0, 0.1, 0.5 / 3])
    assert table["train_loss"].tolist() == pytest.approx([math.nan, 1.0, 1.0], nan_ok=True)
    assert table["visits"].tolist() == [0, 3, 6]
    assert table["uplink_bytes"].tolist() == [0, 303, 505]
    assert table["downlink_bytes"].tolist() == [0, 150, 250]
    assert table["total_bytes"].tolist() == [0, 453, 755]
    # Three loads of 4 s, then 3 s of fine-tuning and generating a visit, at 10 W.
    assert table["seconds"].tolist() == pytest.approx([12.0, 21.0, 27.0])
    assert table["joules"].tolist() == pytest.approx([120.0, 210.0, 270.0])
    assert set(table["energy_source"]) == {"estimated"}


def test_rounds_without_evaluation_count_towards_the_next(tmp_path):
    run = read_run(write_run(tmp_path / "run", num_rounds=3))
    table = costs_by_round(run.metrics[run.metrics["round"].isin([0, 3])], run.rounds, run.ledger)
    assert table.index.tolist() == [0, 3]
    assert table.loc[3, ["visits", "total_bytes"]].tolist() == [9, 3 * 453]


def test_nats_a_token_of_several_models_have_no_mean(tmp_path):
    run = read_run(write_run(tmp_path / "run", models=("org/one", "org/two")))
    table = costs_by_round(run.metrics, run.rounds, run.ledger)
    assert table[["mean_nll", "worst_nll", "train_loss"]].isna().all(axis=None)
    assert table["bits_per_byte"].tolist() == pytest.approx([2.5 / 3, (0.95 + 0.45 + 0.85) / 3, 2.0 / 3])


def test_arms_of_several_models_are_compared_in_bits_per_byte_though_each_has_one(tmp_path):
    runs = {
        ("one", 0): write_run(tmp_path / "one", models=("org/one",)),
        ("two", 0): write_run(tmp_path / "two", models=("org/two",)),
    }
    result = compare_runs(runs, first="one", **LANDMARKS)
    assert set(result.summary["loss"]) == {"bits_per_byte"}
    assert result.summary["nll"].tolist() == pytest.approx([1.6, 1.6])  # beside it, each of its own tokens
    assert set(compare_runs({("one", 0): runs["one", 0]}, first="one", **LANDMARKS).summary["loss"]) == {"nll"}


def test_a_client_that_was_never_measured_is_not_left_out_of_the_mean(tmp_path):
    run = read_run(write_run(tmp_path / "run", lost={0: (1,)}))
    table = costs_by_round(run.metrics, run.rounds, run.ledger)
    assert table["bits_per_byte"].tolist() == pytest.approx([math.inf, 0.9, 0.8])


def test_a_model_that_diverged_is_infinitely_bad_and_not_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    metrics = pd.read_parquet(folder / "metrics.parquet")
    metrics.loc[metrics["round"] == 2, ["nll", "bits_per_byte"]] = math.nan
    metrics.to_parquet(folder / "metrics.parquet", index=False)
    good = write_run(tmp_path / "good")
    runs = {("good", 0): good, ("good", 1): good, ("bad", 0): folder, ("bad", 1): good}
    result = compare_runs(runs, first="good", **LANDMARKS)
    assert result.summary["nll"].tolist() == [pytest.approx(1.6), math.inf]
    assert math.isnan(result.summary.loc["bad", "nll_half_width"])
    write_pareto(result.summary, "diverged", tmp_path)


def test_run_folders_become_rounds_summary_and_stages(tmp_path):
    runs = {
        (name, seed): write_run(tmp_path / f"{name}{seed}", local_only=name == "alone", num_rounds=1 + seed)
        for name in ("consensus", "alone")
        for seed in (0, 1)
    }
    result = compare_runs(runs, first="consensus", **LANDMARKS)
    assert result.rounds.columns[:4].tolist() == ["arm", "algorithm", "seed", "round"]
    assert len(result.rounds) == 2 * (2 + 3)
    assert result.summary["algorithm"].tolist() == ["semantic_consensus", "local_only"]
    assert result.stages.index.names == ["arm", "stage"]
    stages = result.stages.loc["consensus"]
    assert stages.index.tolist() == ["load", "fine_tune", "generate", "evaluate", "idle"]
    # Seed 0 has one round of 3 visits, seed 1 two.
    assert stages["seconds"].tolist() == pytest.approx([12.0, 9.0, 4.5, 2.25, 2.25])
    assert stages["joules"].tolist() == pytest.approx([120.0, 90.0, 45.0, 22.5, 0.0])


def test_a_stage_that_one_seed_lacks_counts_as_nothing(tmp_path):
    runs = {("a", seed): write_run(tmp_path / str(seed)) for seed in (0, 1)}
    ledger = pd.read_parquet(tmp_path / "0" / "ledger.parquet")
    ledger[ledger["stage"] != "load"].to_parquet(tmp_path / "0" / "ledger.parquet", index=False)
    stages = compare_runs(runs, first="a", **LANDMARKS).stages
    assert stages.loc[("a", "load"), "seconds"] == pytest.approx(6.0)


def test_a_damaged_run_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "ledger.parquet").unlink()
    with pytest.raises(RunFolderError, match=r"ledger\.parquet is missing"):
        compare_runs({("a", 0): folder}, first="a", **LANDMARKS)


def test_the_pareto_front_by_hand():
    costs = pd.Series({"free": 0.0, "cheap": 1.0, "beaten": 2.0, "good": 3.0, "same": 3.0, "dear": 9.0, "worse": 1.0})
    losses = pd.Series({"free": 5.0, "cheap": 3.0, "beaten": 3.0, "good": 1.0, "same": 1.0, "dear": 1.5, "worse": 4.0})
    assert pareto_front(costs, losses) == ["free", "cheap", "good"]
    losses["good"] = math.inf
    assert pareto_front(costs, losses) == ["free", "cheap", "same"]
    assert pareto_front(costs.iloc[:0], losses) == []


def test_no_two_of_24_arms_look_alike():
    names = ["semantic_consensus"] * 24 + ["fedavg_lora"] * 24 + ["not known"] * 24
    assert len(set(arm_styles(names))) == len(names)


def test_the_figure_is_drawn_and_names_every_arm(summary, tmp_path):
    write_pareto(summary, HOSTILE, tmp_path)
    svg = (tmp_path / "pareto.svg").read_text(encoding="utf-8")
    texts = {text for element in ElementTree.fromstring(svg).iter() for text in [(element.text or "").strip()] if text}
    assert {*summary.index, "Pareto front", "0", "time at work (s)", "energy, estimated (J)"} <= texts
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    write_pareto(summary, HOSTILE, tmp_path)
    assert (tmp_path / "pareto.svg").read_text(encoding="utf-8") == svg


@pytest.mark.parametrize(
    "arms",
    [
        [arm("alone", (1.4,), (0, 0, 0))],  # nothing was sent
        [arm("diverged", (math.inf, math.inf), (1, 2, 3))],
        [arm("unmetered", (1.4, 1.3), (1, 2, 3), joules=math.nan)],
        [arm(f"arm {number}", (1.4, 1.4), (0, 1000, 2000)) for number in range(20)],  # all in one place
    ],
)
def test_figures_of_odd_comparisons_are_drawn(arms, tmp_path):
    table = summarize(pd.concat(arms), first=arms[0]["arm"][0], **BY_NLL)
    write_pareto(table, "odd", tmp_path)
    ElementTree.parse(tmp_path / "pareto.svg")
    assert render_summary(table, "odd", **LANDMARKS)


def test_the_table_fits_a_terminal(rounds):
    names = {name: f"{name}, with a label that says a lot about it" for name in set(rounds["arm"])}
    table = summarize(rounds.replace({"arm": names}), first=names["consensus"], **BY_NLL)
    text = render_summary(table, "wide", **LANDMARKS, width=120)
    head = text.split("\n\n")[0]
    assert max(map(len, head.splitlines())) <= 120
    assert "1.200 ± 0.248" in head
    assert "+0.200 ± 0.248" in head


def test_the_table_says_what_its_columns_mean(summary):
    text = render_summary(summary, "[red] title", **LANDMARKS, width=120)
    assert text.startswith("[red] title")
    cells = summary_cells(summary).set_index("arm")
    assert cells.loc["consensus"].tolist() == [
        *("1.200 ± 0.248", "1.700", "0.600 ± 0.124", "–", "50%", "1.200", "0.200", "0.400", "100 B", "12.5 B", "1.6×"),
        *("31.0 s", "90 J"),
    ]
    assert cells["fewer"].tolist() == ["1.6×", "∞", "1×", "0.27×"]
    assert "Means over 3 seeds, ± half of the 95% t-interval." in text
    assert "gap closed: of the NLL from alone (0%) to averaging (100%)." in text
    assert "energy estimated" in text


def test_markdown_has_a_row_an_arm_and_escapes_bars(summary):
    text = summary_markdown(summary.rename(index={"alone": "a|b"}), "title", **LANDMARKS)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(summary)
    assert rows[3].startswith("| a\\|b | 1.400 ± 0.497 | 1.900 | 0.700 ± 0.248 | +0.200 ± 0.248 |")
    assert {row.replace("\\|", "").count("|") for row in rows} == {15}


def test_the_frames_survive_csv(summary):
    read = pd.read_csv(io.StringIO(summary.to_csv()), index_col="arm")
    pd.testing.assert_frame_equal(read, summary, check_dtype=False)


def test_arms_have_intervals_paired_by_seed_and_question(tmp_path):
    runs = {
        (name, seed): write_items(write_run(tmp_path / f"{name}{seed}", num_rounds=rounds), seed=seed)
        for name, rounds in (("short", 1), ("a|b", 2))
        for seed in (0, 1)
    }
    result = compare_runs(runs, first="short", **LANDMARKS)
    table = result.metrics.set_index(["arm", "metric"])
    assert table.loc[("short", "nll"), ["value", "num_items"]].tolist() == pytest.approx([1.8, 80])
    row = table.loc[("a|b", "nll")]
    assert row["difference"] == pytest.approx(-0.2)
    assert row["difference_low"] < -0.2 < row["difference_high"] < 0
    assert row["difference_half_width"] == pytest.approx(0.0, abs=1e-9)
    assert math.isnan(table.loc[("short", "nll"), "difference"])
    text = summary_markdown(result.summary, "title", metrics=result.metrics, **LANDMARKS)
    rows = [line for line in text.split("## Metrics")[1].splitlines() if line.startswith("| ")]
    assert rows[0].startswith("| arm | NLL | NLL vs first | bits/byte | bits/byte vs first | ROUGE-L |")
    assert rows[2].startswith("| short | 1.800 ± 0.000 [")
    assert rows[3].startswith("| a\\|b | 1.600 ± 0.000 [")
    assert "| −0.200 ± 0.000 [−0.2" in rows[3]
    shown = render_summary(result.summary, "title", metrics=result.metrics, **LANDMARKS, width=120)
    assert "−0.200 ± 0.000" in shown
    assert "[−0.2" in shown
    assert "paired by seed and question" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_runs_of_a_time_before_items_were_written_have_no_intervals(tmp_path):
    result = compare_runs({("a", 0): write_run(tmp_path / "a")}, first="a", **LANDMARKS)
    assert result.metrics.empty
    text = summary_markdown(result.summary, "title", metrics=result.metrics, **LANDMARKS)
    assert "## Metrics" not in text
    assert text == summary_markdown(result.summary, "title", **LANDMARKS)
