"""The committed dry runs for eight cards, by closed forms of the published shapes."""

import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from semcons_ray.modeling.footprint import CUDA_DEVICE_BYTES
from semcons_ray.modeling.shapes import SHAPES, Shape
from tests.experiments.scripts import load_script

plans = load_script("gpu", "plans.py")
COMMITTED = json.loads((Path(plans.__file__).parent / "plans.json").read_text(encoding="utf-8"))
RANK, LENGTH = 16, 2048  # of the preset


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", COMMITTED)
def test_a_plan_that_is_made_now_is_the_one_that_is_committed(name: str, tmp_path: Path) -> None:
    assert plans.plan(name, tmp_path) == COMMITTED[name]


def shape_of(name: str) -> Shape:
    return SHAPES["llama-3.1-70b" if "70b" in name else "llama-3.1-8b"]


@pytest.mark.parametrize(
    ("name", "rows", "ranks"), [("8b, a card a worker", 4, 1), ("8b, half a card a worker", 4, 1),
                                ("70b on eight cards", 1, 8)]
)  # fmt: skip
def test_memory_of_a_card_is_that_of_closed_forms(name: str, rows: int, ranks: int) -> None:
    """Two bytes a weight, divided among ranks, which gather the largest matrix; 24 bytes a weight of an adapter."""
    shape, found = shape_of(name), COMMITTED[name]
    parameters = shape.parameters + shape.hidden * (2 * shape.layers + 1)  # the norms
    assert found["parameters"] == parameters
    card, embedding = found["card_bytes"], 2 * shape.vocabulary * shape.hidden
    assert card["weights"] == (2 * parameters if ranks == 1 else ceil(2 * parameters / ranks) + embedding)
    assert card["adapter and its optimizer"] == 24 * RANK * sum(shape.linear_maps.values())
    tokens, at_work = rows * LENGTH, 6 * shape.hidden + 4 * shape.queries + 4 * shape.feed_forward + LENGTH
    layers = 2 * tokens * shape.layers * shape.hidden  # what goes into each layer; one layer is computed again
    assert card["activations"] == layers + 3 * tokens * at_work
    logits = shape.vocabulary * (tokens // 2 * 6 + 64 * 8)
    again = min(3 * tokens * at_work, shape.vocabulary * tokens // 2 * 2)
    evaluated = shape.vocabulary * (ceil(8 / ranks) * LENGTH // 2 * 2 + 64 * 8)
    assert card["logits"] == max(logits, evaluated) - again
    assert card["fragmentation"] == int(0.03 * (card["activations"] + card["logits"]))
    assert card["context"] == CUDA_DEVICE_BYTES
    assert sum(card.values()) == found["card_total_bytes"] <= found["card_limit_bytes"]


@pytest.mark.parametrize("name", COMMITTED)
def test_the_key_value_cache_of_answers_is_smaller_than_what_training_keeps(name: str) -> None:
    shape, prompts = shape_of(name), 1 if "70b" in name else 8
    assert prompts * (LENGTH + 512) * shape.layers * 2 * shape.keys * 2 < COMMITTED[name]["card_bytes"]["activations"]


@pytest.mark.parametrize(("name", "workers"), [("8b, a card a worker", 8), ("8b, half a card a worker", 16),
                                               ("70b on eight cards", 1)])  # fmt: skip
def test_each_client_has_one_worker_and_all_cards_are_used(name: str, workers: int) -> None:
    found: list[dict[str, Any]] = COMMITTED[name]["workers"]
    assert len(found) == workers
    clients = sorted(client for worker in found for client in worker["clients"])
    assert clients == list(range(4 if "70b" in name else 16))
    assert sum(worker["cards"] for worker in found) == 8
    assert sum(worker["host_bytes"] for worker in found) < plans.NODE.memory_bytes
