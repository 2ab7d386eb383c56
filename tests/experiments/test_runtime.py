"""The calibration of devices: what its page and the table of devices say follows from the measurements."""

import pandas as pd
import pytest

from semcons_ray.timeline.profiles import device
from tests.experiments.scripts import load_script

calibrate = load_script("runtime", "calibrate.py")


@pytest.fixture(scope="module")
def found():
    return calibrate.predictions()


def test_the_committed_table_is_what_the_script_makes(found):
    pd.testing.assert_frame_equal(pd.read_csv(calibrate.PREDICTED), found, rtol=1e-3)


def test_what_was_fitted_is_predicted(found):
    fitted = found[found["fitted"]]
    assert fitted[fitted["device"] == "two-cores"]["error"].abs().max() < 0.01
    assert fitted["error"].abs().max() < 0.13  # one number for three batches of a card


def test_the_profile_is_what_was_fitted(capsys):
    calibrate.predictions()
    lines = [line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines()]
    printed = {place: float(value) for place, value in lines}
    for field in ("peak_tflops", "memory_bandwidth_gb_s", "activation_bytes", "generation_layer_seconds"):
        assert getattr(device("two-cores"), field) == pytest.approx(printed[f"two-cores, {field}"], rel=0.01)
    for field in ("training_layer_seconds", "generation_layer_seconds"):
        both = [printed[f"h200-eager, fitted on {name}, {field}"] for name in ("smollm2-135m", "llama-3.2-1b")]
        assert min(both) <= getattr(device("h200-eager"), field) <= max(both)
