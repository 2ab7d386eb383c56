import math

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from semcons_ray.reporting import read_run
from tests.experiments.scripts import load_script
from tests.reporting.builder import write_run

theory = load_script("theory")


@pytest.mark.parametrize("t0", [1, 2, 10, 100])
def test_for_four_clients_the_bound_is_what_is_left_of_a_sum_of_inverse_squares(t0):
    rest = math.pi**2 / 6 - sum(1 / t**2 for t in range(1, t0 + 1))
    assert theory.bound(t0, prompts=48, clients=4, c=0.5) == pytest.approx(48 * (4 * 0.5) ** 2 * rest)


def test_for_eight_clients_it_is_what_is_left_of_a_sum_of_inverse_fourth_powers():
    expected = 10 * (4 * 2) ** 4 * (math.pi**4 / 90 - 1 - 1 / 16)
    assert theory.bound(2, prompts=10, clients=8, c=2) == pytest.approx(expected)


def test_it_is_finite_from_three_clients_on():
    assert theory.bound(5, prompts=1, clients=2, c=0.1) == math.inf
    assert all(math.isfinite(theory.bound(5, prompts=1, clients=m, c=0.1)) for m in range(3, 20))


@given(
    t0=st.integers(1, 10**6),
    prompts=st.integers(1, 1000),
    clients=st.integers(3, 20),
    c=st.floats(0.01, 10),
)
def test_it_falls_with_time_and_grows_with_prompts_and_errors(t0, prompts, clients, c):
    delta = theory.bound(t0, prompts=prompts, clients=clients, c=c)
    assert theory.bound(t0 + 1, prompts=prompts, clients=clients, c=c) < delta
    assert theory.bound(t0, prompts=prompts, clients=clients, c=1.1 * c) > delta
    assert theory.bound(t0, prompts=2 * prompts, clients=clients, c=c) == pytest.approx(2 * delta)


@pytest.mark.parametrize(("clients", "c"), [(3, 0.2), (4, 0.5), (5, 1.0), (8, 2.0), (9, 2.0)])
def test_it_covers_the_chance_that_half_of_independent_clients_miss_a_label(clients, c):
    t0 = 3
    missed = sum(binom.sf(math.ceil(clients / 2) - 1, clients, c / t) for t in range(t0 + 1, 20_000))
    assert missed <= theory.bound(t0, prompts=1, clients=clients, c=c)


@pytest.mark.parametrize(("clients", "c"), [(3, 0.1), (4, 1.0), (8, 5.0), (16, 0.5)])
def test_the_first_telling_round_is_the_first_below_one(clients, c):
    setting = {"prompts": 48, "clients": clients, "c": c}
    first = theory.first_telling_round(**setting)
    assert theory.bound(first, **setting) < 1 <= theory.bound(first - 1, **setting)


def test_too_few_clients_never_tell_anything():
    assert theory.first_telling_round(prompts=48, clients=2, c=0.1) is None


ANSWERS = pd.DataFrame(
    [
        # Round, prompt, client, answer, chosen: prompt 1 gives no label in round 2.
        (1, 0, 0, "red", True),
        (1, 0, 1, "blue", False),
        (1, 1, 0, "one", False),
        (1, 1, 1, "two", True),
        (2, 0, 0, "red", False),
        (2, 0, 1, "crimson", True),
        (2, 1, 0, "two", False),
        (2, 1, 1, "three", False),
        (3, 0, 0, "blue", True),
        (3, 0, 1, "crimson", False),
        (3, 1, 0, "two", True),
        (3, 1, 1, "two", False),
    ],
    columns=["round", "prompt_id", "client_id", "answer", "chosen"],
)
VECTORS = {"red": (1.0, 0.0), "crimson": (0.9, 0.1**0.5), "blue": (0.0, 1.0), "two": (1.0, 0.0)}


def embed(texts):
    return torch.nn.functional.normalize(torch.tensor([VECTORS[text] for text in texts]), dim=1)


def test_a_client_reproduces_the_labels_of_the_round_before():
    expected = pd.DataFrame({0: [1.0, 0.0], 1: [0.0, 1.0]}, index=[2, 3])
    assert theory.reproduced(ANSWERS).to_dict() == expected.to_dict()


def test_a_label_that_says_the_same_in_other_words_does_not_count_as_changed():
    assert theory.semantic_churn(ANSWERS, embed).to_dict() == {2: 0.0, 3: 1.0}


def test_c_is_the_least_that_holds_in_every_round():
    table = pd.DataFrame({"round": [1, 2, 3] * 2, "c": [math.nan, 1.0, 2.0, math.nan, 2.0, 1.4]})
    verdict = theory.judge(table, prompts=48, clients=4)
    assert verdict["c"] == pytest.approx(1.7)
    assert verdict["vacuous"]
    assert verdict["bound_after_last_round"] == theory.bound(3, prompts=48, clients=4, c=verdict["c"])


def test_the_last_round_has_no_consensus_and_is_left_out(tmp_path):
    run = read_run(write_run(tmp_path / "run", num_rounds=3, answer_last_round=False))
    table = theory.by_round(run, lambda texts: torch.ones(len(texts), 1))
    assert table["round"].tolist() == [1, 2]
    assert table["agreement"].tolist() == pytest.approx([0.4, 0.4])
    assert theory.judge(table, prompts=5, clients=3)["rounds"] == 2


def test_only_runs_that_elect_an_answer_are_read(tmp_path):
    write_run(tmp_path / "elects")
    for rule in ("reference", "own_answer"):
        write_run(tmp_path / rule, settings={"algorithm": {"rule": rule}})
    write_run(tmp_path / "alone", local_only=True)
    assert [run.folder.name for run in theory.find_runs([tmp_path])] == ["elects"]


def test_one_round_says_nothing():
    with pytest.raises(SystemExit, match="three rounds at least"):
        theory.judge(pd.DataFrame({"round": [1], "c": [math.nan]}), prompts=48, clients=4)
