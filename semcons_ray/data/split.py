"""Divides examples into a test set, clients' private shares and public prompts, which do not overlap.

All are taken from one shuffle, in this order, so that settings can be varied one at a time:

- The test set has the data's own category mix. It depends on the data, `num_test` and the seed only.
- Private shares are taken from the front of what is left. They do not depend on the public prompts. With partitions
  `iid` and `dirichlet`, a client's share stays the same when clients are added.
- Public prompts are taken from the back of what is then left, ordered by the selection. The prompts of a budget are
  the first of any larger budget's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from semcons_ray.config import DataConfig, PromptsConfig
from semcons_ray.data.examples import DataSet, Example
from semcons_ray.data.partition import private_shares
from semcons_ray.data.selection import order_prompts, proportional
from semcons_ray.errors import DataError, RunFolderError, first_line, writing

_SHUFFLE, _PARTITION = 0, 1  # spawn keys: a stream of random numbers for each stage

_SCHEMA = pa.schema(
    [
        pa.field("role", pa.string()),
        pa.field("client_id", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("response", pa.string()),
        pa.field("category", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class DataSplit:
    """Who holds what.

    Attributes:
        private: Examples of each client, by client id.
        public: Public prompts, by prompt id. No client sees their responses, but for the control rule `reference`.
        test: The held-out test set, the same for all clients.
    """

    private: tuple[tuple[Example, ...], ...]
    public: tuple[Example, ...]
    test: tuple[Example, ...]

    def examples(self) -> list[Example]:
        """All examples: private, public and test."""
        return [*(example for share in self.private for example in share), *self.public, *self.test]


def divide(
    source: DataSet,
    data: DataConfig,
    prompts: PromptsConfig,
    *,
    num_clients: int,
    seed: int,
    embed: Callable[[Sequence[str]], Tensor],
) -> DataSplit:
    """Divide a data set; the same arguments always give the same split.

    Args:
        source: What `load_examples` returned.
        data: Sizes of the test set and of private shares, and the partition; see `partition.private_shares`.
        prompts: The number of public prompts and their selection; see `selection.order_prompts`.
        num_clients: Number of clients C.
        seed: Seed of every draw.
        embed: Gives embeddings (N, D) of N texts; called for selection `k_center` only.

    Raises:
        DataError: There are too few examples, or too few categories for the partition.
    """
    examples = source.examples
    needed = prompts.budget + data.num_test + num_clients * data.examples_per_client
    if needed > len(examples):
        raise DataError(
            f"prompts.budget {prompts.budget} + data.num_test {data.num_test} + {num_clients} clients x "
            f"data.examples_per_client {data.examples_per_client} needs {needed} examples, and there are "
            f"{len(examples)}; {source.tally}"
        )
    names = sorted({example.category for example in examples})
    code = {name: index for index, name in enumerate(names)}
    category = np.array([code[example.category] for example in examples])

    shuffled = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_SHUFFLE,))).permutation(len(examples))
    test = proportional(shuffled, category)[: data.num_test]
    rest = _without(shuffled, test)
    private = private_shares(
        rest,
        category,
        names,
        num_clients=num_clients,
        examples_per_client=data.examples_per_client,
        partition=data.partition,
        dirichlet_alpha=data.dirichlet_alpha,
        random=np.random.SeedSequence(seed, spawn_key=(_PARTITION,)),
    )
    candidates = _without(rest, np.concatenate(private))[::-1]
    public = order_prompts(
        candidates,
        category,
        budget=prompts.budget,
        selection=prompts.selection,
        embed=lambda indices: embed([examples[index].prompt for index in indices]),
    )

    def chosen(indices: NDArray[np.int64]) -> tuple[Example, ...]:
        return tuple(examples[index] for index in indices)

    return DataSplit(private=tuple(chosen(share) for share in private), public=chosen(public), test=chosen(test))


def pooled(split: DataSplit) -> DataSplit:
    """All private examples at client 0 and none at the others, in an order that does not depend on who held them."""
    everything = tuple(sorted((example for share in split.private for example in share), key=astuple))
    return replace(split, private=(everything, *((),) * (len(split.private) - 1)))


def write_split(split: DataSplit, path: Path) -> None:
    """Write data.parquet: columns role (private, public or test), client_id (-1 unless private), prompt, response,
    category.

    It is written under another name and renamed, so the file is either whole or not there.

    Raises:
        RunFolderError: It cannot be written.
    """
    rows = [("private", client, example) for client, share in enumerate(split.private) for example in share]
    rows += [("public", -1, example) for example in split.public]
    rows += [("test", -1, example) for example in split.test]
    table = pa.table(
        {
            "role": [role for role, _, _ in rows],
            "client_id": [client for _, client, _ in rows],
            "prompt": [example.prompt for _, _, example in rows],
            "response": [example.response for _, _, example in rows],
            "category": [example.category for _, _, example in rows],
        },
        schema=_SCHEMA,
    )
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
    columns = table.to_pydict() if table.schema.equals(_SCHEMA) and not any(c.null_count for c in table.columns) else {}
    groups: dict[tuple[str, int], list[Example]] = {}
    for role, client, *texts in zip(*columns.values(), strict=True):
        groups.setdefault((role, client), []).append(Example(*texts))
    public, test = groups.pop(("public", -1), []), groups.pop(("test", -1), [])
    if not (public and test and groups) or set(groups) != {("private", client) for client in range(len(groups))}:
        raise RunFolderError(f"{path} is not a whole split; start the run again in a new folder")
    private = tuple(tuple(groups["private", client]) for client in range(len(groups)))
    return DataSplit(private=private, public=tuple(public), test=tuple(test))


def _without(order: NDArray[np.int64], taken: NDArray[np.int64]) -> NDArray[np.int64]:
    """`order` without the indices in `taken`."""
    return order[~np.isin(order, taken)]
