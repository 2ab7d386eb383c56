import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.data import selection
from semcons_ray.data.examples import Example
from semcons_ray.data.selection import order_prompts, proportional
from semcons_ray.errors import ConfigError


def no_embedding(indices):
    raise AssertionError("not needed")


def choose(candidates, category, budget, name, embed=no_embedding, **options):
    """Numbers of the chosen candidates; `embed` gets numbers."""
    numbers = np.array(candidates)
    examples = [Example(str(number), "", f"c{category[number]}") for number in numbers]
    chosen = order_prompts(
        examples, budget=budget, selection=name, options=options, embed=lambda texts: embed(np.array(texts, dtype=int))
    )
    return numbers[chosen].tolist()


def test_random_takes_the_candidates_as_they_come():
    assert choose([3, 1, 2, 0], [0, 0, 0, 0], 2, "random") == [3, 1]


def test_stratified_takes_categories_in_turn_while_they_last():
    category = [0, 0, 0, 0, 1, 2, 2]
    assert choose([3, 2, 6, 1, 4, 0, 5], category, 7, "stratified") == [3, 4, 6, 2, 5, 1, 0]


def test_k_center_on_a_line_starts_in_the_middle_and_goes_farthest_first():
    points = {10: 0.0, 11: 1.0, 12: 4.0, 13: 6.0, 14: 11.0}  # mean 4.4
    embed = lambda indices: torch.tensor([[points[i]] for i in indices.tolist()])  # noqa: E731
    assert choose([14, 13, 12, 11, 10], np.zeros(15, int), 5, "k_center", embed) == [12, 14, 10, 13, 11]


def test_k_center_takes_no_prompt_twice_where_embeddings_coincide():
    chosen = choose(range(6), np.zeros(6, int), 6, "k_center", lambda indices: torch.ones(len(indices), 3))
    assert chosen == list(range(6))


def test_k_center_embeds_a_bounded_number_of_candidates(monkeypatch):
    monkeypatch.setattr(selection, "MAX_K_CENTER_CANDIDATES", 10)
    seen = []

    def embed(indices):
        seen.append(len(indices))
        return torch.eye(len(indices))

    choose(range(50), np.zeros(50, int), 3, "k_center", embed)
    choose(range(50), np.zeros(50, int), 8, "k_center", embed)
    assert seen == [10, 16]


@given(st.integers(0, 2**32), st.integers(2, 30), st.data())
def test_k_center_covers_within_twice_the_best_radius(seed, count, data):
    """Farthest first is a 2-approximation (Gonzalez 1985): its centres lie at least its radius apart."""
    budget = data.draw(st.integers(1, count - 1))
    points = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 3)))
    chosen = choose(range(count), np.zeros(count, int), budget, "k_center", lambda indices: points)
    distances = torch.cdist(points, points[chosen])
    radius = distances.min(dim=1).values.max()
    apart = distances[chosen] + torch.diag(torch.full((budget,), torch.inf, dtype=torch.float64))
    assert len(set(chosen)) == budget
    assert apart.min() >= radius - 1e-6


@pytest.mark.parametrize("name", ["random", "stratified", "k_center"])
@given(seed=st.integers(0, 2**32), budget=st.integers(1, 39))
def test_a_budgets_prompts_are_the_first_of_a_larger_ones(name, seed, budget):
    generator = np.random.default_rng(seed)
    candidates, category = generator.permutation(40), generator.integers(0, 5, 40)
    points = torch.from_numpy(generator.standard_normal((40, 4)))
    embed = lambda indices: points[torch.from_numpy(indices.copy())]  # noqa: E731
    larger = choose(candidates, category, 40, name, embed)
    assert choose(candidates, category, budget, name, embed) == larger[:budget]
    assert sorted(larger) == list(range(40))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 2**32))
def test_any_first_n_of_a_proportional_order_have_the_mix_of_all(keys, seed):
    category = np.array(keys)
    order = np.random.default_rng(seed).permutation(len(keys))
    arranged = proportional(order, category)
    assert sorted(arranged.tolist()) == list(range(len(keys)))
    for key in set(keys):
        share = keys.count(key) / len(keys)
        taken = np.cumsum(category[arranged] == key)
        expected = share * np.arange(1, len(keys) + 1)
        assert np.abs(taken - expected).max() < len(set(keys))
        assert [i for i in arranged if keys[i] == key] == [i for i in order if keys[i] == key]


def test_proportional_by_hand():
    # Two of category 0 at 1/4 and 3/4, four of category 1 at 1/8, 3/8, 5/8 and 7/8.
    assert proportional(np.arange(6), np.array([0, 0, 1, 1, 1, 1])).tolist() == [2, 0, 3, 4, 1, 5]


def last(candidates, budget, embed, *, step: int = 1):
    """The last candidates, backwards."""
    return range(len(candidates) - 1, -1, -step)[:budget]


def bad(candidates, budget, embed, *, how: str):
    return {"few": [0], "twice": [0, 0], "far": [0, 9], "words": ["a", "b"], "nothing": None}[how]


def test_a_selection_of_ones_own_is_asked_with_its_options():
    assert choose([3, 1, 2, 0], [0, 0, 0, 0], 2, f"{__name__}:last") == [0, 2]
    assert choose([3, 1, 2, 0], [0, 0, 0, 0], 2, f"{__name__}:last", step=2) == [0, 1]


@pytest.mark.parametrize("how", ["few", "twice", "far", "words", "nothing"])
def test_what_is_no_selection_is_refused(how):
    with pytest.raises(ConfigError, match=r"^prompts\.selection tests\.data\.test_selection:bad gave "):
        choose([3, 1, 2, 0], [0, 0, 0, 0], 2, f"{__name__}:bad", how=how)
