"""Partitions of the private data: which client holds which examples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from semcons_ray.data.examples import Example
from semcons_ray.errors import ConfigError, DataError
from semcons_ray.parts import build

Indices = NDArray[np.int64]

OF_EQUAL_SUM = frozenset({"iid", "dirichlet", "category", "quantity"})
"""Partitions that give clients `data.examples_per_client` on average, so that it is known before how many they take."""


class Partition(Protocol):
    """How private data is divided: a function, or a class whose objects can be called as one.

    Parameters of the class, or of the function besides these, are its options.
    """

    def __call__(
        self, examples: Sequence[Example], num_clients: int, examples_per_client: int, random: np.random.SeedSequence
    ) -> Sequence[Sequence[int] | Indices]:
        """Places in `examples` of each client's, C sequences; no place may be there twice, and no client have none.

        Args:
            examples: All that may be given out, shuffled. What no client gets is left for public prompts.
            num_clients: Number of clients C.
            examples_per_client: As it is set; a partition may take it for a mean or for the most.
            random: Seed of all draws.
        """
        ...


def private_shares(
    examples: Sequence[Example],
    *,
    num_clients: int,
    examples_per_client: int,
    partition: str,
    options: Mapping[str, Any],
    random: np.random.SeedSequence,
) -> list[Indices]:
    """Places in `examples` of each client's, C arrays; no two of them overlap. See `Partition` for arguments.

    Args:
        partition: Its name.
        options: Its options.

    Raises:
        ConfigError: It refuses its options, or what it returned is no partition.
        DataError: There are too few examples, categories or owners.
    """
    divide: Partition = build("partition", partition, options, setting="data.partition_options")
    found = divide(examples, num_clients, examples_per_client, random)
    try:
        shares = [np.asarray(share, dtype=np.int64).reshape(-1) for share in found]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.partition {partition} gave no lists of places in the examples: {error}") from error
    taken = np.concatenate([np.empty(0, np.int64), *shares])
    if len(shares) != num_clients or not all(map(len, shares)):
        sizes = ", ".join(str(len(share)) for share in shares)
        raise ConfigError(f"data.partition {partition} gave ({sizes}) examples, not some to each of {num_clients}")
    if len(np.unique(taken)) < len(taken) or taken.min() < 0 or taken.max() >= len(examples):
        raise ConfigError(
            f"data.partition {partition} gave an example twice, or one that is none of 0 to {len(examples) - 1}"
        )
    return shares


def iid(
    examples: Sequence[Example], num_clients: int, examples_per_client: int, random: np.random.SeedSequence
) -> list[Indices]:
    """Each client gets the next `examples_per_client`."""
    return np.split(np.arange(num_clients * examples_per_client), num_clients)


def quantity(
    examples: Sequence[Example],
    num_clients: int,
    examples_per_client: int,
    random: np.random.SeedSequence,
    *,
    alpha: float = 0.5,
) -> list[Indices]:
    """As `iid`, but clients' numbers of examples are in proportion to a draw from Dir(alpha, ..., alpha).

    Each client has at least one example, and the mean is `examples_per_client`.
    """
    total = num_clients * examples_per_client
    parts = np.random.default_rng(random).dirichlet(np.full(num_clients, alpha))
    sizes = 1 + _largest_remainder(parts * (total - num_clients))
    return np.split(np.arange(total), np.cumsum(sizes)[:-1])


def natural(
    examples: Sequence[Example], num_clients: int, examples_per_client: int, random: np.random.SeedSequence
) -> list[Indices]:
    """Each client gets the next `examples_per_client` of one owner, or as many as that has.

    Where there are more owners than clients, they are drawn, and more clients add to those that are drawn. Clients are
    numbered in the order of their owners' names.
    """
    held = np.array([example.owner for example in examples], dtype=object)
    owners = _drawn_owners(held, num_clients, random)
    return [np.flatnonzero(held == owner)[:examples_per_client] for owner in owners]


def dirichlet(
    examples: Sequence[Example],
    num_clients: int,
    examples_per_client: int,
    random: np.random.SeedSequence,
    *,
    alpha: float = 0.5,
) -> list[Indices]:
    """Each client draws a category mix q ~ Dir(alpha K p) for K categories with shares p, then `examples_per_client`
    categories from q, and gets that category's next example for each.

    A category that has run out is dropped and q renormalised; when all categories of q have run out, the client draws
    from what is left. This is Hsu et al. (arXiv:1909.06335), whose concentration is alpha K here: for equally frequent
    categories it is the usual Dir(alpha, ..., alpha). The smaller alpha, the more clients differ.
    """
    keys, _ = _categories(examples, "dirichlet")
    return _dealt(keys, _dirichlet_counts(np.bincount(keys), num_clients, examples_per_client, alpha, random))


def by_category(
    examples: Sequence[Example], num_clients: int, examples_per_client: int, random: np.random.SeedSequence
) -> list[Indices]:
    """Each client gets categories of its own, and equally many examples of each while they last.

    Categories are dealt out in turn, the largest first. If there are more clients than categories, clients share
    categories, but no examples.
    """
    keys, names = _categories(examples, "category")
    return _dealt(keys, _category_counts(np.bincount(keys), num_clients, examples_per_client, names))


def _categories(examples: Sequence[Example], partition: str) -> tuple[Indices, list[str]]:
    """The category of each example, as a place in the sorted names of all there are."""
    names = sorted({example.category for example in examples})
    if len(names) < 2:
        raise DataError(
            f"data.partition {partition} needs two or more categories, and data.source has {len(names)}: "
            "give it a category column, or set data.partition to iid or quantity"
        )
    code = {name: place for place, name in enumerate(names)}
    return np.array([code[example.category] for example in examples]), names


def _dealt(keys: Indices, counts: Indices) -> list[Indices]:
    """The places of each client's examples in their order, where `counts`, (C, K), says how many of each category."""
    pools = np.split(np.argsort(keys, kind="stable"), np.cumsum(np.bincount(keys))[:-1])
    starts = np.cumsum(counts, axis=0) - counts
    return [
        np.sort(np.concatenate([pool[s : s + c] for pool, s, c in zip(pools, start, count, strict=True)]))
        for start, count in zip(starts, counts, strict=True)
    ]


def _drawn_owners(held: NDArray[np.object_], num_clients: int, random: np.random.SeedSequence) -> list[str]:
    names = sorted({*held} - {""}, key=_in_order)
    if not names:
        raise DataError(
            "data.partition natural needs to know whose each example is: give data.source a client_id column, name it "
            "in data.columns as {client_id: author}, or name a file for each client, as clients/*.jsonl"
        )
    if len(names) < num_clients:
        raise DataError(
            f"clients.num_clients is {num_clients}, and the examples of data.source that are not in the test set are "
            f"of {len(names)} clients; data.partition natural gives each client the data of one"
        )
    drawn = np.random.default_rng(random).permutation(len(names))[:num_clients]
    return [names[place] for place in sorted(drawn)]


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by size: client 2 before client 10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _dirichlet_counts(
    left: Indices, num_clients: int, size: int, alpha: float, random: np.random.SeedSequence
) -> Indices:
    """Examples of each category that each client gets, shape (C, K)."""
    concentration = alpha * len(left) * left / left.sum()
    rows: list[Indices] = []
    for seeds in random.spawn(num_clients):
        generator = np.random.default_rng(seeds)
        mix = generator.dirichlet(concentration)
        counts = np.zeros_like(left)
        while (missing := size - counts.sum()) > 0:
            # Draws beyond a category's end are drawn again from the others, which is the same as dropping it in time.
            weights = np.where(counts < left, mix, 0.0)
            if not weights.sum() > 0:
                weights = (left - counts).astype(np.float64)
            counts = np.minimum(counts + generator.multinomial(missing, weights / weights.sum()), left)
        rows.append(counts)
        left = left - counts
    return np.stack(rows)


def _category_counts(left: Indices, num_clients: int, size: int, names: Sequence[str]) -> Indices:
    """Examples of each category that each client gets, shape (C, K)."""
    by_size = np.argsort(-left, kind="stable")
    rows: list[Indices] = []
    for client in range(num_clients):
        own = by_size[client % len(left) :: num_clients]
        available = np.zeros_like(left)
        available[own] = left[own]
        if available.sum() < size:
            listed = ", ".join(repr(names[key]) for key in own[:3]) + (", ..." if len(own) > 3 else "")
            raise DataError(
                f"data.partition category has {available.sum()} examples for client {client} (of {listed}), fewer than "
                f"data.examples_per_client {size}"
            )
        level = max(each for each in range(size + 1) if np.minimum(available, each).sum() <= size)
        counts = np.minimum(available, level)
        counts[np.flatnonzero(available > level)[: size - counts.sum()]] += 1
        rows.append(counts)
        left = left - counts
    return np.stack(rows)


def _largest_remainder(exact: NDArray[np.float64]) -> Indices:
    """`exact`, whose sum is a whole number, rounded to integers with the same sum."""
    floor = np.floor(exact).astype(np.int64)
    missing = round(exact.sum()) - floor.sum()
    floor[np.argsort(floor - exact, kind="stable")[:missing]] += 1
    return floor
