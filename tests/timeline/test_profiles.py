"""The tables of devices, links and regions, and profiles of one's own."""

import dataclasses
import itertools
import subprocess
import sys

import pytest

from semcons_ray.errors import ConfigError
from semcons_ray.modeling.shapes import SHAPES
from semcons_ray.timeline.devices import Model
from semcons_ray.timeline.profiles import device, link, model, region, table

OWN = {
    "peak_tflops": 100,
    "memory_gb": 40,
    "memory_bandwidth_gb_s": 1000,
    "idle_watts": 50,
    "busy_watts": 250,
}
MEASURED = {
    "measured_parameters": 10**8,
    "training_tokens_per_second": 300,
    "generation_tokens_per_second": 200,
    "generation_batch_size": 8,
    "memory_gb": 8,
    "idle_watts": 1,
    "busy_watts": 8,
}
LINE = {"up_mbit": 8, "down_mbit": 80}


@pytest.mark.parametrize("name", table("devices"))
def test_each_device_says_what_it_is_and_where_its_numbers_are_from(name):
    found = device(name)
    assert found.name == name
    assert found.description
    assert "http" in found.source or "as " in found.source.lower()
    assert found.idle_watts < found.busy_watts


@pytest.mark.parametrize("name", table("links"))
def test_each_link_says_what_it_is_and_where_its_numbers_are_from(name):
    found = link(name)
    assert found.name == name
    assert found.description
    assert found.source
    assert found.up_mbit <= found.down_mbit
    assert found.joules_per_megabyte_down <= found.joules_per_megabyte_up


def test_each_region_has_a_plausible_factor():
    grams = [region(name) for name in table("regions")]
    assert len(grams) > 200
    assert all(0 < value < 1400 for value in grams)  # 1,306 in Turkmenistan
    assert region("norway") < region("world") < region("poland")
    assert region("canada-quebec") < region("canada") < region("canada-alberta")
    assert region("us-vermont") < region("us-california") < region("united-states") < region("us-wyoming")


def test_factors_of_states_are_grams_of_pounds():
    assert region("us-alabama") == pytest.approx(713.976 * 0.45359237, abs=0.001)  # pounds a MWh
    assert region("canada-saskatchewan") == pytest.approx(0.507 * 743.8416 + 0.279 * 995.7260, abs=0.001)  # gas, coal


def test_a_larger_device_is_faster():
    rows = model("llama-3.1-8b")
    ladder = ("raspberry-pi-5", "laptop-cpu", "macbook-m4", "macbook-m3-max", "rtx-4090", "h100", "8xh100")
    for slow, fast in itertools.pairwise(ladder):
        assert device(fast).training_seconds(1000, rows) < device(slow).training_seconds(1000, rows)
        assert device(fast).generation_seconds(1000, rows, 8) < device(slow).generation_seconds(1000, rows, 8)


def test_a_faster_link_carries_more():
    ladder = ("4g", "dsl", "cable", "fibre", "lan", "datacentre")
    rates = [(link(name).up_bytes_per_second, link(name).down_bytes_per_second) for name in ladder]
    assert [up for up, _ in rates] == sorted(up for up, _ in rates)
    assert [down for _, down in rates] == sorted(down for _, down in rates)


def test_each_size_fits_somewhere_and_not_everywhere():
    for name, small, large in (
        ("llama-3.1-8b", "rtx-3060", "rtx-4090"),
        ("llama-3.1-70b", "h200", "8xh100"),
        ("llama-3.1-405b", "8xh100", "16xh100"),
    ):
        device(large).fits(model(name))
        with pytest.raises(ConfigError, match=rf"^federation\.devices: {small} has "):
            device(small).fits(model(name))


def test_a_model_by_the_name_of_its_shape():
    assert model("smollm2-135m") == Model.of(SHAPES["smollm2-135m"])


def test_a_device_of_ones_own_has_the_same_fields():
    copied = dataclasses.replace(device("h100"), name="", description="", source="")
    plain = {key: value for key, value in table("devices")["h100"].items() if key not in ("description", "source")}
    assert device(plain) == copied


def test_a_device_whose_rates_are_measured():
    mine = device(MEASURED)
    assert mine.training_seconds(300, Model(parameters=10**8, layers=1)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("find", "wrong", "says"),
    [
        (device, "h10", "federation.devices: there is no device h10 (did you mean h100?); there are h200, "),
        (link, "fiber", "federation.links: there is no link fiber (did you mean fibre?); there are datacentre, "),
        (region, "germnay", "federation.region: there is no region germnay (did you mean germany?); there are world"),
        (model, "llama-3.1-9b", "--model: there is no model llama-3.1-9b (did you mean llama-3.1-8b?); there are "),
        (device, {**OWN, "watt": 3}, "federation.devices: there is no watt"),
        (device, {**OWN, "peak_tflop": 3}, "federation.devices: there is no peak_tflop (did you mean peak_tflops?)"),
        (device, {**OWN, 3: 3}, "federation.devices: there is no 3; there are "),
        (device, {**OWN, "memory_gb": 0}, "federation.devices: memory_gb: Input should be greater than 0 (got 0)"),
        (device, {**OWN, "num": 1.5}, "federation.devices: num: Input should be a valid integer (got 1.5)"),
        (device, {**OWN, "num": True}, "federation.devices: num: Input should be a valid integer (got True)"),
        (device, {**OWN, "busy_watts": "much"}, "federation.devices: busy_watts: "),
        (device, {**OWN, "busy_watts": float("inf")}, "federation.devices: busy_watts: Input should be a finite"),
        (device, {**OWN, "training_utilization": 40}, "federation.devices: training_utilization: "),
        (device, {"peak_tflops": 3}, "federation.devices: memory_gb: Field required"),
        (device, {**MEASURED, "generation_batch_size": 0}, "federation.devices: generation_batch_size: "),
        (device, {**OWN, "measured_parameters": 9}, "federation.devices: training_tokens_per_second: Field required"),
        (device, {**MEASURED, "peak_tflops": 1}, "federation.devices: peak_tflops follows from the measured rates"),
        (link, {**LINE, "loss": 1}, "federation.links: loss: Input should be less than 1 (got 1)"),
        (link, {**LINE, "latency_ms": -1}, "federation.links: latency_ms: "),
        (link, {"up_mbit": 5}, "federation.links: down_mbit: Field required"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(find, wrong, says):
    with pytest.raises(ConfigError) as caught:
        find(wrong)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)
    assert "Args" not in str(caught.value)  # pydantic's own


def test_the_setting_is_named():
    with pytest.raises(ConfigError, match=r"^lab\.server: there is no device nothing; "):
        device("nothing", "lab.server")


def test_the_clock_needs_no_torch():
    code = "import sys, semcons_ray.timeline.profiles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
