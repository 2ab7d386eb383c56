import math
from typing import Any

import pytest

from semcons_ray.commands.progress import Progress
from semcons_ray.runs.run_folder import MetricsRow, RoundRow
from tests.reporting.builder import metrics_row


def summary(**values: Any) -> RoundRow:
    usual: dict[str, Any] = {
        **{"round": 1, "started_at": 0.0, "duration_seconds": 7.0, "num_participants": 2, "num_answered": 2},
        **{"lost": "", "failures": "", "num_labels": 0, "mean_agreement": math.nan, "label_churn": math.nan},
    }
    return RoundRow(**{**usual, **values})


def line(capsys: pytest.CaptureFixture[str], round_row: RoundRow, *rows: MetricsRow) -> str:
    Progress().round_ends(round_row, rows)
    return " ".join(capsys.readouterr().err.split())


def row(client: int, model: str, **values: float) -> MetricsRow:
    return MetricsRow(**metrics_row(1, client, model, **values))


def test_a_round_of_one_model_has_a_mean_nll(capsys: pytest.CaptureFixture[str]) -> None:
    told = line(capsys, summary(mean_agreement=0.25, num_labels=5), row(0, "m", nll=2.0), row(1, "m", nll=1.0))
    assert told == "round 1 mean test NLL 1.500 of 2 clients agreement 0.25, 5 pseudo-labels (7 s)"


def test_a_round_of_several_models_has_a_mean_of_bits_per_byte(capsys: pytest.CaptureFixture[str]) -> None:
    told = line(capsys, summary(), row(0, "m", bits_per_byte=0.5), row(1, "n", bits_per_byte=0.75))
    assert told == "round 1 mean bits per byte 0.625 of 2 clients (7 s)"


def test_labels_are_told_of_though_no_answer_met_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert line(capsys, summary(num_labels=5)) == "round 1 5 pseudo-labels (7 s)"
    assert line(capsys, summary()) == "round 1 (7 s)"


def test_who_is_left_out_is_named_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    failed = summary(num_answered=1, lost="1", failures="client 1, round 1: its training loss is nan")
    told = line(capsys, failed, row(0, "m", nll=2.0))
    assert "mean test NLL 2.000 of 1 client left out: client 1, round 1: its training loss is nan" in told


def test_a_plan_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.planned("warning: data[b].jsonl: 3 of 9 rows left out")
    assert "warning: data[b].jsonl: 3 of 9 rows left out\n" in capsys.readouterr().err
