import torch
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.federation.opinions import choices, opinion_of, opinions_of

DRAWS = [("Yes.", "12", "", "b"), ("no", "-12", "", "a"), ("yes", "12", "", "c"), ("", "1.2", "", "a")]


def test_case_spaces_and_punctuation_make_no_other_opinion_and_signs_and_points_do() -> None:
    assert opinion_of("  The answer:\n YES! ") == opinion_of("the answer yes")
    assert len({*map(opinion_of, ("12", "-12", "1.2", "1/2", "1 2"))}) == 5
    assert opinion_of("?!") == "?!"  # else all that have no words would be one
    assert torch.equal(opinions_of(DRAWS), torch.tensor([[0, 1, 0, 3], [0, 1, 0, 3], [0, 0, 0, 0], [0, 1, 2, 1]]))


def test_a_choice_is_the_most_common_answer_and_of_several_the_one_drawn_first() -> None:
    assert choices(DRAWS) == (["Yes.", "12", "", "a"], [2, 2, 0, 2])
    assert choices([("x",), ("y",)]) == (["x"], [1])
    assert choices([("",), ("y",), ("x",)]) == (["y"], [1])


@given(st.lists(st.tuples(*[st.sampled_from(["", "a", "A", "b", "c d"])] * 3), min_size=1, max_size=9))
def test_no_answer_was_drawn_more_often_than_the_choice(draws: list[tuple[str, ...]]) -> None:
    for drawn, answer, count in zip(zip(*draws, strict=True), *choices(draws), strict=True):
        said = [opinion_of(text) for text in drawn if text]
        assert count == max(map(said.count, said), default=0)
        assert said.count(opinion_of(answer)) == count
        assert answer in drawn
