"""Closed forms of the device model."""

import dataclasses

import pytest

from semcons_ray.errors import ConfigError
from semcons_ray.modeling.shapes import SHAPES
from semcons_ray.timeline.devices import MINILM, Device, Model, Rates

CARD = Device(
    peak_tflops=100,
    memory_gb=40,
    memory_bandwidth_gb_s=1000,
    idle_watts=50,
    busy_watts=250,
    training_utilization=0.5,
    generation_utilization=0.8,
)
SLOW_HOST = dataclasses.replace(CARD, training_layer_seconds=0.01, generation_layer_seconds=0.002)
MODEL = Model(parameters=10**9, layers=20, key_value_bytes=50_000)
LARGE = dataclasses.replace(MODEL, parameters=2 * 10**9)


def test_training_takes_4_flops_a_parameter_and_token():
    assert CARD.training_seconds(50_000, MODEL) == pytest.approx(4 * 10**9 * 50_000 / 50e12)


def test_reading_takes_half_of_training():
    assert CARD.embedding_seconds(700, MODEL) == pytest.approx(CARD.training_seconds(700, MODEL) / 2)


def test_twice_the_parameters_or_tokens_take_twice_the_time():
    assert CARD.training_seconds(999, LARGE) == pytest.approx(2 * CARD.training_seconds(999, MODEL))
    assert CARD.training_seconds(2 * 999, MODEL) == pytest.approx(2 * CARD.training_seconds(999, MODEL))
    assert CARD.generation_seconds(64, LARGE, 1) == pytest.approx(2 * CARD.generation_seconds(64, MODEL, 1))


def test_a_step_of_few_rows_reads_all_weights():
    assert CARD.generation_seconds(64, MODEL, 1) == pytest.approx(64 * 2e9 / 800e9)
    assert CARD.generation_seconds(64, MODEL, 8) == pytest.approx(64 / 8 * 2e9 / 800e9)


def test_many_rows_are_bound_by_arithmetic_and_no_faster_together():
    assert CARD.generation_seconds(6400, MODEL, 1600) == pytest.approx(6400 * 2e9 / 50e12)
    assert CARD.generation_seconds(6400, MODEL, 3200) == pytest.approx(CARD.generation_seconds(6400, MODEL, 1600))


def test_keys_and_values_are_read_for_each_row():
    steps = 64 / 8
    without = CARD.generation_seconds(64, MODEL, 8)
    assert CARD.generation_seconds(64, MODEL, 8, context=300) - without == pytest.approx(steps * 8 * 300 * 5e4 / 800e9)


def test_prompts_are_read_before():
    answered = CARD.generation_seconds(64, MODEL, 8, prompt_tokens=5000)
    assert answered - CARD.generation_seconds(64, MODEL, 8) == pytest.approx(CARD.embedding_seconds(5000, MODEL))


def test_small_work_waits_for_the_host():
    assert SLOW_HOST.training_seconds(512, MODEL, steps=3) == pytest.approx(3 * 20 * 0.01)
    assert SLOW_HOST.generation_seconds(64, MODEL, 8) == pytest.approx(64 / 8 * 20 * 0.002)
    assert SLOW_HOST.training_seconds(10**6, MODEL, steps=3) == CARD.training_seconds(10**6, MODEL)


def test_activations_of_wide_layers_decide_where_memory_is_slow():
    wide = dataclasses.replace(MODEL, width=2000)
    slow = dataclasses.replace(CARD, activation_bytes=10_000)
    assert slow.training_seconds(70, wide) == pytest.approx(70 * 20 * 2000 * 10_000 / 800e9)
    assert slow.training_seconds(70, MODEL) == CARD.training_seconds(70, wide)  # of which the width is not known


def test_a_cpu_does_one_after_the_other():
    wide = dataclasses.replace(MODEL, width=2000)
    cpu = dataclasses.replace(SLOW_HOST, overlaps=False, activation_bytes=100)
    arithmetic, memory, host = 4e9 * 512 / 50e12, 512 * 20 * 2000 * 100 / 800e9, 3 * 20 * 0.01
    assert cpu.training_seconds(512, wide, steps=3) == pytest.approx(arithmetic + memory + host)
    assert cpu.generation_seconds(64, wide, 8) == pytest.approx(8 * (2e9 * 8 / 50e12 + 2e9 / 800e9 + 20 * 0.002))


def test_devices_that_work_as_one_are_as_fast_and_hungry_as_all():
    four = dataclasses.replace(CARD, num=4)
    assert four.training_seconds(800, MODEL) == pytest.approx(CARD.training_seconds(800, MODEL) / 4)
    assert four.generation_seconds(64, MODEL, 1) == pytest.approx(CARD.generation_seconds(64, MODEL, 1) / 4)
    assert four.joules(10, 5) == 4 * CARD.joules(10, 5) == 4 * (10 * 250 + 5 * 50)


def test_weights_must_fit():
    CARD.fits(dataclasses.replace(MODEL, parameters=20 * 10**9))
    with pytest.raises(ConfigError, match=r"^lab\.devices: a device has 40 GB of memory, and .* take 42 GB; [^\n]*$"):
        CARD.fits(dataclasses.replace(MODEL, parameters=21 * 10**9), "lab.devices")
    dataclasses.replace(CARD, num=2).fits(dataclasses.replace(MODEL, parameters=21 * 10**9))


def test_the_rates_that_were_measured_are_predicted_again_and_scaled_by_size():
    rates = Rates(
        measured_parameters=10**8,
        training_tokens_per_second=300,
        generation_tokens_per_second=200,
        generation_batch_size=8,
    )
    device = Device(**rates.roofline(), memory_gb=8, idle_watts=1, busy_watts=8)
    measured = Model(parameters=10**8, layers=30)
    assert device.training_seconds(600, measured) == pytest.approx(2)
    assert device.generation_seconds(600, measured, 8) == pytest.approx(3)
    assert device.training_seconds(600, MODEL) == pytest.approx(20)


def test_a_model_of_a_shape():
    model = Model.of(SHAPES["llama-3.1-8b"])
    assert model.weight_bytes == 2 * SHAPES["llama-3.1-8b"].parameters
    assert model.key_value_bytes == 2 * 32 * 8 * 128 * 2  # keys and values of 32 layers, 8 heads of 128, in 16 bits
    assert Model.of(SHAPES["llama-3.1-8b"], bytes_per_parameter=0.5).weight_bytes == model.weight_bytes / 4


def test_the_embedder_by_hand():
    width, inner = 384, 1536
    matrices = 6 * (4 * width * width + 2 * width * inner)
    assert pytest.approx(matrices, rel=0.005) == MINILM.parameters
