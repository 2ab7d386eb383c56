import numpy as np
import pytest

from semcons_ray.data.canaries import Canary
from semcons_ray.security.canaries import OWN_MODEL, Bigrams, in_models, in_texts, recovered

KIND = "in distribution"


def flipped(*coins: bool, client: int = 0) -> list[Canary]:
    return [Canary(client, KIND, f"q{i}", f"secret {i}", "", coin) for i, coin in enumerate(coins)]


def test_what_tells_all_coins() -> None:
    canaries = flipped(*[True] * 10, *[False] * 15)
    scores = np.r_[np.arange(10) + 100.0, np.arange(15)]
    row = recovered(canaries, {"answers": scores}, np.random.default_rng(0)).iloc[0]
    assert (row["auc"], row["tpr"], row["exposure"]) == (1.0, 1.0, 4.0)  # log2(15 + 1)
    assert row["p"] < 1e-4
    assert row["p_adjusted"] == row["p"]


def test_what_tells_none() -> None:
    row = recovered(flipped(*[True, False] * 15), {"answers": np.zeros(30)}, np.random.default_rng(0)).iloc[0]
    assert (row["auc"], row["tpr"], row["p"]) == (0.5, 0.0, 1.0)
    assert row["exposure"] == pytest.approx(np.log2(16 / 8.5))  # in the middle of 15 equal ones
    assert row["exposure_by_chance"] == pytest.approx(np.mean(np.log2(16 / np.arange(1, 17))))


def test_a_rank_by_hand() -> None:
    scores = np.array([5.0, 3.0, 9.0, 3.0, 1.0])
    row = recovered(flipped(True, True, False, False, False), {"labels": scores}, np.random.default_rng(0)).iloc[0]
    # 5 is below 9; 3 is below 9 and equal to 3
    assert row["auc"] == pytest.approx((2 / 3 + 1.5 / 3) / 2)
    assert row["exposure"] == pytest.approx((np.log2(4 / 2) + np.log2(4 / 2.5)) / 2)
    assert row["tpr"] == 0.0


def test_of_many_others_one_in_a_hundred_may_be_mistaken() -> None:
    canaries = flipped(*[True] * 4, *[False] * 200)
    scores = np.r_[[197.5, 196.5, 300.0, -1.0], np.arange(200)]  # below 2 others, below 3, below none, below all
    assert recovered(canaries, {"answers": scores}, np.random.default_rng(0)).iloc[0]["tpr"] == 0.5


def test_a_clients_own_model_is_no_leak_and_takes_no_part_in_the_correction() -> None:
    canaries = flipped(*[True, False] * 10)
    coin = np.array([one.inserted for one in canaries], dtype=float)
    table = recovered(canaries, {"answers": 0 * coin, OWN_MODEL: coin}, np.random.default_rng(0)).set_index("place")
    assert table.loc[OWN_MODEL, "p"] < 0.001
    assert np.isnan(table.loc[OWN_MODEL, "p_adjusted"])
    assert table.loc["answers", "p_adjusted"] == 1.0


def test_what_cannot_be_seen_or_compared_has_no_row() -> None:
    unseen = {"answers": np.full(4, np.nan)}
    assert recovered(flipped(True, False, True, False), unseen, np.random.default_rng(0)).empty
    assert recovered(flipped(True, True), {"answers": np.zeros(2)}, np.random.default_rng(0)).empty
    assert recovered([], {}, np.random.default_rng(0)).empty


def test_a_2_gram_model_by_hand() -> None:
    model = Bigrams(["a b", "A c"], ["d"])  # words a, b, c, d
    expected = [np.log((2 + 1) / (2 + 4)), np.log((1 + 1) / (2 + 4)), np.log((0 + 1) / (0 + 4))]
    assert model.score("a b d") == pytest.approx(np.mean(expected))


def test_texts_that_hold_a_canary_score_it_higher_and_a_client_without_texts_has_none() -> None:
    canaries = [*flipped(True, False), *flipped(True, client=7)]
    scores = in_texts(canaries, {0: ["it is secret 0", "or not"]})
    assert scores[0] > scores[1]
    assert np.isnan(scores[2])


def test_own_and_other_models_by_hand() -> None:
    canaries = [*flipped(True, client=0), *flipped(False, client=1), *flipped(False, client=9)]
    nll = {0: np.array([1.0, 2.0, 3.0]), 1: np.array([4.0, 5.0, 6.0]), 2: np.array([7.0, 8.0, 9.0])}
    places = in_models(canaries, nll, same=False)
    np.testing.assert_array_equal(places[OWN_MODEL], [1.0, 5.0, np.nan])
    np.testing.assert_array_equal(places["other clients' models"], [5.5, 5.0, 6.0])
    assert [*in_models(canaries, nll, same=True)] == ["shared model"]
