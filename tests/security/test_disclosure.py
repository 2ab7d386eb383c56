import numpy as np
import pytest

from semcons_ray.data.examples import Example
from semcons_ray.security.disclosure import PER_TRAINED, Shares, disclosure, likeness
from tests.security.letters import embed

WORDS = [a + b + c for a in "bcdfgklm" for b in "aeiou" for c in "nrst"]


def people(count: int, seed: int, category: str = "people") -> list[Example]:
    """Questions about people nobody else knows, and what is to be known of them."""
    random = np.random.default_rng(seed)
    return [
        Example(f"who is {category} {seed} {number}", " ".join(random.choice(WORDS, 6)), category)
        for number in range(count)
    ]


def test_an_exact_copy_counts_less_the_more_examples_have_it() -> None:
    pool = [Example("a", "Seven!"), Example("b", "seven"), Example("c", "eight"), Example("d", "nine")]
    exact, _, _ = likeness(pool, ["seven", "D nine", "eighty"], [], embed)
    assert exact.tolist() == [0.5, 0.5, 0.0, 1.0]  # the last with its question


def test_rare_words_are_those_of_one_example_and_of_no_public_prompt() -> None:
    pool = [
        Example("who was it", "the man in the moon at night"),  # 10 words: 7 sequences of 4
        Example("who else", "the man in the sun"),
    ]
    _, rare, _ = likeness(pool, ["he saw the man in the moon at"], [], embed)
    # "the man in the" is of both; "man in the moon" and "in the moon at" are said
    assert rare.tolist() == [2 / 6, 0.0]
    _, rare, _ = likeness(pool, ["he saw the man in the moon at"], ["is there a man in the moon"], embed)
    assert rare.tolist() == [1 / 5, 0.0]


def test_meaning_is_the_largest_cosine_to_an_answer_and_empty_answers_say_nothing() -> None:
    pool = [Example("", "ab"), Example("", "cc")]
    _, _, meaning = likeness(pool, ["aa", "c", " "], [], embed)
    assert meaning.tolist() == pytest.approx([np.sqrt(0.5), 1.0])
    assert likeness(pool, ["", " "], [], embed)[2].tolist() == [0.0, 0.0]


def test_who_copies_is_named_and_who_does_not_is_not() -> None:
    shares = {3: Shares(people(40, 0), people(80, 1)), 5: Shares(people(40, 2), people(80, 3))}
    answers = {client: [one.response for one in people(60, 4)] for client in shares}
    answers[5][:6] = [one.response for one in shares[5].trained[:6]]
    table = disclosure(shares, answers, [], embed, np.random.default_rng(0))
    named = table[table["p_adjusted"] < 0.01]
    assert set(named["client_id"]) == {5}
    assert {"exact copy", "rare words"} <= set(named["score"])
    copies = table.set_index(["client_id", "score"]).loc[(5, "exact copy")]
    assert (copies["trained"], copies["held_out"]) == (6 / 40, 0.0)


def test_to_know_all_answers_is_skill_and_no_leak() -> None:
    shares = Shares(people(40, 0), people(80, 1))
    answers = [one.response for one in (*shares.trained, *shares.held_out)]
    table = disclosure({0: shares}, {0: answers}, [], embed, np.random.default_rng(0))
    assert (table["p_adjusted"] == 1.0).all()
    assert table["effect"].abs().max() < 1e-6


def test_held_out_examples_are_of_the_same_categories_in_the_same_proportions() -> None:
    trained = [*people(3, 0, "a"), *people(1, 0, "b"), *people(9, 0, "c")]
    held_out = [*people(2, 1, "a"), *people(2, 2, "b"), *people(5, 3, "d")]
    answers = [one.response for one in held_out[:2]]  # both of a
    table = disclosure({0: Shares(trained, held_out)}, {0: answers}, [], embed, np.random.default_rng(0))
    row = table.set_index("score").loc["exact copy"]
    assert (row["num_trained"], row["num_held_out"]) == (4, 4)  # nothing of c and d
    assert row["held_out"] == 3 / 4  # a is three quarters of what was trained on
    many = Shares(people(2, 0), people(100, 1)).matched()
    first = people(2 * PER_TRAINED, 1)
    assert [one.prompt for one in many.held_out] == [one.prompt for one in first]


def test_without_anything_to_compare_with_there_are_no_rows() -> None:
    shares = Shares(people(3, 0, "a"), people(3, 1, "b"))
    table = disclosure({0: shares}, {0: ["x"]}, [], embed, np.random.default_rng(0))
    assert table.empty
    assert "p_adjusted" in table
