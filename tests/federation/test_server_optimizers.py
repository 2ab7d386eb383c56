"""FedAvgM and FedAdam in closed form, and what is true of any optimizer at the server."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from semcons_ray.errors import ConfigError
from semcons_ray.federation.algorithms.fedadam import FedAdam
from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.algorithms.fedavgm import FedAvgM
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.weights import unpack, with_rank
from semcons_ray.messages import GlobalAdapter
from semcons_ray.modeling.adapter import Adapter
from tests.federation.test_weight_algorithms import (
    EQUAL,
    ONE,
    OTHER,
    TWO,
    A,
    B,
    FakeClient,
    FakeFleet,
    LossyFleet,
    lora,
)

START = FakeClient().fresh_adapter()  # A is (1, 1/2), and B is 0


def served(algorithm: Any, fleet: FakeFleet, rounds: Sequence[int], state: bytes = b"") -> list[Adapter]:
    """What a client is sent after each round."""
    sent = []
    for round in rounds:
        state = algorithm.run_round(round, state, fleet, None, evaluate=False).next_state
        [downlink] = algorithm.downlinks(round + 1, state, [0]).values()
        sent.append(unpack(GlobalAdapter.decode(downlink).tensors))
    return sent


def test_fedavgm_by_hand() -> None:
    """The mean of A is (5/2, -1) and that of B is (7/2, 3/4), so Delta is (3/2, -3/2) and (7/2, 3/4); then v = Delta,
    and half of it is gone. Delta is what is left, v a quarter of the last and all of it."""
    algorithm = FedAvgM(TWO, EQUAL, "float32", momentum=0.25, server_learning_rate=0.5)
    fleet = FakeFleet(algorithm, [FakeClient(ONE, 1), FakeClient(OTHER, 3)])
    first, second = served(algorithm, fleet, (1, 2))
    assert first[A].tolist() == [[1.75, -0.25]]
    assert first[B].tolist() == [[1.75], [0.375]]
    assert second[A].tolist() == [[1.75 + 0.5 * (0.375 + 0.75), -0.25 - 0.5 * (0.375 + 0.75)]]
    assert second[B].tolist() == [[1.75 + 0.5 * (0.875 + 1.75)], [0.375 + 0.5 * (0.1875 + 0.375)]]


def test_fedadam_of_one_client_by_hand() -> None:
    """From 1 to 3, with v = 1 at first: m = 1 and v = 7/4, then m = 1.2847496 and v = 1.9283319. What does not change
    stays where it is."""
    algorithm = FedAdam(Cohort(1, 1.0, 0), (1,), "float32", server_learning_rate=1.0, beta1=0.5, beta2=0.75, tau=1.0)
    fleet = FakeFleet(algorithm, [FakeClient(lora([[3.0, 0.5]], [[0.0], [0.0]]))])
    first, second = served(algorithm, fleet, (1, 2))
    assert first[A].tolist() == [pytest.approx([1.4305009, 0.5])]
    assert second[A].tolist() == [pytest.approx([1.9683582, 0.5])]
    assert float(second[A][0, 1]) == 0.5
    assert not second[B].any()


def test_fedadams_steps_are_measured_by_the_mean_change_of_unequal_clients() -> None:
    """Delta is (3/2, -3/2); m is a tenth of it, and v its square by a hundredth besides tau^2."""
    algorithm = FedAdam(TWO, EQUAL, "float32", server_learning_rate=0.1)
    [first] = served(algorithm, FakeFleet(algorithm, [FakeClient(ONE, 1), FakeClient(OTHER, 3)]), (1,))
    step = 0.1 * 0.15 / ((0.99e-6 + 0.0225) ** 0.5 + 1e-3)
    assert first[A].tolist() == [pytest.approx([1 + step, 0.5 - step])]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_without_momentum_fedavgm_is_fedavg_to_the_last_bit(dtype: str) -> None:
    drawn = torch.Generator().manual_seed(0)
    taught = [{A: torch.randn(1, 2, generator=drawn), B: torch.randn(2, 1, generator=drawn)} for _ in range(4)]
    sent = []
    for algorithm in (FedAvgLora(TWO, EQUAL, dtype), FedAvgM(TWO, EQUAL, dtype, momentum=0, server_learning_rate=1)):
        messages, state = [], algorithm.first_state()
        clients = [FakeClient(None, 1), FakeClient(None, 3)]
        for round in (1, 2):
            for client, adapter in zip(clients, taught[2 * round - 2 :], strict=False):
                client.taught = adapter
            fleet = FakeFleet(algorithm, clients)
            state = algorithm.run_round(round, state, fleet, None, evaluate=False).next_state  # type: ignore[arg-type]
            messages.append(algorithm.downlinks(round + 1, state, [0, 1]))
        sent.append(messages)
    assert sent[0] == sent[1]


OPTIMIZERS = (FedAvgM(TWO, EQUAL, "float32", momentum=0.5), FedAdam(TWO, EQUAL, "float32", server_learning_rate=0.5))


def stepped(algorithm: Any, means: Sequence[Adapter]) -> list[Adapter]:
    """x after each round, by the papers' formulas, if the clients' mean is as given."""
    x, m, v = ({key: value.double() for key, value in START.items()} for _ in range(3))
    for key in START:
        m[key], v[key] = torch.zeros_like(m[key]), torch.full_like(v[key], 1e-6)
    result = []
    for mean in means:
        for key in x:
            delta = mean[key].double() - x[key]
            if isinstance(algorithm, FedAvgM):
                m[key] = 0.5 * m[key] + delta
                x[key] = x[key] + m[key]
            else:
                m[key] = 0.9 * m[key] + 0.1 * delta
                v[key] = 0.99 * v[key] + 0.01 * delta**2
                x[key] = x[key] + 0.5 * m[key] / (v[key] ** 0.5 + 1e-3)
        result.append({key: value.float() for key, value in x.items()})
    return result


@pytest.mark.parametrize("lost", [[1], [2], [1, 2], []])
@pytest.mark.parametrize("algorithm", OPTIMIZERS, ids=lambda algorithm: type(algorithm).__name__)
def test_who_is_lost_has_no_part_in_delta_and_is_back_in_the_next_round(algorithm: Any, lost: Sequence[int]) -> None:
    fleet = LossyFleet(algorithm, [FakeClient(ONE, 1), FakeClient(OTHER, 3)], lost, on_the_way=False)
    both = lora([[2.5, -1.0]], [[3.5], [0.75]])
    expected = stepped(algorithm, [ONE if round in lost else both for round in (1, 2, 3)])
    for sent, right in zip(served(algorithm, fleet, (1, 2, 3)), expected, strict=True):
        torch.testing.assert_close(sent, right)


def test_who_does_not_take_part_does_not_count() -> None:
    cohort = Cohort(num_clients=3, participation=0.34, seed=1)
    taught = [lora([[float(k), 1.0]], [[1.0], [float(k)]]) for k in range(3)]
    algorithm = FedAvgM(cohort, (1, 1, 1), "float32", momentum=0.5)
    sampled = [client for round in range(1, 6) for client in cohort.sample(round)]
    assert len(set(sampled)) > 1
    fleet = FakeFleet(algorithm, [FakeClient(adapter, 1 + k) for k, adapter in enumerate(taught)])
    expected = stepped(algorithm, [taught[client] for client in sampled])
    for sent, right in zip(served(algorithm, fleet, range(1, 6)), expected, strict=True):
        torch.testing.assert_close(sent, right)


@pytest.mark.parametrize("algorithm", OPTIMIZERS, ids=lambda algorithm: type(algorithm).__name__)
def test_the_start_is_not_sent_and_is_cut_to_the_clients_rank(algorithm: Any) -> None:
    clients = [FakeClient(ONE), FakeClient(OTHER)]
    fleet, wide = FakeFleet(algorithm, clients), FakeFleet(algorithm, clients)
    wide.first_adapter = with_rank(START, 2)
    wide.first_adapter[A][1] = 7.0
    for one, other in zip(served(algorithm, fleet, (1, 2)), served(algorithm, wide, (1, 2)), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert clients[0].notes[0][2] == 0  # bytes of the first message
    assert clients[0].notes[1][2] > 0


@pytest.mark.parametrize("algorithm", OPTIMIZERS, ids=lambda algorithm: type(algorithm).__name__)
def test_the_state_holds_all_that_the_server_remembers(algorithm: Any) -> None:
    clients = [FakeClient(ONE, 1), FakeClient(OTHER, 3)]
    states, state = [], algorithm.first_state()
    for round in (1, 2, 3):
        state = algorithm.run_round(round, state, FakeFleet(algorithm, clients), None, evaluate=False).next_state
        states.append(state)
    again = algorithm.run_round(3, states[1], FakeFleet(algorithm, clients), None, evaluate=False).next_state
    assert again == states[2]
    assert len(set(states)) == 3


def test_a_step_that_overflows_ends_the_run_with_the_setting_to_change() -> None:
    algorithm = FedAvgM(TWO, EQUAL, "float16", server_learning_rate=1e5)
    fleet = FakeFleet(algorithm, [FakeClient(ONE), FakeClient(OTHER)])
    with pytest.raises(ConfigError, match=r"what the server sends: .*algorithm\.weight_dtype to bfloat16 or float32"):
        algorithm.run_round(1, b"", fleet, None, evaluate=False)  # type: ignore[arg-type]


def test_what_nobody_changes_has_no_delta_though_messages_are_rounded() -> None:
    """Each weight that moves goes 0.1 far, however little it moved: to 1.1, which is no float16."""
    algorithm = FedAdam(TWO, EQUAL, "float16", server_learning_rate=0.1, beta1=0, beta2=0, tau=1e-9)
    clients = [FakeClient(ONE), FakeClient(ONE)]
    first, state = START, b""
    for round in (1, 2, 3):
        state = algorithm.run_round(round, state, FakeFleet(algorithm, clients), None, evaluate=False).next_state  # type: ignore[arg-type]
        sent = unpack(GlobalAdapter.decode(algorithm.downlinks(round + 1, state, [0])[0]).tensors)
        assert round == 1 or all(torch.equal(sent[key], first[key]) for key in first)
        first, clients = sent, [FakeClient(), FakeClient()]  # who learn nothing
