import struct

import numpy as np
import pytest
from numpy.typing import NDArray

from semcons_ray.errors import MessageError
from semcons_ray.federation.token_probabilities import TokenProbabilities, averaged


def held(*answers: tuple[tuple[int, ...], list[dict[int, float]]]) -> TokenProbabilities:
    """For each prompt an answer, and for each of its places what is likely there."""
    return TokenProbabilities(
        answers=tuple(answer for answer, _ in answers),
        tokens=tuple(np.array([[*place] for place in places], np.uint32) for _, places in answers),
        probabilities=tuple(np.array([[*place.values()] for place in places], np.float16) for _, places in answers),
    )


A = held(((5, 9), [{5: 0.75, 6: 0.25}, {9: 0.5, 1: 0.25}]), ((7,), [{7: 0.5, 8: 0.5}]))
B = held(((5, 1), [{5: 0.75, 6: 0.25}, {1: 0.75, 2: 0.25}]), ((8,), [{8: 1.0, 7: 0.0}]))
C = held(((6, 9, 9), [{6: 0.5, 4: 0.5}, {9: 1.0, 3: 0.0}, {9: 1.0, 3: 0.0}]), ((7,), [{7: 0.25, 6: 0.125}]))


def of(found: TokenProbabilities, prompt: int) -> list[dict[int, float]]:
    rows = zip(found.tokens[prompt].tolist(), found.probabilities[prompt].tolist(), strict=True)
    return [dict(zip(*row, strict=True)) for row in rows]


def test_means_by_hand() -> None:
    """At the first place of the first answer all count: 5 has (3/4 + 3/4 + 0) / 3, and 6 has (1/4 + 1/4 + 1/2) / 3. At
    the second only A and B, whose answers begin with 5; 1 is likelier than 9, and two of three tokens are kept."""
    found = averaged([A, B, C], top_k=2)
    assert found.answers == ((5, 1), (8,))
    first, second = of(found, 0)
    assert [*first] == [5, 6]  # the likeliest first
    assert first == pytest.approx({5: 1.5 / 2.5, 6: 1 / 2.5}, abs=1e-3)
    assert second == pytest.approx({1: (0.25 + 0.75) / 1.5, 9: 0.5 / 1.5}, abs=1e-3)
    (only,) = of(found, 1)
    # A missing token counts as 0: 8 has (1/2 + 1 + 0) / 3, 7 has (1/2 + 0 + 1/4) / 3.
    assert only == pytest.approx({8: 1.5 / 2.25, 7: 0.75 / 2.25}, abs=1e-3)


def test_who_sends_first_decides_nothing() -> None:
    random = np.random.default_rng(0)
    given = []
    for _ in range(9):
        chances = random.dirichlet(np.ones(6), size=3).astype(np.float16)
        tokens = np.array([random.permutation(12)[:6] for _ in range(3)], np.uint32)
        given.append(TokenProbabilities(((1, 2, 3),), (tokens,), (chances,)))
    packed = {averaged([given[i] for i in random.permutation(9)], 4).packed() for _ in range(20)}
    assert len(packed) == 1


def test_an_answer_goes_on_with_what_somebody_says_and_ends_where_they_end() -> None:
    long = averaged([C], top_k=2)
    assert long.answers == C.answers
    # 4 is the likeliest at the first place, but nobody's answer begins with it; of 6 and 7, which are alike, 6 comes.
    one, other = held(((7,), [{4: 0.5, 7: 0.25}])), held(((6, 2), [{4: 0.5, 6: 0.25}, {2: 1.0, 3: 0.0}]))
    found = averaged([one, other], top_k=2)
    assert found.answers == ((6, 2),)
    assert of(found, 0) == [pytest.approx({4: 0.8, 6: 0.2}, abs=1e-3), {2: 1.0, 3: 0.0}]


def test_what_is_packed_comes_back() -> None:
    found = TokenProbabilities.unpacked(C.answers, *C.packed(), 2)
    assert found.packed() == C.packed()
    assert [*map(len, found.tokens)] == [3, 1]
    assert of(found, 1) == of(C, 1)
    assert C.packed()[0][:8] == struct.pack("<II", 6, 4)
    none = TokenProbabilities.unpacked((), b"", b"", 2)
    assert (none.answers, none.tokens, none.probabilities) == ((), (), ())


DIFFERENT = struct.pack("<II", 8, 7)


def of_one(*chances: float) -> bytes:
    return np.array(chances, np.float16).tobytes()


@pytest.mark.parametrize(
    ("answers", "tokens", "chances", "says"),
    [
        (((),), b"", b"", "an answer without a token"),
        (((5,),), bytes(8), of_one(1), "not 2 tokens and probabilities for each token"),
        (((5,),), bytes(4), of_one(0.5, 0.5), "not 2 tokens and probabilities for each token"),
        (((5, 6),), bytes(8), of_one(0.5, 0.5), "not 2 tokens and probabilities for each token"),
        ((), bytes(8), of_one(0.5, 0.5), "not 2 tokens and probabilities for each token"),
        (((5,),), bytes(8), of_one(0.5, 0.5), "a token twice at one place"),
        (((5,),), DIFFERENT, of_one(0, 0), "no probabilities"),
        (((5,),), DIFFERENT, of_one(-0.1, 0.5), "no probabilities"),
        (((5,),), DIFFERENT, of_one(np.nan, 0.5), "no probabilities"),
        (((5,),), DIFFERENT, of_one(np.inf, 0.5), "no probabilities"),
        (((5,),), DIFFERENT, of_one(0.9, 0.2), "no probabilities"),
    ],
)
def test_what_are_no_probabilities_is_refused(
    answers: tuple[tuple[int, ...], ...], tokens: bytes, chances: bytes, says: str
) -> None:
    with pytest.raises(MessageError, match=says):
        TokenProbabilities.unpacked(answers, tokens, chances, 2)


def test_rounding_to_half_precision_is_no_lie() -> None:
    chances: NDArray[np.float16] = np.full((1, 999), 1 / 999, np.float16)
    TokenProbabilities.unpacked(((1,),), np.arange(999, dtype=np.uint32).tobytes(), chances.tobytes(), 999)
