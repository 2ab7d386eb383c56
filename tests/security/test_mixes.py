import numpy as np
import pandas as pd
import pytest

from semcons_ray.data.examples import Example
from semcons_ray.security.mixes import compare_mixes, infer_mixes
from tests.security.letters import embed

KNOWN = [Example("", "aaa", "vowels"), Example("", "eea", "vowels"), Example("", "xyz", "others")]


def said(*rows: tuple[int, int, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["prompt_id", "client_id", "answer"])


def test_answers_lean_to_what_a_client_knows_more_of_than_the_others() -> None:
    answers = said((0, 4, "ae"), (0, 7, "zx"), (1, 4, "mae"), (1, 4, "ma"), (1, 7, "mxz"), (2, 4, "x"), (2, 7, "a"))
    categories, mixes = infer_mixes(answers, KNOWN, embed)
    assert categories == ["others", "vowels"]
    assert {client: mix.tolist() for client, mix in mixes.items()} == {
        4: pytest.approx([1 / 3, 2 / 3]),
        7: pytest.approx([2 / 3, 1 / 3]),
    }


def test_a_prompt_that_one_client_answered_tells_nothing() -> None:
    _, mixes = infer_mixes(said((0, 4, "a"), (0, 7, "x"), (1, 4, "x"), (2, 4, "x"), (2, 7, " ")), KNOWN, embed)
    assert mixes[4].tolist() == [0.0, 1.0]


def test_errors_by_hand() -> None:
    true = {0: np.array([1.0, 0.0]), 1: np.array([0.5, 0.5]), 2: np.array([0.0, 1.0])}
    inferred = {0: np.array([0.9, 0.1]), 1: np.array([0.5, 0.5]), 2: np.array([0.3, 0.7])}
    table = compare_mixes(inferred, true, np.random.default_rng(0))
    assert table["error"].tolist() == pytest.approx([0.1, 0.0, 0.3])
    assert table["guess"].tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert table["p"].tolist() == pytest.approx([1 / 6] * 3)  # no other way to give three mixes fits as well


def test_with_more_clients_ways_are_drawn() -> None:
    true = {client: np.eye(9)[client] for client in range(9)}
    table = compare_mixes(true, true, np.random.default_rng(0))
    assert table["p"].iloc[0] < 0.001
    assert (table["error"] == 0).all()
