"""Examples in columns are those that were put in."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from semcons_ray.data.examples import Example
from semcons_ray.data.shares import COLUMNS, Shares, to_columns, to_examples
from semcons_ray.messages import Turn

CONVERSATION = (Turn("system", "be brief"), Turn("user", "what is 1 + 1?"))
EXAMPLES = (
    Example("q", "ü\n"),
    Example(CONVERSATION, "2", "sums"),
    Example("which?", "a", "choice", ("a", "b"), "ann"),
)


def shares(*sizes: int) -> Shares:
    """The examples in turn, so many for each client."""
    held = [EXAMPLES[place % 3] for place in range(sum(sizes))]
    return Shares(pa.table(to_columns(held), schema=pa.schema(COLUMNS)), np.cumsum(sizes))


def test_examples_come_back_as_they_were() -> None:
    assert to_examples(shares(3).table) == EXAMPLES


def test_a_client_has_its_own_and_one_may_have_none() -> None:
    held = shares(2, 0, 2)
    first, second, third = EXAMPLES
    assert [*held] == [(first, second), (), (third, first)]
    assert (held[-1], held[1:]) == ((third, first), ((), (third, first)))
    assert (len(held), held.sizes.tolist()) == (3, [2, 0, 2])
    for client in (3, -4):
        with pytest.raises(IndexError, match="there are 3 clients"):
            held[client]


def test_shares_are_equal_to_any_sequence_of_the_same_examples() -> None:
    held = shares(2, 1)
    assert held == (EXAMPLES[:2], EXAMPLES[2:])
    assert held == shares(2, 1)
    assert held not in [shares(1, 2), (EXAMPLES[:2],), 3]


def test_what_is_sent_to_another_process_holds_each_text_once_and_beside_the_pickle() -> None:
    held = shares(*[3] * 1000)
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(held, protocol=5, buffer_callback=buffers.append)
    assert len(pickled) < 4096  # whatever the number of clients
    assert pickle.loads(pickled, buffers=buffers) == held
