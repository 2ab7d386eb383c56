import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semcons_ray.endpoints.secrets import without_key

KEY = "sk-proj-AbCdEfGh1234567890"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"Bearer {KEY}", "Bearer [key]"),
        (f"b'{KEY}'", "b'[key]'"),
        ("ends in 567890.", "ends in [key]."),
        ("begins with sk-proj-AbC", "begins with [key]"),
        ("Incorrect API key provided: sk-pr***********7890. See", "Incorrect API key provided: [key] See"),
        ("it is 7890", "it is 7890"),
        ("nothing of it", "nothing of it"),
        ("", ""),
    ],
)
def test_the_key_and_its_parts_are_hidden(text: str, shown: str) -> None:
    assert without_key(text, KEY) == shown


def test_without_a_key_only_masks_are_hidden() -> None:
    assert without_key("provided: sk-a**b, 2 * 3", "") == "provided: [key] 2 * 3"


@settings(max_examples=50)
@given(st.text(max_size=20), st.text(max_size=20), st.integers(0, len(KEY) - 6), st.integers(6, len(KEY)))
def test_no_six_characters_of_a_key_are_left_anywhere(before: str, after: str, place: int, size: int) -> None:
    shown = without_key(before + KEY[place : place + size] + after, KEY)
    assert not any(KEY[begin : begin + 6] in shown for begin in range(len(KEY) - 5))
