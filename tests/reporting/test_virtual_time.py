"""Figures and tables of virtual time, against numbers by hand."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from semcons_ray.config import FederationConfig
from semcons_ray.reporting.html import render_report
from semcons_ray.reporting.replay import Replay
from semcons_ray.reporting.tables import read_run
from semcons_ray.reporting.virtual_time import (
    MAX_CLIENTS,
    PHASES,
    _shown,
    _spans,
    describe_federation,
    gantt_figure,
    joules_by_round,
    joules_figure,
    loss_figure,
    virtual_time,
    waiting_rows,
)
from tests.invariants.runs import StoppedError
from tests.invariants.test_virtual_time import DEADLINE, StopsAfter, run, straggling
from tests.reporting.builder import write_run


def visit(client: int, round: int = 1, counted_in: int = 1, began_at: float = 0.0, **values: Any) -> dict[str, Any]:
    """A client that downloads 1 s, trains 2 s, answers 3 s, waits 0.5 s for packets and uploads 1.5 s."""
    row = {
        "round": round, "client_id": client, "counted_in": counted_in, "asked_at": began_at, "began_at": began_at,
        "downlink_seconds": 1.0, "fine_tune_seconds": 2.0, "generate_seconds": 3.0, "latency_seconds": 0.5,
        "uplink_seconds": 1.5, "ended_at": began_at + 8.0, "downlink_bytes": 10, "uplink_bytes": 20,
        "compute_joules": 50.0, "radio_joules": 1.0, "idle_joules": 4.0, "device": "slow", "link": "dsl",
    }  # fmt: skip
    return row | values


def round_row(round: int = 1, **values: Any) -> dict[str, Any]:
    """A round of 10 s, of which the server works the last two."""
    row = {
        "round": round, "hours": 10.0 * round / 3600, "seconds": 10.0, "num_asked": 2, "num_heard": 2, "last_client": 1,
        "last_device": "slow", "waited_for_last_seconds": 4.0, "last_fine_tune_seconds": 2.0,
        "last_generate_seconds": 3.0, "last_transfer_seconds": 3.0, "server_seconds": 2.0, "server_joules": 20.0,
        "compute_joules": 100.0, "radio_joules": 2.0, "idle_joules": 8.0, "joules": 130.0, "grams_co2": 0.1,
        "bytes": 60, "loss": 2.0,
    }  # fmt: skip
    return row | values


def replayed(visits: list[dict[str, Any]], rounds: list[dict[str, Any]], base_loss: float = 3.0) -> Replay:
    return Replay(pd.DataFrame(rounds), pd.DataFrame(visits), {"loss": "measured"}, base_loss)


def test_what_a_client_did_when_is_told_from_begin_to_end() -> None:
    visits = pd.DataFrame([visit(0, began_at=100.0)])
    spans = {name: tuple(table.iloc[0]) for name, table in _spans(visits, pd.Series({1: 120.0})).items()}
    assert spans == {
        "download": (100, 101), "fine-tuning": (101, 103), "answering": (103, 106), "upload": (106, 108),
        "waiting": (108, 120),
    }  # fmt: skip
    assert {*spans} < {*PHASES}


def test_a_visit_that_breaks_off_has_no_bar_behind_its_end() -> None:
    visits = pd.DataFrame([visit(0, ended_at=4.0, counted_in=0)])
    spans = _spans(visits, pd.Series({1: 20.0}))
    assert tuple(spans["answering"].iloc[0]) == (3, 4)
    assert tuple(spans["upload"].iloc[0]) == (4, 4)


def test_the_title_names_who_was_last_most_often_and_the_caption_who_is_left_out() -> None:
    clients = range(MAX_CLIENTS + 5)
    visits = [visit(client, fine_tune_seconds=float(client)) for client in clients]
    rounds = [round_row(1), round_row(2), round_row(3, last_client=7, last_device="fast")]
    figure = gantt_figure(replayed(visits, rounds))
    assert figure is not None
    assert figure.title == "Client 1, on slow, was the last to answer in 2 of 3 rounds"
    assert f"the {MAX_CLIENTS} of {len(clients)} clients that work longest" in figure.caption
    assert _shown(pd.DataFrame(visits)) == [*clients][5:]
    assert ">44 slow<" in figure.svg
    assert ">4 slow<" not in figure.svg


def test_rounds_in_which_nobody_is_heard_are_told() -> None:
    nobody = round_row(num_heard=0, last_client=-1, last_device="", waited_for_last_seconds=math.nan)
    done = replayed([visit(0, counted_in=0)], [nobody])
    figure = gantt_figure(done)
    assert figure is not None
    assert figure.title == "Nobody's answers came in time"
    assert waiting_rows(done)[0]["last"] == "nobody"
    assert waiting_rows(done)[0]["did"] == ""
    assert gantt_figure(replayed([], [nobody])) is None


def test_who_waited_for_whom_by_hand() -> None:
    (row,) = waiting_rows(replayed([visit(0), visit(1)], [round_row()]))
    assert row == {
        "round": "1", "ended": "10.0 s", "took": "10.0 s", "heard": "2 of 2", "last": "client 1, slow",
        "did": "fine-tuned 2.0 s, answered 3.0 s, sent and received 3.0 s", "waited": "4.0 s", "loss": "2.000",
    }  # fmt: skip


def test_joules_by_what_they_were_for_add_up() -> None:
    done = replayed([visit(0), visit(1, round=2)], [round_row(1), round_row(2), round_row(3)])
    table = joules_by_round(done)
    assert table.loc[1].to_dict() == {"fine-tuning": 20, "answering": 30, "radio": 1, "waiting": 4, "server": 20}
    assert table.loc[3].to_dict() == {"fine-tuning": 0, "answering": 0, "radio": 0, "waiting": 0, "server": 20}
    assert joules_figure(done).title == "Answering would take 35% of 170 J"


def test_the_loss_by_virtual_time_begins_with_the_base_model() -> None:
    done = replayed([visit(0)], [round_row(1, loss=math.nan), round_row(2, loss=1.5)])
    assert done.loss_by_hours.to_dict() == {0.0: 3.0, 20 / 3600: 1.5}
    figure = loss_figure(done, "NLL")
    assert figure is not None
    assert figure.title == "Mean NLL was lowest, 1.500, after 20.0 s of virtual time"
    assert loss_figure(replayed([visit(0)], [round_row(loss=math.nan)]), "NLL") is None


def test_a_federation_is_told_in_a_line() -> None:
    policy = {"policy": "deadline", "policy_options": {"hours": 2}}
    told = describe_federation(
        FederationConfig(devices={"phone": 2, "l4": 1}, dropout=0.1, model="qwen2.5-7b", **policy)
    )
    for words in ("2 phone, 1 l4 by fibre", "deadline (hours 2)", "there: always", "10% of visits", "as qwen2.5-7b"):
        assert words in told


def test_without_a_virtual_clock_the_report_says_nothing_of_it(tmp_path: Path) -> None:
    page = render_report(read_run(write_run(tmp_path / "run")))
    assert "irtual" not in page


def test_a_report_of_a_run_with_a_virtual_clock_has_it_all(tiny_config: Any, tmp_path: Path) -> None:
    out = run(straggling(tiny_config, "semantic_consensus", DEADLINE), tmp_path / "run", fleet="local")
    page = render_report(read_run(out))
    for words in ('id="virtual-time"', 'id="figure-gantt"', 'id="figure-virtual-joules"', 'id="figure-virtual-loss"'):
        assert words in page
    table = page[page.index('id="virtual-time"') :]
    assert "<td>3 of 4</td>" in table  # the slow client is late
    rounds = pd.read_parquet(out / "rounds.parquet")
    section = virtual_time(read_run(out))
    assert section is not None
    assert len(section.rounds) == len(rounds) - 1


def test_a_run_that_goes_on_shows_the_rounds_that_are_done(tiny_config: Any, tmp_path: Path) -> None:
    from semcons_ray.runs.experiment import run_experiment

    with pytest.raises(StoppedError):
        run_experiment(straggling(tiny_config, "local_only", {}), tmp_path / "run", StopsAfter(2))
    section = virtual_time(read_run(tmp_path / "run"))
    assert section is not None
    assert [row["round"] for row in section.rounds] == ["1", "2"]


def test_a_trace_that_is_gone_leaves_the_rest_of_the_report(tiny_config: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("client_id,start_hours,end_hours\n0,0,1\n1,0,1\n2,0,1\n3,0,1\n")
    there = {"availability": "trace", "availability_options": {"path": str(trace)}}
    config = straggling(tiny_config, "local_only", there)
    out = run(config, tmp_path / "run", fleet="local")
    trace.unlink()
    page = render_report(read_run(out))
    assert "It cannot be shown: " in page
    assert "trace.csv: " in page
    assert 'id="figure-gantt"' not in page
