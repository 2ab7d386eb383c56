import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.evaluation.scores import chrf, exact_match, numeric_match, rouge_l


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


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("The  Cat, sat!", "a cat sat", 1.0),
        ("theatre", "atre", 0.0),  # an article is a word
        ("it's 3.5", "its 35", 1.0),  # punctuation goes, whatever it stands between
        ("an apple-tree", "Appletree.", 1.0),
        ("cats", "cat", 0.0),
        ("", "the", 1.0),
        ("Été", "été", 1.0),
    ],
)
def test_an_exact_match_is_normalised_as_squads_script_does(answer, reference, score):
    assert exact_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("So 3 apples and 4 pears make 7.", "3 + 4 = 7\n#### 7", 1.0),
        ("7, of which 3 are red", "#### 7", 0.0),  # the last number counts
        ("$1,234.50", "#### 1234.5", 1.0),
        ("3.0", "#### 3", 1.0),
        ("12,345,678 people", "12345678", 1.0),
        ("1, 2,3", "3", 1.0),  # no thousands
        ("-5", "5", 0.0),
        ("it is -5", "\u22125", 1.0),
        ("-$5", "#### -5", 1.0),
        ("+5", "5", 1.0),
        ("pages 10-12", "12", 1.0),  # no sign between two numbers
        ("about .5", "0.50", 1.0),
        ("2e3", "2000", 1.0),
        ("1e999999999999999999999", "3", 0.0),
        ("three", "#### 3", 0.0),
        ("", "#### 3", 0.0),
        ("x2", "2", 1.0),
    ],
)
def test_the_last_numbers_are_compared_as_numbers(answer, reference, score):
    assert numeric_match(answer, reference) == score


def test_a_reference_without_a_number_matches_nothing_and_counts_for_nothing():
    assert math.isnan(numeric_match("3", "three"))


@given(st.text())
def test_any_text_has_a_last_number_or_none(text):
    assert numeric_match(text, "3") in (0.0, 1.0)


def test_chrf_by_hand():
    # "abc" and "abd": of 3, 2 and 1 n-grams of 1, 2 and 3 characters, 2, 1 and 0 are shared; no longer ones exist.
    precision = recall = (2 / 3 + 1 / 2 + 0) / 3
    assert chrf("abc", "abd") == pytest.approx(5 * precision * recall / (4 * precision + recall))
    assert chrf("the cat", "the cat") == pytest.approx(1.0)
    assert chrf("", "the cat") == 0.0
