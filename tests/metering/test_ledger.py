import math
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.metering.ledger import Ledger, LedgerRow, Place, idle_rows


def row(worker: str, start: float, seconds: float, stage: str = "generate", **fields: object) -> LedgerRow:
    values = {"round": 1, "client_id": 0, "node": "n0", **fields}
    return LedgerRow(worker=worker, stage=stage, started_at=start, duration_seconds=seconds, **values)  # type: ignore[arg-type]


def test_a_stage_becomes_a_row_with_its_times_and_counts():
    ledger = Ledger("worker-1", "node-a", "GPU-0,GPU-1")
    before = time.time()
    with ledger.stage("fine_tune", round=3, client_id=2) as work:
        work.tokens += 5
        work.tokens += 7
        work.downlink_bytes = 100
        time.sleep(0.02)
    after = time.time()
    (done,) = ledger.take()
    assert (done.round, done.client_id, done.worker, done.node, done.stage) == (3, 2, "worker-1", "node-a", "fine_tune")
    assert (done.tokens, done.uplink_bytes, done.downlink_bytes) == (12, 0, 100)
    assert before <= done.started_at <= after
    assert 0.02 <= done.duration_seconds <= after - before + 1e-3
    assert math.isnan(done.energy_joules)
    assert done.energy_source == "unavailable"
    assert done.gpus == "GPU-0,GPU-1"


def test_columns_are_those_of_the_run_folder_in_order():
    columns = "round client_id worker node stage started_at duration_seconds tokens uplink_bytes downlink_bytes"
    columns += " energy_joules energy_source gpus cost_usd note"
    assert LedgerRow.__struct_fields__ == (*columns.split(),)


def test_work_that_fails_keeps_its_row_and_its_error():
    ledger = Ledger("worker-0", "n0")
    with pytest.raises(RuntimeError, match="out of memory"), ledger.stage("generate", round=1, client_id=4) as work:
        work.tokens = 9
        raise RuntimeError("out of memory")
    assert [(done.client_id, done.tokens) for done in ledger.take()] == [(4, 9)]


def test_take_hands_over_once_and_leaves_what_was_taken_alone():
    ledger = Ledger("server", "n0")
    with ledger.stage("embed", round=1):
        pass
    first = ledger.take()
    with ledger.stage("consensus", round=1):
        pass
    assert [done.stage for done in first] == ["embed"]
    assert [done.stage for done in ledger.take()] == ["consensus"]
    assert ledger.take() == []


def test_a_row_is_frozen_and_survives_messagepack():
    original = row("w", 1.5, 2.0, energy_joules=3.0, energy_source="measured")
    with pytest.raises(AttributeError):
        original.tokens = 1  # type: ignore[misc]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(original), type=LedgerRow) == original


def test_idle_is_the_window_less_the_union_of_busy_times():
    rows = [
        row("a", 10.0, 4.0, gpus="GPU-2"),  # overlaps the next: together 10-16
        row("a", 12.0, 4.0, gpus="GPU-2"),
        row("a", 18.0, 1.0),
        row("b", 5.0, 7.0),  # only 10-12 lies in the window
        row("b", 19.0, 50.0),  # only 19-20
        row("c", 30.0, 1.0),  # outside
        row("c", 10.0, 9.0, stage="idle"),  # not work
    ]
    idle = idle_rows(rows, 7, 10.0, 20.0, {"d": Place("n9", "GPU-5")})
    assert [(r.worker, r.duration_seconds) for r in idle] == [("a", 3.0), ("b", 7.0), ("c", 10.0), ("d", 10.0)]
    assert {(r.round, r.client_id, r.stage, r.started_at) for r in idle} == {(7, -1, "idle", 10.0)}
    assert [r.node for r in idle] == ["n0", "n0", "n0", "n9"]
    assert [r.gpus for r in idle] == ["GPU-2", "", "", "GPU-5"]


def test_no_work_and_no_workers_give_no_idle_rows():
    assert idle_rows([], 1, 0.0, 10.0) == []


@given(st.lists(st.tuples(st.integers(-5, 25), st.integers(0, 10)), max_size=8))
def test_idle_and_busy_fill_the_window(spans):
    rows = [row("w", float(start), float(length)) for start, length in spans]
    # By hand on a grid of seconds: a second is busy if some span covers it.
    busy = sum(any(start <= second < start + length for start, length in spans) for second in range(0, 20))
    idle = idle_rows(rows, 1, 0.0, 20.0, {"w": Place("n0")})
    assert [r.duration_seconds for r in idle] == [20.0 - busy]
