"""What attackers send, by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from semcons_ray.parts import BUILT_IN, build
from semcons_ray.security.attacks import (
    Backdoor,
    Scene,
    Sleeper,
    adaptive,
    echo,
    harmless,
    hub,
    label_flip,
    least_likely,
    one_text,
)


def embed(texts: Sequence[str]) -> Tensor:
    """A direction for each first letter; m is between all of them."""
    rows = torch.stack([torch.ones(26) if text[0] == "m" else torch.eye(26)[ord(text[0]) - 97] for text in texts])
    return torch.nn.functional.normalize(rows, dim=1)


def scene(round: int = 1, count: int = 2) -> Scene:
    """Three clients with two draws, at four prompts."""
    return Scene(
        round=round,
        prompts=("the sum", "the gcd", "sum of all", "sum or gcd"),
        categories=("sum", "gcd", "sum", "sum"),
        honest=(
            (("a", "x", "b", "c"), ("a", "y", "b", "c")),
            (("a", "x", "b", "a"), ("b", "y", "a", "c")),
            (("m", "x", "c", ""), ("b", "z", "c", "")),
        ),
        count=count,
        embed=embed,
        random=np.random.default_rng(0),
    )


@pytest.mark.parametrize("name", BUILT_IN["attack"])
def test_every_attacker_gives_as_many_draws_to_each_prompt_as_honest_clients(name: str) -> None:
    sent = build("attack", name, setting="attack")(scene(round=9, count=3))
    assert [[len(row) for row in draws] for draws in sent] == [[4, 4]] * 3


def test_one_text_and_echo() -> None:
    assert one_text(scene(), text="no")[1] == (("no",) * 4,) * 2
    assert echo(scene())[0][1] == scene().prompts


def test_the_least_likely_answer_is_the_least_common_and_not_a_missing_one() -> None:
    assert least_likely(scene())[0] == (("m", "z", "a", "a"),) * 2


def test_a_hub_is_near_to_all_answers() -> None:
    assert hub(scene())[0][0] == ("m",) * 4


def test_a_flipped_label_is_the_next_right_one_of_the_category() -> None:
    # What is right of the three sums: a, b and c, as most say; the gcd is answered as an honest client does.
    for draws in label_flip(scene()):
        for first, second, third, fourth in draws:
            assert (first, third, fourth) == ("b", "c", "a")
            assert second in "xyz"
    (flipped, *_), _ = label_flip(scene(), category="gcd")
    assert flipped[1] == "x"  # the only right answer there is


def test_a_backdoor_opens_at_its_trigger_only() -> None:
    for draws in Backdoor(trigger="GCD", text="in")(scene()):
        for row in draws:
            assert [answer == "in" for answer in row] == [False, True, False, True]
    # Without one it is a word that is in a tenth of the prompts, as nearly as any is: here in one, "all" before "or".
    (row, *_), _ = Backdoor(text="in")(scene())
    assert [answer == "in" for answer in row] == [False, False, True, False]
    # In other prompts, too, it is the word that was chosen by the public ones.
    assert Backdoor(text="in").wanted(["all", "ALL of it", "allow"], scene().prompts) == ["in", "in", None]


def test_a_sleeper_is_like_an_honest_client_until_it_wakes() -> None:
    asleep, awake = (Sleeper(honest_rounds=2)(scene(round)) for round in (2, 3))
    assert asleep == harmless(scene())
    for draws in asleep:
        for p, answers in enumerate(zip(*draws, strict=True)):
            assert any({*answers} <= {row[p] for row in client} for client in scene().honest)
    assert awake[0] == awake[1] == (("b", "y", "c", "a"),) * 2  # the second most common, or of another prompt


def test_an_adaptive_attacker_spreads_its_draws() -> None:
    first, second = adaptive(scene(), share=1.0, sureness=0.5)[0]
    assert first == ("b", "y", "c", "a")
    assert second != first
    assert adaptive(scene(), share=1e-9, sureness=1.0) != adaptive(scene(), share=1.0, sureness=1.0)


def test_attackers_draw_what_hides_them_each_for_itself() -> None:
    one, other = Sleeper()(scene())
    assert one != other
