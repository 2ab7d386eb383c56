import gc
import math
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.metering.energy import (
    CPU,
    Draw,
    EnergyWindow,
    GpuMeter,
    NodeMeter,
    RaplMeter,
    apportion,
    estimate_draw,
    open_meters,
    own_windows,
)
from semcons_ray.metering.ledger import LedgerRow, Place
from tests.metering.fakes import FakeNvml, write_domain


def row(
    worker: str, start: float, seconds: float, node: str = "n0", stage: str = "generate", gpus: str = ""
) -> LedgerRow:
    return LedgerRow(
        round=1,
        client_id=0,
        worker=worker,
        node=node,
        stage=stage,
        started_at=start,
        duration_seconds=seconds,
        gpus=gpus,
    )


def energies(rows: list[LedgerRow]) -> list[tuple[float, str]]:
    return [(pytest.approx(r.energy_joules), r.energy_source) for r in rows]


# --- counters


def test_a_gpu_is_metered_from_when_the_meter_was_made_and_others_are_not():
    nvml = FakeNvml([5_000, 70_000])
    meter = GpuMeter("GPU-1", nvml)
    assert meter.read_joules() == 0.0
    nvml.millijoules = [6_500, 72_000]
    assert meter.read_joules() == 2.0
    assert meter.name == "nvml"


def test_nvml_refuses_what_it_cannot_meter():
    for nvml in (FakeNvml([1], driver=False), FakeNvml([]), FakeNvml([None])):
        with pytest.raises(FakeNvml.NVMLError):
            GpuMeter("GPU-0", nvml)


def test_a_gpu_lost_in_mid_run_reads_as_not_a_number():
    nvml = FakeNvml([1, 2])
    meter = GpuMeter("GPU-1", nvml)
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
    assert meter.name == "rapl"


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


def test_a_run_opens_the_counters_of_what_it_uses(tmp_path):
    powercap, empty = tmp_path / "powercap", tmp_path / "empty"
    write_domain(powercap, "intel-rapl:0", "package-0", 1)
    gpus, no_gpu, one_old = FakeNvml([1, 2]), FakeNvml(driver=False), FakeNvml([None, 2])

    def opened(uses_gpu, root, nvml):
        return set(open_meters(uses_gpu=uses_gpu, rapl_root=root, nvml=nvml))

    assert opened(True, powercap, gpus) == {"GPU-0", "GPU-1", CPU}
    assert opened(True, empty, gpus) == {"GPU-0", "GPU-1"}
    assert opened(True, empty, one_old) == {"GPU-1"}
    assert opened(True, powercap, no_gpu) == {CPU}
    assert opened(False, powercap, gpus) == {CPU}
    assert opened(False, empty, gpus) == set()


def test_slices_have_the_counter_of_their_gpu():
    assert set(open_meters(uses_gpu=True, rapl_root=Path("none"), nvml=FakeNvml([1, 2], slices={1: 3}))) == {
        "GPU-0",
        "GPU-1",
    }


class ScriptedMeter:
    def __init__(self, readings, name="scripted"):
        self.name = name
        self.readings = list(readings)

    def read_joules(self):
        return self.readings.pop(0)


def test_laps_are_differences_and_join_without_gaps():
    meter = NodeMeter("n3", {CPU: ScriptedMeter([10.0, 14.0, 20.0])})
    (first,), (second,) = meter.lap(), meter.lap()
    assert [(lap.node, lap.joules, lap.counter) for lap in (first, second)] == [("n3", 4.0, CPU), ("n3", 6.0, CPU)]
    assert first.window_start <= first.window_end == second.window_start <= second.window_end


def test_a_lap_has_a_window_a_counter():
    meters = {"GPU-0": ScriptedMeter([0.0, 5.0], "nvml"), "GPU-1": ScriptedMeter([0.0, 70.0], "nvml")}
    meter = NodeMeter("n0", {**meters, CPU: ScriptedMeter([1.0, 3.0], "rapl")})
    assert meter.name == "nvml+rapl"
    assert {window.counter: window.joules for window in meter.lap()} == {"GPU-0": 5.0, "GPU-1": 70.0, CPU: 2.0}
    assert NodeMeter("n0", {}).name == ""
    assert NodeMeter("n0", {}).lap() == []


def test_a_lap_leaves_out_a_counter_that_failed_or_was_reset():
    failing = ScriptedMeter([10.0, math.nan, 20.0, 5.0, 6.0])
    meter = NodeMeter("n0", {"GPU-0": failing, "GPU-1": ScriptedMeter([0.0, 1.0, 2.0, 3.0, 4.0])})
    laps = [{window.counter: window.joules for window in meter.lap()} for _ in range(4)]
    assert laps == [{"GPU-1": 1.0}, {"GPU-1": 1.0}, {"GPU-1": 1.0}, {"GPU-0": 1.0, "GPU-1": 1.0}]


# --- sharing out


def test_equal_workers_share_by_busy_seconds_and_idle_ones_get_nothing():
    rows = [row("a", 0.0, 3.0), row("b", 0.0, 1.0), row("b", 0.0, 9.0, stage="idle")]
    shared = apportion(rows, [EnergyWindow("n0", 200.0, 0.0, 10.0)], {"a": Draw(4.0), "b": Draw(4.0)})
    assert energies(shared) == [(150.0, "measured"), (50.0, "measured"), (0.0, "measured")]
    assert [r.worker for r in shared] == ["a", "b", "b"]


def test_a_worker_of_more_threads_gets_more():
    rows = [row("three", 0.0, 2.0), row("one", 0.0, 2.0)]
    shared = apportion(rows, [EnergyWindow("n0", 100.0, 0.0, 2.0)], {"three": Draw(12.0), "one": Draw(4.0)})
    assert energies(shared) == [(75.0, "measured"), (25.0, "measured")]


def test_work_done_elsewhere_has_no_energy_and_takes_none_of_the_nodes():
    rows = [row("a", 0, 2), row("far", 0, 5), row("far", 5, 1, stage="idle")]
    filled = apportion(rows, [EnergyWindow("n0", 10.0, 0.0, 10.0)], {"a": Draw(4.0), "far": None})
    assert energies(filled[:1]) == [(10.0, "measured")]
    assert filled[1:] == rows[1:]
    assert {one.energy_source for one in rows[1:]} == {"unavailable"}
    assert energies(apportion(rows, [], {"a": Draw(4.0), "far": None})[:1]) == [(8.0, "estimated")]


def test_a_gpus_joules_go_to_who_had_it_and_the_cpus_to_all():
    """One second each at 4 W of threads: 12 J of the CPUs are 4 each, whatever a GPU may draw."""
    rows = [row("a", 0.0, 1.0, gpus="GPU-0"), row("b", 0.0, 1.0, gpus="GPU-1"), row("server", 0.0, 1.0)]
    windows = [
        EnergyWindow("n0", 700.0, 0.0, 1.0, "GPU-0"),
        EnergyWindow("n0", 90.0, 0.0, 1.0, "GPU-1"),
        EnergyWindow("n0", 55.0, 0.0, 1.0, "GPU-2"),  # nobody's
        EnergyWindow("n0", 12.0, 0.0, 1.0),
    ]
    gpu = Draw(4.0, 700.0)
    shared = apportion(rows, windows, {"a": gpu, "b": gpu, "server": Draw(4.0)})
    assert energies(shared) == [(704.0, "measured"), (94.0, "measured"), (4.0, "measured")]


def test_workers_of_one_gpu_share_it_by_busy_time_whatever_their_shares():
    rows = [
        row("a", 0.0, 3.0, gpus="GPU-0"),
        row("b", 5.0, 1.0, gpus="GPU-0"),
        row("b", 0.0, 9.0, gpus="GPU-0", stage="idle"),
        row("c", 0.0, 9.0, gpus="GPU-1", stage="idle"),  # alone with its own, and never at work
    ]
    windows = [EnergyWindow("n0", 200.0, 0.0, 10.0, "GPU-0"), EnergyWindow("n0", 30.0, 0.0, 10.0, "GPU-1")]
    shared = apportion(rows, windows, {"a": Draw(4.0, 70.0), "b": Draw(4.0, 350.0)})
    assert energies(shared) == [(150.0, "measured"), (50.0, "measured"), (0.0, "measured"), (30.0, "measured")]


def test_a_worker_on_several_gpus_has_the_joules_of_all():
    windows = [EnergyWindow("n0", 200.0, 0.0, 10.0, "GPU-0"), EnergyWindow("n0", 30.0, 0.0, 10.0, "GPU-1")]
    ranks, other = row("ranks", 0.0, 3.0, gpus="GPU-0,GPU-1"), row("other", 0.0, 1.0, gpus="GPU-1")
    assert energies(apportion([ranks, other], windows, {})) == [(222.5, "measured"), (7.5, "measured")]
    # One of its counters failed: half of its draw is estimated, and the CPUs' part with it.
    shared = apportion([ranks], windows[:1], {"ranks": Draw(4.0, 100.0)})
    assert energies(shared) == [(200.0 + 3 * 50.0 + 3 * 4.0, "estimated")]


def test_a_gpu_of_the_same_name_on_another_node_is_another():
    windows = [EnergyWindow("n0", 200.0, 0.0, 10.0, "GPU-0")]
    rows = [row("a", 0.0, 1.0, gpus="GPU-0"), row("b", 0.0, 1.0, node="n1", gpus="GPU-0")]
    shared = apportion(rows, windows, {"b": Draw(4.0, 10.0)})
    assert energies(shared) == [(200.0, "measured"), (14.0, "estimated")]


def test_work_on_a_gpu_without_a_counter_is_estimated_with_its_part_of_the_cpus():
    rows = [row("gpu", 0.0, 2.0, gpus="GPU-0"), row("server", 0.0, 2.0)]
    shared = apportion(rows, [EnergyWindow("n0", 50.0, 0.0, 2.0)], {"gpu": Draw(4.0, 300.0), "server": Draw(4.0)})
    assert energies(shared) == [(25.0 + 600.0, "estimated"), (25.0, "measured")]


def test_rows_without_a_window_get_the_estimate():
    rows = [
        row("a", 1.0, 2.0),
        row("a", 50.0, 2.0),  # after the window
        row("b", 1.0, 2.0, node="n1"),  # node without a meter
        row("b", 1.0, 2.0, node="n1", stage="idle"),
        row("unnamed", 1.0, 2.0, node="n1"),
    ]
    shared = apportion(rows, [EnergyWindow("n0", 60.0, 0.0, 10.0)], {"a": Draw(8.0), "b": Draw(8.0, 4.0)})
    assert energies(shared) == [
        (60.0, "measured"),
        (16.0, "estimated"),
        (16.0, "estimated"),
        (0.0, "estimated"),
        (8.0, "estimated"),
    ]


def test_a_row_over_the_edge_belongs_where_its_middle_is():
    windows = [EnergyWindow("n0", 10.0, 0.0, 10.0), EnergyWindow("n0", 90.0, 10.0, 20.0)]
    shared = apportion([row("a", 5.0, 8.0), row("a", 9.0, 8.0)], windows, {"a": Draw(4.0)})
    assert energies(shared) == [(10.0, "measured"), (90.0, "measured")]


def test_a_window_of_idle_rows_only_is_shared_by_duration():
    rows = [row("a", 0.0, 4.0, stage="idle"), row("b", 0.0, 1.0, stage="idle")]
    shared = apportion(rows, [EnergyWindow("n0", 50.0, 0.0, 4.0)], {})
    assert energies(shared) == [(40.0, "measured"), (10.0, "measured")]


def test_a_run_beside_others_keeps_the_counters_of_whole_gpus_of_its_own():
    counters = ("GPU-0", "GPU-1", "GPU-2", "GPU-3", CPU)
    windows = [EnergyWindow("n0", 1.0, 0.0, 1.0, counter) for counter in counters]
    own = [Place("n0", "GPU-0"), Place("n0", "GPU-1,GPU-2"), Place("n0", "GPU-3", sliced=True), Place("n0")]
    assert [window.counter for window in own_windows(windows, own)] == ["GPU-0", "GPU-1", "GPU-2"]
    assert own_windows(windows, []) == []


def test_the_estimate_counts_threads_and_gpu_shares():
    assert estimate_draw(3) == Draw(12.0)
    assert estimate_draw(1, num_gpus=0.5, gpu_watts=700.0) == Draw(4.0, 350.0)


GPUS_OF = {"w0": "GPU-0", "w1": "GPU-0", "w2": "GPU-0,GPU-1", "server": ""}

spans = st.tuples(
    st.sampled_from(["n0", "n1"]),
    st.sampled_from([*GPUS_OF]),
    st.sampled_from(["fine_tune", "generate", "idle"]),
    st.floats(0.0, 90.0),
    st.floats(0.0, 40.0),
)
joules = st.floats(0.0, 1e7)


@given(st.lists(spans, max_size=20), st.lists(joules, min_size=6, max_size=6), st.floats(0.5, 700.0))
def test_rows_sum_to_the_joules_of_the_counters_that_somebody_had(spans, joules, watts):
    rows = [row(worker, start, seconds, node, stage, GPUS_OF[worker]) for node, worker, stage, start, seconds in spans]
    windows = [
        EnergyWindow("n0", value, start, end, counter)
        for value, (counter, start, end) in zip(
            joules,
            [(counter, *times) for counter in (CPU, "GPU-0", "GPU-1") for times in ((0.0, 50.0), (60.0, 100.0))],
            strict=True,
        )
    ]
    shared = apportion(rows, windows, {"w0": Draw(watts, 3 * watts), "w1": Draw(4.0)})
    assert all(r.energy_joules >= 0.0 for r in shared)
    assert {r.energy_source for r in shared if r.node == "n1"} <= {"estimated"}

    def within(row, window):
        middle = row.started_at + row.duration_seconds / 2
        return row.node == "n0" and window.window_start <= middle <= window.window_end

    inside = [r for r in shared if any(within(r, window) for window in windows)]
    assert {r.energy_source for r in inside} <= {"measured"}
    had = [
        window.joules
        for window in windows
        if any(
            within(r, window) and r.duration_seconds > 1e-6 and window.counter in (CPU, *r.gpus.split(","))
            for r in inside
        )
    ]
    unsure = any(0 < r.duration_seconds <= 1e-6 for r in inside)
    if not unsure:
        assert sum(r.energy_joules for r in inside) == pytest.approx(sum(had))
