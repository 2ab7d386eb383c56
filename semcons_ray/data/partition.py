"""Partitions of the private data: which client holds which examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from semcons_ray.config import Partition
from semcons_ray.errors import DataError

Indices = NDArray[np.int64]


def private_shares(
    order: Indices,
    category: Indices,
    names: Sequence[str],
    *,
    owners: Sequence[str] = (),
    num_clients: int,
    examples_per_client: int,
    partition: Partition,
    dirichlet_alpha: float,
    random: np.random.SeedSequence,
) -> list[Indices]:
    """Indices of each client's examples, C arrays, each in the order of `order`; no two of them overlap.

    - `iid`: each client gets the next `examples_per_client`.
    - `dirichlet`: each client draws a category mix q ~ Dir(alpha K p) for K categories with shares p, then
      `examples_per_client` categories from q, and gets that category's next example for each. A category that has run
      out is dropped and q renormalised; when all categories of q have run out, the client draws from what is left. This
      is Hsu et al. (arXiv:1909.06335), whose concentration is alpha K here: for equally frequent categories it is the
      usual Dir(alpha, ..., alpha).
    - `category`: each client gets categories of its own, and equally many examples of each while they last. Categories
      are dealt out in turn, the largest first. If there are more clients than categories, clients share categories, but
      no examples.
    - `quantity`: as `iid`, but clients' numbers of examples are in proportion to a draw from Dir(alpha, ..., alpha).
      Each client has at least one example, and the mean is `examples_per_client`.
    - `natural`: each client gets the next `examples_per_client` of one owner, or as many as that has. Where there are
      more owners than clients, they are drawn, and more clients add to those that are drawn. Clients are numbered in
      the order of their owners' names.

    Args:
        order: Shuffled indices to take from; at least `num_clients * examples_per_client`, but for `natural`.
        category: Category of every example, as a position in `names`.
        names: Names of the categories, for messages.
        owners: Owner of every example, "" if it has none; for `natural` only.
        num_clients: Number of clients C.
        examples_per_client: Examples of each client.
        partition: One of the above.
        dirichlet_alpha: Concentration; the smaller, the more clients differ.
        random: Seed of the draws.

    Raises:
        DataError: The partition goes by category but there is only one, a client's categories hold too few examples, or
            there are fewer owners than clients.
    """
    total = num_clients * examples_per_client
    if partition == "iid":
        return np.split(order[:total], num_clients)
    if partition == "quantity":
        parts = np.random.default_rng(random).dirichlet(np.full(num_clients, dirichlet_alpha))
        sizes = 1 + _largest_remainder(parts * (total - num_clients))
        return np.split(order[:total], np.cumsum(sizes)[:-1])
    if partition == "natural":
        held = np.array([owners[index] for index in order], dtype=object)
        return [order[held == owner][:examples_per_client] for owner in _drawn_owners(held, num_clients, random)]
    if partition == "dirichlet" or partition == "category":
        keys = category[order]
        present, left = np.unique(keys, return_counts=True)
        if len(present) < 2:
            raise DataError(
                f"data.partition {partition} needs two or more categories, and data.source has {len(present)}: "
                "give it a category column, or set data.partition to iid or quantity"
            )
        pools = np.split(np.argsort(keys, kind="stable"), np.cumsum(left)[:-1])
        if partition == "dirichlet":
            counts = _dirichlet_counts(left, num_clients, examples_per_client, dirichlet_alpha, random)
        else:
            counts = _category_counts(left, num_clients, examples_per_client, [names[key] for key in present])
        starts = np.cumsum(counts, axis=0) - counts
        return [
            order[np.sort(np.concatenate([pool[s : s + c] for pool, s, c in zip(pools, start, count, strict=True)]))]
            for start, count in zip(starts, counts, strict=True)
        ]
    assert_never(partition)


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
