import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.federation.opinions import opinion_of, opinions_of, reduced

DRAWS = [("Yes.", "12", "", "b"), ("no", "-12", "", "a"), ("yes", "12", "", "c"), ("", "1.2", "", "a")]


def test_case_spaces_and_punctuation_make_no_other_opinion_and_signs_and_points_do() -> None:
    assert opinion_of("  The answer:\n YES! ") == opinion_of("the answer yes")
    assert len({*map(opinion_of, ("12", "-12", "1.2", "1/2", "1 2"))}) == 5
    assert opinion_of("?!") == "?!"  # else all that have no words would be one
    assert torch.equal(opinions_of(DRAWS), torch.tensor([[0, 1, 0, 3], [0, 1, 0, 3], [0, 0, 0, 0], [0, 1, 2, 1]]))


def test_draws_are_counted_by_hand() -> None:
    answers, counts = reduced(DRAWS, "counted")
    assert answers == [("Yes.", "12", "", "b"), ("no", "-12", "", "a"), ("", "1.2", "", "c")]
    assert counts == [(2, 2, 0, 1), (1, 1, 0, 2), (0, 1, 0, 1)]


def test_a_choice_is_the_most_common_answer_and_of_several_the_one_drawn_first() -> None:
    assert reduced(DRAWS, "choice") == ([("Yes.", "12", "", "a")], [(2, 2, 0, 2)])
    assert reduced([("x",), ("y",)], "choice") == ([("x",)], [(1,)])


@given(st.lists(st.tuples(*[st.sampled_from(["", "a", "A", "b", "c d"])] * 3), min_size=1, max_size=9))
def test_no_draw_is_lost(draws: list[tuple[str, ...]]) -> None:
    answers, counts = reduced(draws, "counted")
    for prompt, drawn in enumerate(zip(*draws, strict=True)):
        said = [opinion_of(text) for text in drawn if text]
        told = {opinion_of(ballot[prompt]): n[prompt] for ballot, n in zip(answers, counts, strict=True) if n[prompt]}
        assert told == {opinion: said.count(opinion) for opinion in said}
        assert answers[0][prompt] == next(filter(None, drawn), "")  # a random draw, as if all were sent
    assert reduced(draws[:1], "choice")[0] == [draws[0]]


def test_one_ballot_a_prompt_is_enough_where_all_draws_say_the_same() -> None:
    with pytest.raises(ValueError, match="zip"):
        reduced([("a",), ("a", "b")], "counted")
    assert reduced([("a", ""), ("A", "")], "counted") == ([("a", "")], [(2, 0)])
