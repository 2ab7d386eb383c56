"""Algebra of adapters, against dense matrices."""

import math
import struct
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from semcons_ray.errors import MessageError, NotFiniteError
from semcons_ray.federation.weights import (
    Adapter,
    check_shapes,
    non_finite,
    pack,
    packed_bytes,
    rank_of,
    shapes_at,
    shapes_of,
    stacked,
    truncated_svd,
    unpack,
    update_norm,
    weighted_mean,
    with_rank,
)

OUT, IN = 7, 5


def adapter(rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.{half}.weight": torch.randn(shape, generator=generator)
        for name in ("q", "v")
        for half, shape in (("lora_A", (rank, IN)), ("lora_B", (OUT, rank)))
    }


def product(adapter: Adapter, name: str = "q") -> torch.Tensor:
    return adapter[f"{name}.lora_B.weight"].double() @ adapter[f"{name}.lora_A.weight"].double()


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_what_is_no_factor_stays_at_another_rank() -> None:
    sizes = {"q.lora_magnitude_vector.weight": torch.arange(float(OUT))}
    for rank in (1, 3, 5):
        moved = with_rank({**adapter(3, 0), **sizes}, rank)
        close(moved.pop("q.lora_magnitude_vector.weight"), torch.arange(float(OUT)))
        assert shapes_of(moved) == shapes_of(adapter(rank, 0))
        expected = {**shapes_of(adapter(rank, 0)), **shapes_of(sizes)}
        assert shapes_at(shapes_of({**adapter(3, 0), **sizes}), rank) == expected


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_packed_tensors_come_back_and_cost_what_their_type_does(dtype: str, size: int) -> None:
    tensors = {"a": torch.tensor([[1.0, -2.5]]), "b": torch.arange(64.0)}
    packed = pack(tensors, dtype)
    assert {key: value.tolist() for key, value in unpack(packed).items()} == {
        key: value.tolist() for key, value in tensors.items()
    }
    assert all(value.dtype == torch.float32 for value in unpack(packed).values())
    assert 66 * size < len(packed) < 66 * size + 200


def test_bytes_that_are_no_safetensors_are_refused() -> None:
    with pytest.raises(MessageError, match="tensors"):
        unpack(b"garbage")
    assert unpack(b"") == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_another_type_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(MessageError, match=f"tensors: b is {dtype}"):
        unpack(save({"a": torch.ones(1), "b": torch.ones(2).to(dtype)}))


def test_a_type_that_torch_does_not_have_is_refused() -> None:
    header = b'{"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    with pytest.raises(MessageError, match=r"tensors: .*F8_E8M0"):
        unpack(struct.pack("<Q", len(header)) + header + b"\x00")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with pytest.raises(MessageError, match="tensors: b is not finite"):
            unpack(save({"a": torch.ones(3), "b": torch.tensor([0.0, value]).to(dtype)}))


def test_an_adapter_holds_the_tensors_expected_and_no_others() -> None:
    some = adapter(2, seed=0)
    expected = shapes_of(some)
    check_shapes(some, expected)
    assert expected["q.lora_A.weight"] == (2, IN)
    assert shapes_at(expected, 3) == shapes_of(adapter(3, seed=0))
    for other, says in (
        ({**some, "more": torch.ones(1)}, r"more is \(1,\), not missing"),
        ({key: value for key, value in some.items() if "q.lora_B" not in key}, r"q.lora_B.weight is missing, not \(7"),
        ({**some, "v.lora_B.weight": torch.ones(2, OUT)}, r"v.lora_B.weight is \(2, 7\), not \(7, 2\)"),
        ({**some, "v.lora_B.weight": torch.ones(())}, r"v.lora_B.weight is \(\), not \(7, 2\)"),
        ({**some, "n" * 900: torch.ones(1)}, r"tensors: n{200} is"),
    ):
        with pytest.raises(MessageError, match=says):
            check_shapes(other, expected)


@given(rank=st.integers(1, 9), modules=st.integers(1, 40), seed=st.integers(0, 9))
def test_what_is_packed_is_not_longer_than_expected(rank: int, modules: int, seed: int) -> None:
    one = adapter(rank, seed)
    names = (f"{module}.{'name' * 30}." for module in range(modules))
    tensors = {name + key: value.clone() for name in names for key, value in one.items()}
    packed = len(pack(tensors, "float32"))
    assert packed <= packed_bytes(shapes_of(tensors)) < packed + 1024 * (len(tensors) + 1)


def test_values_take_four_bytes_at_most() -> None:
    one, other = ({"lora_A": (rank, 1000), "lora_B": (1000, rank)} for rank in (10, 20))
    assert packed_bytes(other) - packed_bytes(one) == 4 * 20_000


def test_what_is_not_finite_is_not_packed_and_the_likely_setting_is_named() -> None:
    assert non_finite({}) == non_finite({"a": torch.ones(2)}) == ""
    with pytest.raises(NotFiniteError, match=r"^b is not finite; training\.learning_rate is probably too high$"):
        pack({"a": torch.ones(2), "b": torch.tensor([math.nan])}, "float32")
    with pytest.raises(
        NotFiniteError, match=r"^b is .* too large for float16: set algorithm\.weight_dtype to bfloat16 or"
    ):
        pack({"a": torch.ones(2), "b": torch.tensor([7e4])}, "float16")


def test_every_adapter_has_a_weight() -> None:
    some = [adapter(2, seed=0)] * 2
    for combine in (weighted_mean, stacked):
        for weights in ([1.0], [1.0] * 3):
            with pytest.raises(ValueError, match="zip"):
                combine(some, weights)


def test_the_rank_is_that_of_the_first_a() -> None:
    assert rank_of(adapter(3, seed=0)) == 3
    assert rank_of({}) == rank_of({"lora_B": torch.ones(2, 2)}) == rank_of({"lora_A": torch.ones(2)}) == 0


def test_the_mean_is_weighted() -> None:
    mean = weighted_mean([{"w": torch.tensor([1.0, 8.0])}, {"w": torch.tensor([5.0, 0.0])}], [1, 3])
    assert mean["w"].tolist() == [4.0, 2.0]


def test_the_mean_is_summed_in_float64() -> None:
    mean = weighted_mean([{"w": torch.tensor([value])} for value in (1e8, 1.0, -1e8)], [1.0] * 3)
    assert mean["w"].item() == pytest.approx(1 / 3)


def test_of_adapters_that_are_unpacked_one_by_one_the_mean_holds_none_but_the_last() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def unpacked() -> Iterator[dict[str, torch.Tensor]]:
        for i in range(5):
            assert sum(one() is not None for one in held) <= 1
            value = torch.full((3,), float(i))
            held.append(weakref.ref(value))
            yield {"w": value}
            del value

    assert weighted_mean(unpacked(), [1.0] * 5)["w"].tolist() == [2.0] * 3


@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_stack_is_the_weighted_sum_of_products(ranks: list[int], seed: int) -> None:
    adapters = [adapter(rank, seed + i) for i, rank in enumerate(ranks)]
    weights = [0.5 + i for i in range(len(ranks))]
    stack = stacked(adapters, weights)
    assert rank_of(stack) == sum(ranks)
    for name in ("q", "v"):
        close(product(stack, name), sum(w * product(a, name) for w, a in zip(weights, adapters, strict=True)))  # type: ignore[arg-type]


@given(rank=st.integers(1, 6), cut=st.integers(1, 6), seed=st.integers(0, 99))
def test_truncation_is_the_best_approximation_of_its_rank(rank: int, cut: int, seed: int) -> None:
    whole = adapter(rank, seed)
    u, s, vh = np.linalg.svd(product(whole).numpy())
    best = torch.from_numpy((u[:, :cut] * s[:cut]) @ vh[:cut]) if cut <= len(s) else product(whole)
    small = truncated_svd(whole, cut)
    assert rank_of(small) == cut
    close(product(small), best)
    lower = max(1, cut - 1)  # components come in order, so fewer of them are the best of fewer
    close(product(with_rank(small, lower)), torch.from_numpy((u[:, :lower] * s[:lower]) @ vh[:lower]))


def test_padding_leaves_the_product_and_cutting_keeps_the_first_components() -> None:
    small = adapter(2, seed=1)
    padded = with_rank(small, 4)
    assert rank_of(padded) == 4
    assert torch.equal(product(padded), product(small))
    back = with_rank(padded, 2)
    assert all(torch.equal(back[key], small[key]) for key in small)
    assert padded["q.lora_A.weight"][2:].abs().sum() == 0
    assert padded["q.lora_B.weight"][:, 2:].abs().sum() == 0


def test_the_norm_is_that_of_the_products_of_all_modules() -> None:
    some = adapter(3, seed=2)
    dense = math.hypot(float(product(some, "q").norm()), float(product(some, "v").norm()))
    assert update_norm(some) == pytest.approx(dense, rel=1e-5)
    small = {key: value / 100 for key, value in some.items()}
    assert update_norm(small) == pytest.approx(dense / 1e4, rel=1e-4)
    assert update_norm({key: torch.zeros_like(value) for key, value in some.items()}) == 0.0
