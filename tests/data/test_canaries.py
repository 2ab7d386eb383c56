from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from semcons_ray.data.canaries import NUM_WORDS, read_canaries, with_canaries, without_canaries, write_canaries
from semcons_ray.data.examples import Example
from semcons_ray.data.split import DataSplit
from semcons_ray.errors import DataError, RunFolderError

SOURCE = [Example(f"what is {letter} {i}", f"word{i} of {letter}", letter) for i in range(60) for letter in "ab"]
SPLIT = DataSplit(private=(tuple(SOURCE[:20]), tuple(SOURCE[20:40:2])), public=(SOURCE[40],), test=(SOURCE[42],))


def test_a_coin_decides_and_shares_stay_as_they_were() -> None:
    split, canaries = with_canaries(SPLIT, SOURCE, 8, seed=1)
    assert len(canaries) == 2 * 2 * 8
    coins = [canary.inserted for canary in canaries]
    assert 0 < sum(coins) < len(coins)
    for client, (before, after) in enumerate(zip(SPLIT.private, split.private, strict=True)):
        mine = [canary.example for canary in canaries if canary.inserted and canary.client_id == client]
        assert after == (*before, *mine)
    assert without_canaries(split, canaries) == SPLIT
    assert (split.public, split.test) == (SPLIT.public, SPLIT.test)


def test_the_coin_is_fair() -> None:
    coins = [canary.inserted for seed in range(50) for canary in with_canaries(SPLIT, SOURCE, 5, seed)[1]]
    assert np.mean(coins) == pytest.approx(0.5, abs=3 * 0.5 / np.sqrt(len(coins)))


def test_questions_in_distribution_are_used_nowhere_else_and_are_of_the_clients_categories() -> None:
    _, canaries = with_canaries(SPLIT, SOURCE, 5, seed=0)
    used = {example.prompt for example in SPLIT.examples()}
    usual = [canary for canary in canaries if canary.kind == "in distribution"]
    assert not used & {canary.prompt for canary in canaries}
    assert len({canary.prompt for canary in canaries}) == len(canaries)
    assert {canary.category for canary in usual if canary.client_id == 1} == {"a"}  # it has nothing else
    vocabulary = {word for example in SOURCE for word in example.response.split()}
    for canary in canaries:
        assert len(canary.response.split()) == NUM_WORDS
        assert (set(canary.response.split()) <= vocabulary) == (canary.kind == "in distribution")


def test_the_same_seed_gives_the_same_canaries_and_another_does_not() -> None:
    assert with_canaries(SPLIT, SOURCE, 3, 5) == with_canaries(SPLIT, SOURCE, 3, 5)
    assert with_canaries(SPLIT, SOURCE, 3, 5) != with_canaries(SPLIT, SOURCE, 3, 6)


def test_too_few_questions_are_refused() -> None:
    split = replace(SPLIT, private=(tuple(SOURCE[:100]),))
    with pytest.raises(DataError, match=r"data\.canaries is 30, and for client 0 20 questions are left"):
        with_canaries(split, SOURCE, 30, seed=0)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    _, canaries = with_canaries(SPLIT, SOURCE, 2, seed=0)
    write_canaries(canaries, tmp_path / "canaries.parquet")
    assert read_canaries(tmp_path / "canaries.parquet") == canaries
    assert read_canaries(tmp_path / "none.parquet") == ()
    (tmp_path / "canaries.parquet").write_bytes(b"broken")
    with pytest.raises(RunFolderError, match=r"cannot read .*canaries\.parquet"):
        read_canaries(tmp_path / "canaries.parquet")
