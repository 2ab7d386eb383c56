"""Divides examples into a test set, clients' private shares and public prompts, which do not overlap.

All are taken from one shuffle, in this order, so that settings can be varied one at a time (but the test set and the
public prompts may come from sources of their own, each shuffled by itself):

- The test set has the data's own category mix. It depends on the data, `num_test` and the seed only.
- Private shares are taken from the front of what is left. They do not depend on the public prompts. With partitions
  `iid` and `dirichlet`, a client's share stays the same when clients are added.
- A client that has a test set of its own (`client_test_fraction`) holds out the end of its share.
- Public prompts are taken from the back of what is then left, ordered by the selection. The prompts of a budget are
  the first of any larger budget's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from semcons_ray.config import DataConfig, PromptsConfig
from semcons_ray.data.examples import DataSet, Example
from semcons_ray.data.partition import OF_EQUAL_SUM, private_shares
from semcons_ray.data.selection import order_prompts, proportional
from semcons_ray.data.shares import COLUMNS, Shares, to_columns, to_examples
from semcons_ray.errors import DataError, RunFolderError, first_line, writing
from semcons_ray.messages import text_of

_SHUFFLE, _PARTITION, _TEST, _PUBLIC = range(4)  # spawn keys: a stream of random numbers for each stage

_SCHEMA = pa.schema([pa.field("role", pa.string()), pa.field("client_id", pa.int64()), *COLUMNS])


@dataclass(frozen=True, slots=True)
class DataSplit:
    """Who holds what.

    Attributes:
        private: Examples of each client, by client id; `Shares` once it was written.
        public: Public prompts, by prompt id. No client sees their responses, but for the control rule `reference`.
        test: The held-out test set, the same for all clients.
        client_test: Examples of each client's own test set, by client id; none is trained on. A client may have none,
            and the tuple is empty if all have none.
    """

    private: Sequence[tuple[Example, ...]]
    public: tuple[Example, ...]
    test: tuple[Example, ...]
    client_test: Sequence[tuple[Example, ...]] = ()

    @property
    def num_private(self) -> Sequence[int]:
        """Number of private examples of each client, (C,)."""
        private = self.private
        return private.sizes.tolist() if isinstance(private, Shares) else [len(share) for share in private]

    def examples(self, clients: Iterable[int] | None = None) -> list[Example]:
        """All examples, whatever they are for; of private ones and clients' own test sets those of some clients, or of
        all."""
        chosen = range(len(self.private)) if clients is None else [*clients]
        tests = [self.client_test[client] for client in chosen] if self.client_test else []
        shares = (*(self.private[client] for client in chosen), self.public, self.test, *tests)
        return [example for share in shares for example in share]


def divide(
    source: DataSet,
    data: DataConfig,
    prompts: PromptsConfig,
    *,
    num_clients: int,
    seed: int,
    embed: Callable[[Sequence[str]], Tensor],
    test: DataSet | None = None,
    public: DataSet | None = None,
) -> DataSplit:
    """Divide a data set; the same arguments always give the same split.

    Args:
        source: What `load_examples` returned.
        data: Sizes of the test set and of private shares, and the partition; see `partition.private_shares`.
        prompts: The number of public prompts and their selection; see `selection.order_prompts`.
        num_clients: Number of clients C.
        seed: Seed of every draw.
        embed: Gives embeddings (N, D) of N texts; called by selections that go by them.
        test: What the test set is taken from; None: `source`.
        public: What public prompts are taken from; None: `source`.

    Raises:
        DataError: There are too few examples, or too few categories or owners for the partition.
        ConfigError: The partition or the selection refuses its options, or returns what is none.
    """
    budget = {f"prompts.budget {prompts.budget}": prompts.budget}
    tests = {f"data.num_test {data.num_test}": data.num_test}
    size = data.examples_per_client
    shares = {f"{num_clients} clients x data.examples_per_client {size}": num_clients * size}
    if data.partition not in OF_EQUAL_SUM:
        shares = {}
    _check_enough(source, ({} if public else budget) | ({} if test else tests) | shares)
    if test:
        _check_enough(test, tests)
    if public:
        _check_enough(public, budget)
    examples = _Coded.of(source.examples)
    order = _shuffled(examples, seed, _SHUFFLE)
    if test is None:
        first = proportional(order, examples.category)[: data.num_test]
        order, tested = _without(order, first), examples.chosen(first)
    else:
        others = _Coded.of(test.examples)
        offered = _shuffled(others, seed, _TEST)
        tested = others.chosen(proportional(offered, others.category)[: data.num_test])
    places = private_shares(
        examples.chosen(order),
        num_clients=num_clients,
        examples_per_client=data.examples_per_client,
        partition=data.partition,
        options=data.options_of_partition,
        random=np.random.SeedSequence(seed, spawn_key=(_PARTITION,)),
    )
    private = [order[share] for share in places]
    candidates, asked = _without(order, np.concatenate(private))[::-1], examples
    if public is not None:
        asked = _Coded.of(public.examples)
        candidates = _shuffled(asked, seed, _PUBLIC)
    if len(candidates) < prompts.budget:
        raise DataError(
            f"prompts.budget is {prompts.budget}, and data.partition {data.partition} leaves {len(candidates)} of "
            f"{len(source.examples)} examples; lower data.examples_per_client, or set prompts.source"
        )
    offered_prompts = asked.chosen(candidates)
    chosen = order_prompts(
        offered_prompts,
        budget=prompts.budget,
        selection=prompts.selection,
        options=prompts.selection_options,
        embed=embed,
    )
    sizes = [_num_held_out(len(share), data.client_test_fraction) for share in private]
    trained = [examples.chosen(share[: len(share) - size]) for share, size in zip(private, sizes, strict=True)]
    held_out = [examples.chosen(share[len(share) - size :]) for share, size in zip(private, sizes, strict=True)]
    if test is not None and data.partition == "natural" and not data.client_test_fraction:
        found = others.chosen(offered)
        held_out = [_of_owner(found, share[0].owner)[: data.num_test] for share in trained]
    return DataSplit(
        private=tuple(trained),
        public=tuple(offered_prompts[place] for place in chosen),
        test=tested,
        client_test=tuple(held_out) if any(held_out) else (),
    )


def _of_owner(examples: Sequence[Example], owner: str) -> tuple[Example, ...]:
    return tuple(example for example in examples if example.owner == owner)


def _num_held_out(size: int, fraction: float) -> int:
    """How many examples of a share are held out: at least one, where there is one left to train on."""
    return min(max(int(fraction * size + 0.5), 1), size - 1) if fraction else 0


def _check_enough(source: DataSet, wanted: Mapping[str, int]) -> None:
    """Check that a source has as many examples as are wanted of it, in sum.

    Args:
        source: The source.
        wanted: Numbers of examples by what they are for, in words.
    """
    needed, there = sum(wanted.values()), len(source.examples)
    if needed > there:
        raise DataError(f"{' + '.join(wanted)} needs {needed} examples, and there are {there}; {source.tally}")


@dataclass(frozen=True)
class _Coded:
    """Examples with their categories as numbers, in the order of their names."""

    examples: Sequence[Example]
    category: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> _Coded:
        code = {name: index for index, name in enumerate(sorted({example.category for example in examples}))}
        return cls(examples, np.array([code[example.category] for example in examples]))

    def chosen(self, indices: NDArray[np.int64]) -> tuple[Example, ...]:
        return tuple(self.examples[index] for index in indices)


def _shuffled(coded: _Coded, seed: int, stage: int) -> NDArray[np.int64]:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stage,))).permutation(len(coded.examples))


def pooled(split: DataSplit) -> DataSplit:
    """All private examples at client 0 and none at the others, in an order that does not depend on who held them."""
    held = (example for share in split.private for example in share)
    everything = tuple(sorted(held, key=lambda one: (text_of(one.prompt), one.response, one.category, one.owner)))
    return replace(split, private=(everything, *((),) * (len(split.private) - 1)))


def write_split(split: DataSplit, path: Path) -> None:
    """Write data.parquet: columns role (private, public, test or client_test), client_id (-1 for public and test), and
    those of `Example`; the prompt is there as one text, and, if it is a conversation, as its turns.

    It is written under another name and renamed, so the file is either whole or not there.

    Raises:
        RunFolderError: It cannot be written.
    """
    rows = [("private", client, example) for client, share in enumerate(split.private) for example in share]
    rows += [("public", -1, example) for example in split.public]
    rows += [("test", -1, example) for example in split.test]
    rows += [("client_test", client, example) for client, share in enumerate(split.client_test) for example in share]
    columns: dict[str, list[Any]] = {"role": [row[0] for row in rows], "client_id": [row[1] for row in rows]}
    columns |= to_columns([example for _, _, example in rows])
    table = pa.table(columns, schema=_SCHEMA)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path.parent):
            pq.write_table(table, beside)
            beside.replace(path)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def read_split(path: Path) -> DataSplit:
    """Read what `write_split` wrote.

    Raises:
        RunFolderError: The file is missing, cannot be read, or is not a complete split.
    """
    try:
        table = pq.read_table(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RunFolderError(f"cannot read {path}: {reason}; start the run again in a new folder") from error
    if not table.schema.equals(_SCHEMA) or any(column.null_count for column in table.columns):
        raise _broken(path)
    parts = {role: table.filter(pc.field("role") == role) for role in ("private", "public", "test", "client_test")}
    ids = [np.unique(parts[role].column("client_id").to_numpy()) for role in ("private", "client_test")]
    num_clients = len(ids[0])
    whole = sum(map(len, parts.values())) == len(table) and all(map(len, [*parts.values()][:3]))
    if not whole or not np.array_equal(ids[0], np.arange(num_clients)) or not np.isin(ids[1], ids[0]).all():
        raise _broken(path)
    return DataSplit(
        private=_shares(parts["private"], num_clients),
        public=to_examples(parts["public"]),
        test=to_examples(parts["test"]),
        client_test=_shares(parts["client_test"], num_clients) if len(parts["client_test"]) else (),
    )


def _shares(table: pa.Table, num_clients: int) -> Shares:
    clients = table.column("client_id").to_numpy()
    order = np.argsort(clients, kind="stable")
    ends = np.searchsorted(clients[order], np.arange(num_clients), side="right")
    columns = table.select([field.name for field in COLUMNS])
    return Shares((columns if np.all(np.diff(order) == 1) else columns.take(order)).combine_chunks(), ends)


def _broken(path: Path) -> RunFolderError:
    return RunFolderError(f"{path} is not a whole split; start the run again in a new folder")


def _without(order: NDArray[np.int64], taken: NDArray[np.int64]) -> NDArray[np.int64]:
    """`order` without the indices in `taken`."""
    return order[~np.isin(order, taken)]
