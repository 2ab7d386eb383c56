import gc
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.metering.energy import (
    CombinedMeter,
    NodeEnergy,
    NodeMeter,
    NvmlMeter,
    RaplMeter,
    apportion,
    detect_meter,
    estimate_watts,
)
from semcons_ray.metering.ledger import LedgerRow
from tests.metering.fakes import FakeNvml, write_domain


def row(worker: str, start: float, seconds: float, node: str = "n0", stage: str = "generate") -> LedgerRow:
    return LedgerRow(
        round=1, client_id=0, worker=worker, node=node, stage=stage, started_at=start, duration_seconds=seconds
    )


def energies(rows: list[LedgerRow]) -> list[tuple[float, str]]:
    return [(pytest.approx(r.energy_joules), r.energy_source) for r in rows]


# --- counters


def test_nvml_sums_all_gpus_from_when_the_meter_was_made():
    nvml = FakeNvml([5_000, 70_000])
    meter = NvmlMeter(nvml)
    assert meter.read_joules() == 0.0
    nvml.millijoules = [6_500, 72_000]
    assert meter.read_joules() == 3.5
    assert (meter.name, meter.source) == ("nvml", "measured")


def test_nvml_refuses_what_it_cannot_meter_whole():
    for nvml in (FakeNvml([1], driver=False), FakeNvml([]), FakeNvml([1, None])):
        with pytest.raises(FakeNvml.NVMLError):
            NvmlMeter(nvml)


def test_a_gpu_lost_in_mid_run_reads_as_not_a_number():
    nvml = FakeNvml([1, 2])
    meter = NvmlMeter(nvml)
    nvml.millijoules[1] = None
    assert math.isnan(meter.read_joules())


def test_rapl_counts_packages_and_dram_and_nothing_twice(tmp_path):
    package = write_domain(tmp_path, "intel-rapl:0", "package-0", 100)
    other = write_domain(tmp_path, "intel-rapl:1", "package-1", 100)
    dram = write_domain(tmp_path, "intel-rapl:0:1", "dram", 7)
    within = [
        write_domain(tmp_path, "intel-rapl:0:0", "core", 50),
        write_domain(tmp_path, "intel-rapl:2", "psys", 900),
        write_domain(tmp_path, "intel-rapl-mmio:0", "package-0", 100),
    ]
    meter = RaplMeter(tmp_path)
    for counter in within:
        counter.write_text("800000000")
    package.write_text("2000100")
    other.write_text("3000100")
    dram.write_text("500007")
    assert meter.read_joules() == 5.5
    assert meter.read_joules() == 5.5
    assert (meter.name, meter.source) == ("rapl", "measured")


def test_rapl_adds_wraps_back(tmp_path):
    counter = write_domain(tmp_path, "intel-rapl:0", "package-0", 9_000_000, wrap=10_000_000)
    meter = RaplMeter(tmp_path)
    readings = []
    for value in (1_000_000, 9_500_000, 500_000):
        counter.write_text(str(value))
        readings.append(meter.read_joules())
    assert readings == [2.0, 10.5, 11.5]


def test_rapl_notices_wraps_between_two_readings_of_its_user(tmp_path):
    counter = write_domain(tmp_path, "intel-rapl:0", "package-0", 0, wrap=10_000_000)
    meter = RaplMeter(tmp_path, sample_seconds=0.005)
    domain = meter._domains[0]
    for value in (9_000_000, 2_000_000, 9_000_000, 1_000_000):  # 21 J in all: two wraps
        counter.with_suffix(".new").write_text(str(value))
        counter.with_suffix(".new").replace(counter)
        deadline = time.monotonic() + 5
        while domain.last != value:
            assert time.monotonic() < deadline, "the thread does not read"
            time.sleep(0.002)
    assert meter.read_joules() == 21.0


def test_the_thread_ends_with_its_meter(tmp_path):
    write_domain(tmp_path, "intel-rapl:0", "package-0", 1)
    before = set(threading.enumerate())
    meter = RaplMeter(tmp_path, sample_seconds=30.0)
    (thread,) = set(threading.enumerate()) - before
    del meter
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_dies_that_mirror_one_counter_count_once(tmp_path):
    mirrored = [
        write_domain(tmp_path, "intel-rapl:0", "package-0-die-0", 50_000_000),
        write_domain(tmp_path, "intel-rapl:1", "package-0-die-1", 50_000_200),
    ]
    own = write_domain(tmp_path, "intel-rapl:2", "package-0-die-2", 80_000_000)
    other_socket = write_domain(tmp_path, "intel-rapl:3", "package-1-die-0", 50_000_000)
    meter = RaplMeter(tmp_path)
    for counter in mirrored:
        counter.write_text("52000000")
    own.write_text("83000000")
    other_socket.write_text("55000000")
    assert meter.read_joules() == 2.0 + 3.0 + 5.0


def test_rapl_says_why_it_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        RaplMeter(tmp_path)
    write_domain(tmp_path, "intel-rapl:0", "core", 1)
    with pytest.raises(FileNotFoundError):
        RaplMeter(tmp_path)


def test_a_rapl_counter_that_vanishes_reads_as_not_a_number(tmp_path):
    counter = write_domain(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = RaplMeter(tmp_path)
    counter.unlink()
    assert math.isnan(meter.read_joules())


def test_the_meter_fits_the_device_the_run_uses(tmp_path):
    powercap, empty = tmp_path / "powercap", tmp_path / "empty"
    write_domain(powercap, "intel-rapl:0", "package-0", 1)
    gpu, no_gpu, no_counter = FakeNvml([1]), FakeNvml(driver=False), FakeNvml([None])

    def name(uses_gpu, root, nvml):
        meter = detect_meter(uses_gpu=uses_gpu, rapl_root=root, nvml=nvml)
        return meter.name if meter else None

    assert name(True, powercap, gpu) == "nvml+rapl"
    assert name(True, empty, gpu) == "nvml"
    assert name(False, powercap, gpu) == "rapl"
    assert name(False, powercap, no_gpu) == "rapl"
    assert name(False, empty, gpu) is None
    # The CPU's joules alone would pass for the whole of a GPU run.
    assert name(True, powercap, no_counter) is None
    assert name(True, powercap, no_gpu) is None


def test_a_combined_meter_adds(tmp_path):
    counter = write_domain(tmp_path, "intel-rapl:0", "package-0", 0)
    nvml = FakeNvml([0])
    meter = CombinedMeter([NvmlMeter(nvml), RaplMeter(tmp_path)])
    counter.write_text("1500000")
    nvml.millijoules = [2_000]
    assert meter.read_joules() == 3.5


class ScriptedMeter:
    name = "scripted"
    source = "measured"

    def __init__(self, readings):
        self.readings = list(readings)

    def read_joules(self):
        return self.readings.pop(0)


def test_laps_are_differences_and_join_without_gaps():
    meter = NodeMeter("n3", ScriptedMeter([10.0, 14.0, 20.0]))
    first, second = meter.lap(), meter.lap()
    assert [(lap.node, lap.joules) for lap in (first, second)] == [("n3", 4.0), ("n3", 6.0)]
    assert first.window_start <= first.window_end == second.window_start <= second.window_end


def test_a_lap_with_a_failed_or_reset_counter_is_none():
    meter = NodeMeter("n0", ScriptedMeter([10.0, math.nan, 20.0, 5.0, 6.0]))
    assert [meter.lap(), meter.lap(), meter.lap()] == [None, None, None]
    assert meter.lap().joules == 1.0


# --- sharing out


def test_equal_workers_share_by_busy_seconds_and_idle_ones_get_nothing():
    rows = [row("a", 0.0, 3.0), row("b", 0.0, 1.0), row("b", 0.0, 9.0, stage="idle")]
    shared = apportion(rows, [NodeEnergy("n0", 200.0, 0.0, 10.0)], {"a": 4.0, "b": 4.0})
    assert energies(shared) == [(150.0, "measured"), (50.0, "measured"), (0.0, "measured")]
    assert [r.worker for r in shared] == ["a", "b", "b"]


def test_a_worker_that_draws_more_gets_more():
    rows = [row("gpu", 0.0, 2.0), row("server", 0.0, 2.0)]
    shared = apportion(rows, [NodeEnergy("n0", 100.0, 0.0, 2.0)], {"gpu": 300.0, "server": 100.0})
    assert energies(shared) == [(75.0, "measured"), (25.0, "measured")]


def test_rows_without_a_window_get_the_estimate():
    rows = [
        row("a", 1.0, 2.0),
        row("a", 50.0, 2.0),  # after the window
        row("b", 1.0, 2.0, node="n1"),  # node without a meter
        row("b", 1.0, 2.0, node="n1", stage="idle"),
        row("unnamed", 1.0, 2.0, node="n1"),
    ]
    shared = apportion(rows, [NodeEnergy("n0", 60.0, 0.0, 10.0)], {"a": 8.0, "b": 12.0})
    assert energies(shared) == [
        (60.0, "measured"),
        (16.0, "estimated"),
        (24.0, "estimated"),
        (0.0, "estimated"),
        (8.0, "estimated"),
    ]


def test_a_row_over_the_edge_belongs_where_its_middle_is():
    windows = [NodeEnergy("n0", 10.0, 0.0, 10.0), NodeEnergy("n0", 90.0, 10.0, 20.0)]
    shared = apportion([row("a", 5.0, 8.0), row("a", 9.0, 8.0)], windows, {"a": 4.0})
    assert energies(shared) == [(10.0, "measured"), (90.0, "measured")]


def test_a_window_of_idle_rows_only_is_shared_by_duration():
    rows = [row("a", 0.0, 4.0, stage="idle"), row("b", 0.0, 1.0, stage="idle")]
    shared = apportion(rows, [NodeEnergy("n0", 50.0, 0.0, 4.0)], {})
    assert energies(shared) == [(40.0, "measured"), (10.0, "measured")]


def test_the_estimate_counts_threads_and_gpu_shares():
    assert estimate_watts(3) == 12.0
    assert estimate_watts(1, num_gpus=0.5, gpu_watts=700.0) == 354.0


spans = st.tuples(
    st.sampled_from(["n0", "n1"]),
    st.sampled_from(["w0", "w1", "server"]),
    st.sampled_from(["fine_tune", "generate", "idle"]),
    st.floats(0.0, 90.0),
    st.floats(0.0, 40.0),
)


@given(st.lists(spans, max_size=20), st.floats(0.0, 1e7), st.floats(0.0, 1e7), st.floats(0.5, 700.0))
def test_the_rows_of_a_window_sum_to_the_joules_of_its_node(spans, first, second, watts):
    rows = [row(worker, start, seconds, node, stage) for node, worker, stage, start, seconds in spans]
    windows = [NodeEnergy("n0", first, 0.0, 50.0), NodeEnergy("n0", second, 60.0, 100.0)]
    shared = apportion(rows, windows, {"w0": watts, "w1": 4.0})
    assert all(r.energy_joules >= 0.0 for r in shared)
    for window in windows:
        inside = [
            r
            for r in shared
            if r.node == "n0" and window.window_start <= r.started_at + r.duration_seconds / 2 <= window.window_end
        ]
        assert {r.energy_source for r in inside} <= {"measured"}
        if any(r.duration_seconds > 1e-6 for r in inside):
            assert sum(r.energy_joules for r in inside) == pytest.approx(window.joules)
    assert {r.energy_source for r in shared if r.node == "n1"} <= {"estimated"}
