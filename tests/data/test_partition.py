import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.data.examples import Example
from semcons_ray.data.partition import private_shares
from semcons_ray.errors import ConfigError, DataError

CATEGORIES = 5


def shares(order, category, clients, size, partition, alpha=0.5, seed=0):
    order, category = np.asarray(order), np.asarray(category)
    found = private_shares(
        [Example("", "", f"c{category[place]}") for place in order],
        num_clients=clients,
        examples_per_client=size,
        partition=partition,
        options={"alpha": alpha} if partition in ("dirichlet", "quantity") else {},
        random=np.random.SeedSequence(seed),
    )
    return [order[share] for share in found]


def balanced(count, categories=CATEGORIES):
    return np.arange(count) % categories


def mixes(found, category):
    return np.array([np.bincount(category[share], minlength=CATEGORIES) / len(share) for share in found])


@given(
    partition=st.sampled_from(["iid", "dirichlet", "quantity"]),
    clients=st.integers(1, 12),
    size=st.integers(1, 12),
    spare=st.integers(0, 20),
    alpha=st.sampled_from([1e-300, 1e-8, 1e-3, 0.1, 0.5, 1.0, 100.0, 1e8]),
    seed=st.integers(0, 2**32),
)
def test_shares_are_disjoint_of_the_right_size_and_reproducible(partition, clients, size, spare, alpha, seed):
    count = clients * size + spare + 2  # with two more, both categories are there
    generator = np.random.default_rng(seed)
    order = generator.permutation(count)
    category = np.minimum(np.arange(count), generator.integers(1, CATEGORIES + 1, count))
    found = shares(order, category, clients, size, partition, alpha, seed)
    taken = np.concatenate(found)
    assert len(found) == clients
    assert len(set(taken.tolist())) == len(taken) == clients * size
    assert set(taken.tolist()) <= set(order.tolist())
    assert min(map(len, found)) >= 1
    if partition != "quantity":
        assert {len(share) for share in found} == {size}
    again = shares(order, category, clients, size, partition, alpha, seed)
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


def test_iid_takes_the_next_examples():
    assert [share.tolist() for share in shares([5, 3, 1, 0, 2, 4], np.zeros(6, int), 2, 2, "iid")] == [[5, 3], [1, 0]]


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_a_clients_share_stays_when_clients_are_added(partition):
    order, category = np.random.default_rng(0).permutation(500), balanced(500)
    few = shares(order, category, 3, 10, partition)
    many = shares(order, category, 9, 10, partition)
    assert all(np.array_equal(one, other) for one, other in zip(few, many[:3], strict=True))


def test_dirichlet_is_skewed_by_a_small_alpha_and_even_by_a_large_one():
    order, category = np.random.default_rng(0).permutation(100_000), balanced(100_000)
    concentrated = mixes(shares(order, category, 50, 200, "dirichlet", alpha=1e-6), category)
    assert concentrated.max(axis=1).min() == 1.0
    assert len(set(concentrated.argmax(axis=1).tolist())) == CATEGORIES
    even = mixes(shares(order, category, 50, 200, "dirichlet", alpha=1e8), category)
    assert np.abs(even - 1 / CATEGORIES).max() < 5 * np.sqrt(0.2 * 0.8 / 200)


def test_dirichlet_mixes_have_the_moments_of_the_distribution():
    """q ~ Dir(a) with a = alpha K p: mean p, variance p (1 - p) / (sum a + 1); n draws add E[q (1 - q)] / n."""
    alpha, clients, size = 0.5, 2000, 50
    share = np.array([0.1, 0.3, 0.6])
    category = np.repeat([0, 1, 2], (share * 1_000_000).astype(int))
    found = shares(np.random.default_rng(1).permutation(len(category)), category, clients, size, "dirichlet", alpha)
    counts = np.array([np.bincount(category[one], minlength=3) for one in found]) / size
    variance = share * (1 - share) / (alpha * 3 + 1)
    total = variance + (share * (1 - share) - variance) / size
    assert counts.mean(axis=0) == pytest.approx(share, abs=4 * np.sqrt(total.max() / clients))
    assert counts.var(axis=0) == pytest.approx(total, rel=0.1)


def test_dirichlet_uses_up_every_category_when_all_examples_are_asked_for():
    category = np.array([0] * 3 + [1] * 37)
    found = shares(np.random.default_rng(0).permutation(40), category, 4, 10, "dirichlet", alpha=1e-6)
    assert sorted(np.concatenate(found).tolist()) == list(range(40))


def test_quantity_sizes_are_skewed_by_a_small_alpha_and_even_by_a_large_one():
    category = np.zeros(1000, int)
    skewed = [len(share) for share in shares(range(1000), category, 10, 100, "quantity", alpha=0.01)]
    assert max(skewed) > 500
    assert min(skewed) >= 1
    even = [len(share) for share in shares(range(1000), category, 10, 100, "quantity", alpha=1e9)]
    assert max(even) - min(even) <= 1


def test_category_deals_the_largest_categories_first_and_takes_evenly():
    # Sizes 4, 7, 5, 6: by size 1, 3, 2, 0. Client 0 gets categories 1 and 2, client 1 gets 3 and 0.
    category = np.repeat([0, 1, 2, 3], [4, 7, 5, 6])
    found = shares(np.random.default_rng(0).permutation(22), category, 2, 10, "category")
    assert [np.bincount(category[share], minlength=4).tolist() for share in found] == [[0, 5, 5, 0], [4, 0, 0, 6]]


@given(clients=st.integers(1, 12), categories=st.integers(2, 8), size=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_category_gives_each_client_its_own_and_shares_only_when_it_must(clients, categories, size, seed):
    category = balanced(clients * size * categories, categories)
    found = shares(np.random.default_rng(seed).permutation(len(category)), category, clients, size, "category")
    held = [set(category[share].tolist()) for share in found]
    assert {len(share) for share in found} == {size}
    assert len(set(np.concatenate(found).tolist())) == clients * size
    if clients <= categories:
        assert len(set().union(*held)) == sum(map(len, held))
    else:
        assert all(len(own) == 1 for own in held)
        owners = [sum(key in own for own in held) for key in range(categories)]
        assert max(owners) - min(owners) <= 1


def test_a_category_too_small_for_its_client_is_named():
    category = np.array([0] * 20 + [1] * 3)
    with pytest.raises(DataError) as raised:
        shares(range(23), category, 2, 10, "category")
    assert str(raised.value) == (
        "data.partition category has 3 examples for client 1 (of 'c1'), fewer than data.examples_per_client 10"
    )


@pytest.mark.parametrize("partition", ["dirichlet", "category"])
def test_a_partition_by_category_needs_two(partition):
    with pytest.raises(DataError, match=f"data.partition {partition} needs two or more categories"):
        shares(range(10), np.zeros(10, int), 2, 3, partition)


def by_length(examples, num_clients, examples_per_client, random, *, longest: bool = False):
    """Clients get examples of like length."""
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].prompt), reverse=longest)
    return [order[client * examples_per_client :][:examples_per_client] for client in range(num_clients)]


def bad(examples, num_clients, examples_per_client, random, *, how: str):
    good = [[client] for client in range(num_clients)]
    return {"few": good[1:], "empty": [[], *good[1:]], "twice": [[0, 1], *good[1:]], "far": [[99], *good[1:]],
            "negative": [[-1], *good[1:]], "words": [["a"]], "nothing": None}[how]  # fmt: skip


def own(name, **options):
    examples = [Example("x" * length, "", "") for length in (3, 1, 4, 2, 6, 5)]
    return private_shares(
        examples, num_clients=2, examples_per_client=2, partition=f"{__name__}:{name}", options=options,
        random=np.random.SeedSequence(0),
    )  # fmt: skip


def test_a_partition_of_ones_own_is_asked_with_its_options():
    assert [share.tolist() for share in own("by_length")] == [[1, 3], [0, 2]]
    assert [share.tolist() for share in own("by_length", longest=True)] == [[4, 5], [2, 0]]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("few", r"gave \(1\) examples, not some to each of 2"),
        ("empty", r"gave \(0, 1\) examples, not some to each of 2"),
        ("twice", "gave an example twice, or one that is none of 0 to 5"),
        ("far", "gave an example twice, or one that is none of 0 to 5"),
        ("negative", "gave an example twice, or one that is none of 0 to 5"),
        ("words", "gave no lists of places in the examples: "),
        ("nothing", "gave no lists of places in the examples: "),
    ],
)
def test_what_is_no_partition_is_refused(how, says):
    with pytest.raises(ConfigError, match=rf"^data\.partition tests\.data\.test_partition:bad {says}"):
        own("bad", how=how)
