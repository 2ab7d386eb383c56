"""Canaries: made-up examples that are put among private ones by coin flip, to see afterwards what tells of the coin."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semcons_ray.data.examples import Example
from semcons_ray.data.split import DataSplit
from semcons_ray.errors import DataError, RunFolderError, first_line, writing
from semcons_ray.messages import text_of

Kind = Literal["in distribution", "out of distribution"]

NUM_WORDS = 5
"""Words of a canary's response: enough that nobody guesses it, and few enough for a short answer."""

_LETTERS = np.array([*"abcdefghijklmnopqrstuvwxyz"])
_CANARIES = 4  # spawn key, beside those of split.py


@dataclass(frozen=True)
class Canary:
    """A made-up example, and whether it is among a client's private ones.

    Attributes:
        client_id: The client.
        kind: See `with_canaries`.
        prompt: The question.
        response: The answer, which is secret.
        category: The category of the question; "" where it was made up.
        inserted: The coin.
    """

    client_id: int
    kind: Kind
    prompt: str
    response: str
    category: str
    inserted: bool

    @property
    def example(self) -> Example:
        """What the client trains on."""
        return Example(self.prompt, self.response, self.category)


def with_canaries(
    split: DataSplit, source: Sequence[Example], count: int, seed: int
) -> tuple[DataSplit, tuple[Canary, ...]]:
    """Put canaries among the private examples, each with probability 1/2.

    The response of every canary is `NUM_WORDS` random words, so no skill leads to it. Kinds:

    - in distribution: a question of the data that is used nowhere else, of a category drawn as the client's are, with a
      response of words of the data's responses. Meeus et al. (arXiv:2502.14921) found that a usual beginning with an
      unlikely end leaves the most traces in text that is generated.
    - out of distribution: question and response are of random letters, as canaries for models have been.

    That a question is the beginning and its response the end, and the numbers of words, are our choice.

    Args:
        split: Who holds what.
        source: All examples of the data, whose prompts are all different.
        count: Canaries of each kind that are offered to each client.
        seed: Seed of the experiment.

    Returns:
        The split with the canaries that were inserted, at the end of shares, and all canaries with their coins.

    Raises:
        DataError: Too few questions are used nowhere.
    """
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_CANARIES,)))
    used = {text_of(example.prompt) for example in split.examples()}
    spare: dict[str, list[Example]] = defaultdict(list)
    for place in random.permutation(len(source)):
        if text_of(source[place].prompt) not in used:
            spare[source[place].category].append(source[place])
    vocabulary = np.array(sorted({word for example in source for word in example.response.split()}))
    made: list[Canary] = []
    for client, share in enumerate(split.private):
        for number in range(count):
            has = [example.category for example in share if spare[example.category]]
            if not has:
                raise DataError(
                    f"data.canaries is {count}, and for client {client} {number} questions are left that are used "
                    "nowhere; lower it, data.examples_per_client or prompts.budget"
                )
            asked = spare[has[random.integers(len(has))]].pop()
            secret = " ".join(random.choice(vocabulary, NUM_WORDS))
            made.append(_drawn("in distribution", client, text_of(asked.prompt), secret, asked.category, random))
            question, secret = (_gibberish(random) for _ in range(2))
            made.append(_drawn("out of distribution", client, question, secret, "", random))
    private = tuple(
        (*share, *(canary.example for canary in made if canary.inserted and canary.client_id == client))
        for client, share in enumerate(split.private)
    )
    return replace(split, private=private), tuple(made)


def _drawn(
    kind: Kind, client: int, prompt: str, response: str, category: str, random: np.random.Generator
) -> Canary:
    return Canary(client, kind, prompt, response, category, bool(random.integers(2)))


def _gibberish(random: np.random.Generator) -> str:
    return " ".join("".join(random.choice(_LETTERS, 5)) for _ in range(NUM_WORDS))


def without_canaries(split: DataSplit, canaries: Iterable[Canary]) -> DataSplit:
    """The private examples as they were before `with_canaries`."""
    made_up = {canary.prompt for canary in canaries}
    kept = (tuple(one for one in share if text_of(one.prompt) not in made_up) for share in split.private)
    return replace(split, private=tuple(kept))


def write_canaries(canaries: Sequence[Canary], path: Path) -> None:
    """Write canaries with their coins, under another name and then renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path.parent):
        pq.write_table(pa.Table.from_pylist([asdict(canary) for canary in canaries]), beside)
        beside.replace(path)


def read_canaries(path: Path) -> tuple[Canary, ...]:
    """What `write_canaries` wrote; none if there is no such file.

    Raises:
        RunFolderError: It is damaged.
    """
    if not path.is_file():
        return ()
    try:
        return tuple(Canary(**row) for row in pq.read_table(path).to_pylist())
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise RunFolderError(f"cannot read {path}: {first_line(error)}; start the run again in a new folder") from error
