import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.evaluation.scores import mean_rouge_l, rouge_l


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat sat": 3 of 4 predicted and of 6 reference words.
    precision, recall = 3 / 4, 3 / 6
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l("The cat quietly sat", "the cat sat on the mat.") == pytest.approx(expected)


def test_words_count_in_order():
    assert rouge_l("b a", "a b") == pytest.approx(0.5)


def test_words_are_not_stemmed():
    assert rouge_l("cats", "cat") == 0.0


@given(st.text(), st.text())
def test_rouge_l_is_symmetric_bounded_and_one_for_equal_words(one, other):
    score = rouge_l(one, other)
    assert 0.0 <= score <= 1.0
    assert score == pytest.approx(rouge_l(other, one))
    assert rouge_l(one, one) in (0.0, 1.0)


def test_an_empty_answer_scores_zero():
    assert rouge_l("", "the cat") == 0.0


def test_the_mean_is_over_pairs():
    assert mean_rouge_l(["a b", "x"], ["a b", "y"]) == pytest.approx(0.5)
    assert math.isnan(mean_rouge_l([], []))
    with pytest.raises(ValueError, match="shorter"):
        mean_rouge_l(["a", "b"], ["a"])
