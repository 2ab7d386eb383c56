import time

import numpy as np
import pandas as pd
import psutil
import pytest

from tests.experiments.scripts import load_script

many = load_script("benchmarks/many_clients")
MIB = 1 << 20
ROUNDS = pd.DataFrame({"round": range(11), "started_at": np.arange(11) * 10.0, "duration_seconds": 10.0})


def samples(pid: int, growth_from_five: float, until: float = 110.0) -> pd.DataFrame:
    """A process of 100 MiB that grows fast up to round 5, and by so many MiB a round from then on."""
    times = np.arange(0.0, until)
    late = np.maximum(times / 10 - 5, 0)
    size = (100 - 20 * np.maximum(5 - times / 10, 0) / 5 + growth_from_five * late) * MIB
    frame = pd.DataFrame({"time": times, "pid": pid, "name": "worker", "rss": size, "pss": size, "uss": size})
    frame["round"] = many.round_of(frame["time"], ROUNDS)
    return frame


def test_times_are_assigned_to_rounds():
    times = pd.Series([-1.0, 0.0, 55.0, 109.0, 111.0])
    assert many.round_of(times, ROUNDS).tolist() == pytest.approx([np.nan, 0.0, 5.5, 10.9, np.nan], nan_ok=True)


def test_the_slope_is_that_of_round_five_on_and_of_processes_that_last():
    table = pd.concat([samples(1, 0.0), samples(2, 2.0), samples(3, 0.0, until=80)])
    found = {entry["pid"]: entry for entry in many.slopes(table, last_round=10)}
    assert set(found) == {1, 2}
    assert found[1]["rss_percent_a_round"] == pytest.approx(0.0, abs=1e-3)
    assert found[2]["rss_percent_a_round"] == pytest.approx(100 * 2 / 106, rel=0.01)


def test_a_process_is_found_by_its_mark_and_measured():
    me = psutil.Process()
    size = many.memory(me.pid)
    assert 0 < size["uss"] <= size["pss"] <= size["rss"]
    with psutil.Popen(["sleep", "60"], env={many.MARK: "here"}) as child:
        try:
            while child.name() != "sleep":  # until then it is a copy of this process, with its variables
                time.sleep(0.01)
            assert many.marked("here") == [f"{child.pid} sleep"]
        finally:
            child.kill()
    assert many.marked("here") == []


def test_the_configuration_fits_the_data(tmp_path):
    from semcons_ray.config import load_config
    from semcons_ray.runs.assembly import prepare_data
    from semcons_ray.runs.run_folder import RunFolder

    config = load_config(many.write_config(tmp_path, clients=200, rounds=20))
    split = prepare_data(config, RunFolder.create(tmp_path / "run", config))
    assert [len(private) for private in split.private] == [4] * 200
