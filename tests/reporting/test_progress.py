import math
from typing import Any

import pytest
from rich.progress import Task, TaskID

from semcons_ray.federation.fleet import Reply
from semcons_ray.metering.ledger import LedgerRow
from semcons_ray.reporting.progress import Progress, about, time_left
from semcons_ray.runs.run_folder import Commit, MetricsRow, RoundRow
from tests.reporting.builder import ledger_row, metrics_row


def summary(**values: Any) -> RoundRow:
    usual: dict[str, Any] = {
        **{"round": 1, "started_at": 0.0, "duration_seconds": 7.0, "num_participants": 2, "num_answered": 2},
        **{"lost": "", "failures": "", "num_labels": 0, "mean_agreement": math.nan, "label_churn": math.nan},
    }
    return RoundRow(**{**usual, **values})


def line(capsys: pytest.CaptureFixture[str], round_row: RoundRow, *rows: MetricsRow) -> str:
    Progress().round_ends(Commit(summary=round_row, metrics=rows, ledger=()))
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


def test_whom_the_defence_distrusts_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    told = line(capsys, summary(num_labels=5, distrusted="3, 7"))
    assert told == "round 1 5 pseudo-labels distrusted by the defence: clients 3, 7 (7 s)"


def test_a_plan_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.planned("warning: data[b].jsonl: 3 of 9 rows left out")
    assert "warning: data[b].jsonl: 3 of 9 rows left out\n" in capsys.readouterr().err


def test_a_rounds_line_says_how_fast_it_was_and_how_long_the_others_will_take(
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = LedgerRow(**ledger_row(1, 0, "worker-0", "fine_tune", 0.0, 2.0, tokens=10_000))
    progress = Progress()
    progress.begins([Commit(summary=summary(round=round), metrics=(), ledger=(work,)) for round in (0, 1)])
    progress.round_begins(2, 42, 4)
    progress.round_ends(Commit(summary=summary(round=2, duration_seconds=5.0), metrics=(), ledger=(work, work)))
    assert " ".join(capsys.readouterr().err.split()) == "round 2 (5 s, 4,000 tokens/s, about 4 min left)"


def test_of_the_first_round_the_time_left_is_told_by_the_clients_that_are_done() -> None:
    progress = Progress()
    progress.begins([Commit(summary=summary(round=0, duration_seconds=99.0), metrics=(), ledger=())])
    progress.round_begins(1, 3, 4)
    task = Task(TaskID(0), "", total=4, completed=0, _get_time=lambda: 50.0)
    task.start_time = 40.0
    assert progress._note(task) == ""
    row = LedgerRow(**ledger_row(1, 0, "worker-0", "generate", 0.0, 2.0, tokens=120))
    progress.client_done(Reply(0, 1, b"", 0.0, 1, 0, None, (row,)))
    task.completed = 1
    assert progress._note(task) == "12 tokens/s, about 2 min left"  # 40 s a round, 10 of them gone


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(math.nan, ""), (0.0, "about 5 s left"), (41.0, "about 45 s left"), (89.0, "about 90 s left"),
     (91.0, "about 2 min left"), (3600.0, "about 60 min left"), (9000.0, "about 2.5 h left")],
)  # fmt: skip
def test_an_estimate_is_as_rough_as_it_is(seconds: float, text: str) -> None:
    assert about(seconds) == text


def test_time_left_is_that_of_the_rounds_before() -> None:
    assert time_left([10.0, 20.0], 3, elapsed=5.0) == 40.0
    assert time_left([10.0], 2, elapsed=60.0) == 10.0  # it takes longer than the one before
    assert math.isnan(time_left([], 3))
    assert math.isnan(time_left([10.0], 0))
