import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.federation.randomness import SERVER, Cohort, stream


def test_streams_are_equal_for_equal_names_and_differ_otherwise() -> None:
    names = [
        (seed, round, client, stage)
        for seed in (0, 1)
        for round in (1, 2)
        for client in (SERVER, 0, 1)
        for stage in ("fine_tune", "generate")
    ]
    draws = [stream(*name).integers(2**62) for name in names]  # type: ignore[arg-type]
    assert len(set(draws)) == len(draws)
    assert draws == [stream(*name).integers(2**62) for name in names]  # type: ignore[arg-type]


@given(
    num_clients=st.integers(1, 50),
    participation=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32 - 1),
    round=st.integers(1, 100),
)
def test_a_cohort_is_that_share_of_distinct_clients_in_order(
    num_clients: int, participation: float, seed: int, round: int
) -> None:
    cohort = Cohort(num_clients, participation, seed).sample(round)
    assert list(cohort) == sorted(set(cohort))
    assert set(cohort) <= set(range(num_clients))
    assert abs(len(cohort) - participation * num_clients) <= 0.5 or len(cohort) == 1


def test_everyone_takes_part_sooner_or_later() -> None:
    cohort = Cohort(num_clients=10, participation=0.3, seed=0)
    assert set(itertools.chain.from_iterable(cohort.sample(round) for round in range(1, 40))) == set(range(10))


@pytest.mark.parametrize(
    ("num_clients", "participation", "size"), [(4, 1.0, 4), (4, 0.6, 2), (5, 0.5, 3), (3, 0.01, 1)]
)
def test_sizes_by_hand(num_clients: int, participation: float, size: int) -> None:
    assert len(Cohort(num_clients, participation, 0).sample(1)) == size


def test_members_are_those_that_take_part_in_any_round() -> None:
    cohort = Cohort(20, 0.2, seed=3, num_rounds=4)
    sampled = {client for round in (1, 2, 3, 4) for client in cohort.sample(round)}
    assert [*cohort.members] == sorted(sampled)
    assert 4 < len(sampled) < 20
    assert [*Cohort(20, 0.2, seed=3).members] == [*range(20)]  # of rounds without end
    assert [*Cohort(20, 1.0, seed=3, num_rounds=4).members] == [*range(20)]


def test_of_a_million_clients_only_those_that_take_part_are_listed() -> None:
    assert len(Cohort(10**6, 1e-4, seed=0, num_rounds=20).members) <= 2000
