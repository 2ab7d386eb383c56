"""Each weight baseline in closed form, on matrices small enough to check by hand."""

import itertools
import math
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from msgspec import structs
from safetensors.torch import load, save

from semcons_ray.errors import ConfigError, MessageError
from semcons_ray.federation.algorithms.centralized import Centralized
from semcons_ray.federation.algorithms.fedadam import FedAdam
from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.algorithms.fedavgm import FedAvgM
from semcons_ray.federation.algorithms.fedex_lora import FedExLora
from semcons_ray.federation.algorithms.fedprox import FedProx
from semcons_ray.federation.algorithms.fedsa_lora import FedSaLora
from semcons_ray.federation.algorithms.ffa_lora import FfaLora
from semcons_ray.federation.algorithms.flexlora import FlexLora
from semcons_ray.federation.algorithms.flora import Flora
from semcons_ray.federation.algorithms.hetlora import HetLora
from semcons_ray.federation.algorithms.one_shot_fedavg_lora import OneShotFedAvgLora
from semcons_ray.federation.algorithms.scaffold import Scaffold
from semcons_ray.federation.algorithms.semantic_consensus import SemanticConsensus
from semcons_ray.federation.fleet import Evaluation, Reply
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.weights import Shapes, pack, rank_of, shapes_at, shapes_of, unpack, with_rank
from semcons_ray.messages import NO_LABELS, PLAIN, ZSTD, AdapterUpdate, GlobalAdapter, PseudoLabels
from semcons_ray.modeling.adapter import Adapter
from tests.federation.rows import work

A, B = "q.lora_A.weight", "q.lora_B.weight"
TWO = Cohort(num_clients=2, participation=1.0, seed=0)
EQUAL = (1, 1)
OWN = PseudoLabels(round_number=1, prompt_ids=(0,), responses=("mine",))


def lora(a: list[list[float]], b: list[list[float]]) -> Adapter:
    return {A: torch.tensor(a), B: torch.tensor(b)}


ONE, OTHER = lora([[1.0, 2.0]], [[2.0], [0.0]]), lora([[3.0, -2.0]], [[4.0], [1.0]])


def packed(tensors: Adapter) -> bytes:
    """As `pack` does, with no regard to what they are."""
    return save({key: value.clone().contiguous() for key, value in tensors.items()})


def update(tensors: Adapter, num_examples: int, client_id: int = 0, round: int = 1) -> AdapterUpdate:
    return AdapterUpdate(round_number=round, client_id=client_id, num_examples=num_examples, tensors=packed(tensors))


def product(adapter: Adapter) -> torch.Tensor:
    return adapter[B] @ adapter[A]


class FakeClient:
    """A client whose training is told; it starts from zero update."""

    def __init__(self, trained: Adapter | None = None, num_private: int = 1) -> None:
        self.client_id = 0
        self.taught = trained
        self.private = [None] * num_private
        self.adapter, self.frozen, self.memory = self.fresh_adapter(), {}, {}  # type: ignore[var-annotated]
        self.notes: list[Any] = []
        self.weights: list[float] = []
        self.labelled: list[int] = []

    def fresh_adapter(self, round: int | None = None) -> Adapter:
        fresh = lora([[float(round or 1), 0.5]], [[0.0], [0.0]])
        return fresh if self.taught is None else with_rank(fresh, rank_of(self.taught))

    def label_prompts(self, round: int) -> PseudoLabels:
        self.labelled.append(round)
        return OWN

    def fine_tune(self, round: int, labels: PseudoLabels, **more: Any) -> None:
        self.notes.append((round, labels, more.get("downlink_bytes", 0)))
        self.weights.append(more.get("weight", 1.0))
        if self.taught is not None:
            self.adapter = self.taught

    def upload(self, round: int, tensors: Adapter, dtype: str, compression: str) -> bytes:
        message = update(tensors, len(self.private), self.client_id, round)
        return structs.replace(message, tensors=pack(tensors, dtype)).encode(compression)


class FakeFleet:
    """Real visits of fake clients, last first; `measure` counts how often it is asked."""

    def __init__(self, algorithm: Any, clients: Sequence[FakeClient]) -> None:
        self.algorithm, self.clients = algorithm, clients
        for client_id, client in enumerate(clients):
            client.client_id = client_id
        self.first_adapter = clients[0].fresh_adapter() if clients else {}
        self.adapter_shapes = shapes_of(self.first_adapter)
        self.measured: list[tuple[int, bytes]] = []

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        for client in reversed(list(downlinks)):
            uplink = self.algorithm.visit(self.clients[client], round, downlinks[client])
            yield self.reply(client, round, uplink, float(client) if evaluate else None)

    def measure(self, round: int, downlinks: Mapping[int, bytes]) -> Iterator[Reply]:
        for client, downlink in downlinks.items():
            self.measured.append((client, downlink))
            yield self.reply(client, round, b"", 10.0 + client)

    def reply(self, client: int, round: int, uplink: bytes, nll: float | None) -> Reply:
        evaluation = None if nll is None else Evaluation(nll=(nll,), num_tokens=(1,), num_bytes=(1,), answers=())
        return Reply(
            client_id=client, round=round, uplink=uplink, train_loss=0.0, num_private=1, num_pseudo_labels=0,
            evaluation=evaluation, rows=(),
        )  # fmt: skip


def test_fedavg_averages_a_and_b_by_private_examples() -> None:
    mean = unpack(FedAvgLora(TWO, EQUAL).aggregate(b"", [update(ONE, 1), update(OTHER, 3)]))
    assert mean[A].tolist() == [[2.5, -1.0]]
    assert mean[B].tolist() == [[3.5], [0.75]]


def test_a_fedavg_round_from_message_to_message() -> None:
    clients = [FakeClient(ONE, num_private=1), FakeClient(OTHER, num_private=3)]
    algorithm = FedAvgLora(TWO, EQUAL, dtype="float32", compression="zstd")
    fleet = FakeFleet(algorithm, clients)
    outcome = algorithm.run_round(1, algorithm.first_state(), fleet, None, evaluate=True)  # type: ignore[arg-type]
    assert [reply.client_id for reply in outcome.replies] == [0, 1]
    assert unpack(outcome.next_state)[A].tolist() == [[2.5, -1.0]]
    # The new average is measured, once, and is every client's.
    [(client, downlink)] = fleet.measured
    assert client == 0
    assert GlobalAdapter.decode(downlink).round_number == 1
    assert unpack(GlobalAdapter.decode(downlink).tensors)[B].tolist() == [[3.5], [0.75]]
    assert {c: e.nll_sum for c, e in outcome.evaluations.items() if e} == {0: 10.0, 1: 10.0}
    assert work(outcome.rows) == [("aggregate", 1, -1, "driver", socket.gethostname())]
    # In the next round both start from it.
    algorithm.adopt(clients[1], 2, downlink)  # type: ignore[arg-type]
    assert clients[1].adapter[A].tolist() == [[2.5, -1.0]]
    # Without evaluation nobody is asked.
    again = algorithm.run_round(2, outcome.next_state, FakeFleet(algorithm, clients), None, evaluate=False)  # type: ignore[arg-type]
    assert again.evaluations == {}
    assert clients[0].notes[1] == (2, NO_LABELS, len(downlink))


@pytest.mark.parametrize(
    ("exchanges", "learnt"),
    [(range(1, 4), [NO_LABELS, OWN, OWN]), (range(2, 4), [NO_LABELS, NO_LABELS, OWN])],
)
def test_self_labels_are_learnt_when_those_of_others_would_be(exchanges: range, learnt: Sequence[PseudoLabels]) -> None:
    own = {"self_labels": True, "label_weight": 0.5, "exchanges": exchanges}
    for algorithm in (FedAvgLora(TWO, EQUAL, **own), OneShotFedAvgLora(TWO, EQUAL, **own, num_rounds=4)):
        client = FakeClient()
        assert algorithm.uses_public_prompts
        for round in (1, 2, 3):
            algorithm.visit(client, round, b"")  # type: ignore[arg-type]
        assert [(round, labels) for round, labels, _ in client.notes] == [*zip((1, 2, 3), learnt, strict=True)]
        assert client.labelled == [round for round, labels in zip((1, 2, 3), learnt, strict=True) if labels is OWN]
        assert client.weights == [0.5] * 3
    assert not FedAvgLora(TWO, EQUAL).uses_public_prompts


def test_self_training_is_semantic_consensus_with_own_answers() -> None:
    client = FakeClient()
    algorithm = SemanticConsensus(TWO, 0.5, exchanges=range(1, 3), self_training=True)
    fleet = FakeFleet(algorithm, [client, FakeClient()])
    state = algorithm.first_state()
    for round in (1, 2, 3):
        state = algorithm.run_round(round, state, fleet, None, evaluate=False).next_state  # type: ignore[arg-type]
    assert client.notes == [(1, NO_LABELS, 0), (2, OWN, 0), (3, OWN, 0)]
    assert client.labelled == [2, 3]
    assert client.weights == [0.5] * 3
    assert state == algorithm.first_state()


class Quadratic(FakeClient):
    """Minimises a/2 |w - b|^2 over A alone by K steps of SGD, with an algorithm's `adjust`."""

    def __init__(self, curvature: float, minimum: float, steps: int = 5, lr: float = 0.1) -> None:
        super().__init__()
        self.curvature, self.minimum, self.steps, self.lr = curvature, minimum, steps, lr
        self.path: list[float] = []

    def fresh_adapter(self, round: int | None = None) -> Adapter:
        return {A: torch.zeros(1, 1), B: torch.zeros(1, 1)}

    def fine_tune(self, round: int, labels: PseudoLabels, **more: Any) -> None:
        parameters = {key: torch.nn.Parameter(value.clone()) for key, value in self.adapter.items()}
        self.path = []
        for _ in range(self.steps):
            raw = self.curvature * (float(parameters[A].detach()) - self.minimum)
            parameters[A].grad = torch.tensor([[raw]])
            parameters[B].grad = None
            with torch.no_grad():
                if more["adjust"] is not None:
                    more["adjust"](parameters)
                assert parameters[A].grad is not None
                self.path.append(float(parameters[A].grad))
                parameters[A] -= self.lr * parameters[A].grad
        self.adapter = {key: value.detach() for key, value in parameters.items()}


def rounds(algorithm: Any, clients: Sequence[FakeClient], count: int) -> Adapter:
    state = algorithm.first_state()
    for round in range(1, count + 1):
        state = algorithm.run_round(round, state, FakeFleet(algorithm, clients), None, evaluate=False).next_state
    return unpack(state)


def test_fedavg_of_several_steps_misses_the_minimum_that_scaffold_finds() -> None:
    # f = (1/2 (w + 1)^2 + 4/2 (w - 2)^2) / 2 has its minimum at (1 * -1 + 4 * 2) / 5 = 1.4. Client k contracts by
    # s_k = (1 - lr a_k)^5, so FedAvg's fixed point is sum (1 - s_k) b_k / sum (1 - s_k).
    clients = [Quadratic(1.0, -1.0), Quadratic(4.0, 2.0)]
    slow, fast = 1 - 0.9**5, 1 - 0.6**5
    fixed = (slow * -1.0 + fast * 2.0) / (slow + fast)
    assert float(rounds(FedAvgLora(TWO, EQUAL, "float32"), clients, 100)[A]) == pytest.approx(fixed, abs=1e-4)
    assert abs(fixed - 1.4) > 0.2
    clients = [Quadratic(1.0, -1.0), Quadratic(4.0, 2.0)]
    assert float(rounds(Scaffold(TWO, EQUAL, "float32"), clients, 100)[A]) == pytest.approx(1.4, abs=1e-4)


def test_scaffold_of_sgd_is_the_papers_option_two() -> None:
    algorithm = Scaffold(TWO, EQUAL, "float32")
    client = Quadratic(2.0, 3.0, steps=4)
    client.memory["own." + A] = torch.tensor([[0.7]])
    downlink = {A: torch.tensor([[1.0]]), B: torch.zeros(1, 1)}
    downlink |= {"control." + A: torch.tensor([[0.2]]), "control." + B: torch.zeros(1, 1)}
    message = GlobalAdapter(round_number=1, tensors=pack(downlink, "float32")).encode()
    sent = unpack(AdapterUpdate.decode(algorithm.visit(client, 2, message)).tensors)  # type: ignore[arg-type]
    assert client.path[0] == pytest.approx(2.0 * (1.0 - 3.0) + 0.2 - 0.7)  # g - c_k + c
    option_two = 0.7 - 0.2 + (1.0 - float(sent[A])) / (4 * 0.1)
    assert float(client.memory["own." + A]) == pytest.approx(option_two, rel=1e-5)
    assert float(sent["control." + A]) == pytest.approx(option_two - 0.7, rel=1e-5)
    assert not [key for key in client.memory if not key.startswith("own.")]


def test_scaffold_moves_c_by_the_share_of_clients_that_answered() -> None:
    algorithm = Scaffold(Cohort(num_clients=8, participation=0.25, seed=0), (1,) * 8)
    before = pack({A: torch.tensor([[0.0]]), "control." + A: torch.tensor([[1.0]])}, "float32")
    sent = [{A: torch.tensor([[x]]), "control." + A: torch.tensor([[c]])} for x, c in ((1.0, 4.0), (3.0, -2.0))]
    after = unpack(algorithm.aggregate(before, [update(sent[0], 1), update(sent[1], 9)]))
    assert float(after[A]) == 2.0
    assert float(after["control." + A]) == 1.0 + 2 / 8 * 1.0


def test_fedprox_pulls_towards_where_the_round_began() -> None:
    client = FakeClient()
    client.adapter = lora([[1.0, 0.0]], [[0.0], [0.0]])
    adjust = FedProx(TWO, EQUAL, mu=0.5).adjust(client)  # type: ignore[arg-type]
    parameters = {A: torch.nn.Parameter(torch.tensor([[3.0, -1.0]])), B: torch.nn.Parameter(torch.zeros(2, 1))}
    parameters[A].grad = torch.tensor([[10.0, 20.0]])
    with torch.no_grad():
        adjust(parameters)
    assert parameters[A].grad.tolist() == [[11.0, 19.5]]
    assert parameters[B].grad is None


def test_fedprox_has_its_fixed_point_where_gradient_and_pull_balance() -> None:
    # One client: a (w - b) + mu (w - w0) = 0 from w0 = 0 is w = a b / (a + mu).
    client = Quadratic(2.0, 3.0, steps=200)
    FedProx(TWO, EQUAL, "float32", mu=1.0).visit(client, 1, b"")  # type: ignore[arg-type]
    assert float(client.adapter[A]) == pytest.approx(2.0)


def test_ffa_freezes_a_and_its_mean_of_products_is_exact() -> None:
    algorithm = FfaLora(TWO, EQUAL, "float32")
    parameters = {A: torch.nn.Parameter(torch.ones(1, 2)), B: torch.nn.Parameter(torch.ones(2, 1))}
    parameters[A].grad, parameters[B].grad = torch.ones(1, 2), torch.ones(2, 1)
    algorithm.adjust(FakeClient())(parameters)  # type: ignore[arg-type]
    assert parameters[A].grad is None
    assert parameters[B].grad is not None
    common = [[1.0, 0.5]]
    clients = [FakeClient(lora(common, [[2.0], [0.0]]), 1), FakeClient(lora(common, [[4.0], [1.0]]), 3)]
    state = rounds(algorithm, clients, 1)
    assert set(state) == {B}
    message = GlobalAdapter(round_number=1, tensors=pack(state, "float32")).encode()
    algorithm.adopt(clients[0], 2, message)  # type: ignore[arg-type]
    expected = 0.25 * product(lora(common, [[2.0], [0.0]])) + 0.75 * product(lora(common, [[4.0], [1.0]]))
    assert torch.equal(product(clients[0].adapter), expected)


def test_flexlora_splits_the_mean_product_anew() -> None:
    mean = 0.25 * product(ONE) + 0.75 * product(OTHER)
    updates = [update(ONE, 1), update(OTHER, 3)]
    whole = unpack(FlexLora(TWO, (2, 1)).aggregate(b"", updates))
    torch.testing.assert_close(product(whole), mean)
    u, s, vh = torch.linalg.svd(mean)
    best = s[0] * u[:, :1] @ vh[:1]
    torch.testing.assert_close(product(FlexLora(TWO, (2, 1)).share(whole, 1)), best)
    torch.testing.assert_close(product(unpack(FlexLora(TWO, (1, 1)).aggregate(b"", updates))), best)


def test_hetlora_pads_weighs_by_norm_and_cuts() -> None:
    low = lora([[3.0, 0.0]], [[1.0], [0.0]])  # norm 3
    high = lora([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]])  # norm 1
    algorithm = HetLora(TWO, (1, 2))
    mean = unpack(algorithm.aggregate(b"", [update(low, 1), update(high, 100)]))
    assert mean[A].tolist() == [[2.25, 0.25], [0.25, 0.0]]
    assert mean[B].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert algorithm.share(mean, 1)[A].tolist() == [[2.25, 0.25]]
    zero = lora([[1.0, 0.0]], [[0.0], [0.0]])
    assert unpack(algorithm.aggregate(b"", [update(zero, 1), update(zero, 1)]))[A].tolist()[0] == [1.0, 0.0]


def test_clients_of_each_rank_are_sent_and_measured_by_rank() -> None:
    algorithm = HetLora(Cohort(num_clients=3, participation=1.0, seed=0), (1, 2, 1), "float32")
    low, high = lora([[3.0, 0.0]], [[1.0], [0.0]]), lora([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]])
    fleet = FakeFleet(algorithm, [FakeClient(low), FakeClient(high), FakeClient(low)])
    outcome = algorithm.run_round(1, b"", fleet, None, evaluate=True)  # type: ignore[arg-type]
    assert {client: unpack(GlobalAdapter.decode(sent).tensors)[A].shape[0] for client, sent in fleet.measured} == {
        0: 1,
        1: 2,
    }
    assert {c: e.nll_sum for c, e in outcome.evaluations.items() if e} == {0: 10.0, 1: 11.0, 2: 10.0}


def test_flora_adds_the_exact_weighted_sum_every_round() -> None:
    clients = [FakeClient(ONE, 1), FakeClient(OTHER, 3)]
    algorithm = Flora(TWO, EQUAL, "float32")
    state = algorithm.first_state()
    for round in (1, 2):
        fleet = FakeFleet(algorithm, clients)
        state = algorithm.run_round(round, state, fleet, None, evaluate=False).next_state  # type: ignore[arg-type]
    downlink = algorithm.downlinks(3, state, [1])[1]
    sent = unpack(GlobalAdapter.decode(downlink).tensors)
    assert {key.partition(".")[0] for key in sent} == {"1"}  # the other stack it has, and no byte of it is sent again
    algorithm.adopt(clients[1], 3, downlink)  # type: ignore[arg-type]
    mean = 0.25 * product(ONE) + 0.75 * product(OTHER)
    torch.testing.assert_close(product(clients[1].frozen), 2 * mean)
    assert product(clients[1].adapter).abs().sum() == 0
    assert clients[1].adapter[A][0, 0] == 3.0  # drawn anew, for round 3
    assert clients[1].frozen[A].shape[0] == 4


def test_flora_sends_a_client_that_was_away_what_it_missed() -> None:
    cohort = Cohort(num_clients=3, participation=0.34, seed=1)
    algorithm = Flora(cohort, (1, 1, 1), "float32")
    clients = [FakeClient(lora([[float(k + 1), 0.0]], [[1.0], [0.0]])) for k in range(3)]
    state = algorithm.first_state()
    sampled = [cohort.sample(round) for round in range(1, 7)]
    assert len({client for clients in sampled for client in clients}) > 1
    for round in range(1, 7):
        fleet = FakeFleet(algorithm, clients)
        state = algorithm.run_round(round, state, fleet, None, evaluate=False).next_state  # type: ignore[arg-type]
        if round == 1:  # nobody has seen the first stack yet, whether visited or not
            sent = [GlobalAdapter.decode(downlink) for downlink in algorithm.downlinks(2, state, range(3)).values()]
            assert len(sent) == 3
            assert {message.round_number for message in sent} == {1}
    everything = sum((product(clients[client].taught or {}) for (client,) in sampled), torch.zeros(2, 2))
    for client_id, client in enumerate(clients):
        algorithm.adopt(client, 7, algorithm.downlinks(7, state, [client_id])[client_id])  # type: ignore[arg-type]
        torch.testing.assert_close(product(client.frozen), everything)


class LossyFleet(FakeFleet):
    """Loses client 1 in some rounds: before it works, or its answer on the way."""

    def __init__(self, algorithm: Any, clients: Sequence[FakeClient], lost: Sequence[int], *, on_the_way: bool) -> None:
        super().__init__(algorithm, clients)
        self.lost_in, self.on_the_way = lost, on_the_way

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        away = round in self.lost_in
        asked = {c: d for c, d in downlinks.items() if not (away and c == 1 and not self.on_the_way)}
        for reply in super().visit(round, asked, evaluate=evaluate):
            if not (away and reply.client_id == 1):
                yield reply


@pytest.mark.parametrize("on_the_way", [False, True], ids=["before it works", "its answer on the way"])
@pytest.mark.parametrize("lost", [[1], [2], [1, 2]])
def test_flora_gives_every_stack_once_to_a_client_that_was_lost(lost: Sequence[int], on_the_way: bool) -> None:
    clients = [FakeClient(ONE, 1), FakeClient(OTHER, 3)]
    algorithm = Flora(TWO, EQUAL, "float32")
    fleet = LossyFleet(algorithm, clients, lost, on_the_way=on_the_way)
    state = algorithm.first_state()
    both, alone = 0.25 * product(ONE) + 0.75 * product(OTHER), product(ONE)
    for round in (1, 2, 3):
        state = algorithm.run_round(round, state, fleet, None, evaluate=False).next_state  # type: ignore[arg-type]
    expected = sum((alone if round in lost else both for round in (1, 2, 3)), torch.zeros(2, 2))
    for client_id, client in enumerate(clients):
        algorithm.adopt(client, 4, algorithm.downlinks(4, state, [client_id])[client_id])  # type: ignore[arg-type]
        torch.testing.assert_close(product(client.frozen), expected)


def model(client: FakeClient) -> torch.Tensor:
    """What a client's adapters add to its base weights."""
    return product(client.adapter) + (product(client.frozen) if client.frozen else 0.0)


class OfRankTwo(FakeClient):
    def fresh_adapter(self, round: int | None = None) -> Adapter:
        return {A: torch.zeros(2, 9), B: torch.zeros(8, 2)}


def test_fedex_goes_on_with_the_means_and_has_the_mean_of_the_products() -> None:
    clients = [FakeClient(ONE, 1), FakeClient(OTHER, 3)]
    algorithm = FedExLora(TWO, EQUAL, "float32")
    mean, of_products = {A: [[2.5, -1.0]], B: [[3.5], [0.75]]}, 0.25 * product(ONE) + 0.75 * product(OTHER)
    residual = of_products - product(lora(mean[A], mean[B]))
    state = algorithm.first_state()
    for round in (1, 2):
        fleet = FakeFleet(algorithm, clients)
        state = algorithm.run_round(round, state, fleet, None, evaluate=False).next_state  # type: ignore[arg-type]
        for client_id, client in enumerate(clients):
            algorithm.adopt(client, round + 1, algorithm.downlinks(round + 1, state, [client_id])[client_id])  # type: ignore[arg-type]
            assert {key: value.tolist() for key, value in client.adapter.items()} == mean
            torch.testing.assert_close(model(client), (round - 1) * residual + of_products)
            assert client.frozen[A].shape[0] == round  # one less than there are clients, each round


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fedex_loses_nothing_and_sends_the_least_rank(count: int) -> None:
    """Clients of rank 2, unequally many examples; one client alone has no residual, and no byte is sent for one."""
    drawn, weights = torch.Generator().manual_seed(0), [3, 1, 4, 5][:count]
    adapters = [{A: torch.randn(2, 9, generator=drawn), B: torch.randn(8, 2, generator=drawn)} for _ in weights]
    clients = [OfRankTwo(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    algorithm = FedExLora(Cohort(num_clients=count, participation=1.0, seed=0), (2,) * count, "float32")
    outcome = algorithm.run_round(1, b"", FakeFleet(algorithm, clients), None, evaluate=False)  # type: ignore[arg-type]
    [downlink] = algorithm.downlinks(2, outcome.next_state, [0]).values()
    algorithm.adopt(clients[0], 2, downlink)  # type: ignore[arg-type]
    mean = sum(weight * product(adapter) for adapter, weight in zip(adapters, weights, strict=True)) / sum(weights)
    torch.testing.assert_close(model(clients[0]), mean)
    sent = unpack(GlobalAdapter.decode(downlink).tensors)
    ranks = [value.shape[0] for key, value in sent.items() if "lora_A" in key]
    assert sorted(ranks) == sorted([2, 2 * (count - 1)] if count > 1 else [2])
    assert algorithm.received_rank(2, [(2,) * count]) == sum(ranks)
    residual = mean - product({key: sent[key] for key in (A, B)})
    assert torch.linalg.matrix_rank(residual, atol=1e-4) == 2 * (count - 1)


@pytest.mark.parametrize("on_the_way", [False, True], ids=["before it works", "its answer on the way"])
@pytest.mark.parametrize("lost", [[1], [2], [1, 2]])
def test_fedex_gives_every_residual_once_to_a_client_that_was_lost(lost: Sequence[int], on_the_way: bool) -> None:
    clients = [FakeClient(ONE, 1), FakeClient(OTHER, 3)]
    algorithm = FedExLora(TWO, EQUAL, "float32")
    fleet = LossyFleet(algorithm, clients, lost, on_the_way=on_the_way)
    state = algorithm.first_state()
    for round in (1, 2, 3):
        state = algorithm.run_round(round, state, fleet, None, evaluate=False).next_state  # type: ignore[arg-type]
    of_products, mean = 0.25 * product(ONE) + 0.75 * product(OTHER), lora([[2.5, -1.0]], [[3.5], [0.75]])
    expected = of_products + (2 - len(lost)) * (of_products - product(mean))
    for client_id, client in enumerate(clients):
        algorithm.adopt(client, 4, algorithm.downlinks(4, state, [client_id])[client_id])  # type: ignore[arg-type]
        torch.testing.assert_close(model(client), expected)


def test_fedsa_averages_a_and_leaves_each_client_its_b() -> None:
    clients = [FakeClient(ONE, 1), FakeClient(OTHER, 3)]
    algorithm = FedSaLora(TWO, EQUAL, "float32")
    fleet, state = FakeFleet(algorithm, clients), algorithm.first_state()
    for round in (1, 2):
        outcome = algorithm.run_round(round, state, fleet, None, evaluate=True)  # type: ignore[arg-type]
        state = outcome.next_state
        assert {key: value.tolist() for key, value in unpack(state).items()} == {A: [[2.5, -1.0]]}
        sent = [AdapterUpdate.decode(reply.uplink).tensors for reply in outcome.replies]
        sent += [GlobalAdapter.decode(downlink).tensors for _, downlink in fleet.measured]
        assert {key for tensors in sent for key in unpack(tensors)} == {A}
        # Each has a model of its own, and is measured with it.
        assert [client for client, _ in fleet.measured[-2:]] == [0, 1]
        assert {c: e.nll_sum for c, e in outcome.evaluations.items() if e} == {0: 10.0, 1: 11.0}
    for client, trained in zip(clients, (ONE, OTHER), strict=True):
        algorithm.adopt(client, 3, fleet.measured[-1][1])  # type: ignore[arg-type]
        assert client.adapter[A].tolist() == [[2.5, -1.0]]
        assert torch.equal(client.adapter[B], trained[B])


def test_fedsa_measures_who_took_part_and_a_lost_client_keeps_its_b() -> None:
    clients = [FakeClient(ONE, 1), FakeClient(OTHER, 3)]
    algorithm = FedSaLora(TWO, EQUAL, "float32")
    fleet, state = LossyFleet(algorithm, clients, [2], on_the_way=False), b""
    for measured in ([0, 1], [0], [0, 1]):
        round = len(clients[0].notes) + 1
        outcome = algorithm.run_round(round, state, fleet, None, evaluate=True)  # type: ignore[arg-type]
        assert sorted(outcome.evaluations) == measured
        state = outcome.next_state
        assert unpack(state)[A].tolist() == ([[2.5, -1.0]] if 1 in measured else ONE[A].tolist())
        algorithm.adopt(clients[1], round + 1, algorithm.downlinks(round + 1, state, [1])[1])  # type: ignore[arg-type]
        assert torch.equal(clients[1].adapter[A], unpack(state)[A])
        assert torch.equal(clients[1].adapter[B], OTHER[B])
    # Who has never taken part has the common A, and a B of 0.
    algorithm.adopt(newcomer := FakeClient(), 4, algorithm.downlinks(4, state, [0])[0])  # type: ignore[arg-type]
    assert newcomer.adapter[A].tolist() == [[2.5, -1.0]]
    assert not newcomer.adapter[B].any()


COMMON = [[1.0, 0.5]]
LOSSY: dict[str, tuple[Any, Adapter, Adapter]] = {
    "fedavg": (FedAvgLora(TWO, EQUAL, "float32"), ONE, OTHER),
    "fedprox": (FedProx(TWO, EQUAL, "float32", mu=0.0), ONE, OTHER),
    "ffa": (FfaLora(TWO, EQUAL, "float32"), lora(COMMON, [[2.0], [0.0]]), lora(COMMON, [[4.0], [1.0]])),
    "flexlora": (FlexLora(TWO, (2, 2), "float32"), with_rank(ONE, 2), with_rank(OTHER, 2)),
    "one shot": (OneShotFedAvgLora(TWO, EQUAL, "float32", num_rounds=2), ONE, OTHER),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_client_lost_in_one_round_and_back_in_the_next(name: str) -> None:
    """Without client 1 the average is client 0's; with it again, the weighted mean of both."""
    algorithm, one, other = LOSSY[name]
    clients = [FakeClient(one, 1), FakeClient(other, 3)]
    fleet = LossyFleet(algorithm, clients, [1], on_the_way=False)
    first = algorithm.run_round(1, algorithm.first_state(), fleet, None, evaluate=False)
    assert [reply.client_id for reply in first.replies] == [0]
    if name != "one shot":
        torch.testing.assert_close(served(algorithm, first.next_state), product(one))
    second = algorithm.run_round(2, first.next_state, fleet, None, evaluate=False)
    assert [reply.client_id for reply in second.replies] == [0, 1]
    mean = {key: 0.25 * one[key] + 0.75 * other[key] for key in one}
    of_products = 0.25 * product(one) + 0.75 * product(other)
    torch.testing.assert_close(
        served(algorithm, second.next_state), of_products if name == "flexlora" else product(mean)
    )


def served(algorithm: Any, state: bytes) -> torch.Tensor:
    """Product of what a client adopts of a state."""
    client = FakeClient(with_rank(ONE, algorithm.ranks[0]))
    algorithm.adopt(client, 3, algorithm.downlinks(3, state, [0])[0])
    return product(client.adapter)


def test_hetlora_without_a_lost_client_is_the_norm_weighted_mean_of_the_others() -> None:
    algorithm = HetLora(TWO, EQUAL, "float32")
    clients = [FakeClient(ONE), FakeClient(OTHER)]
    fleet = LossyFleet(algorithm, clients, [1], on_the_way=False)
    first = algorithm.run_round(1, b"", fleet, None, evaluate=False).next_state  # type: ignore[arg-type]
    torch.testing.assert_close(unpack(first), ONE)
    second = unpack(algorithm.run_round(2, first, fleet, None, evaluate=False).next_state)  # type: ignore[arg-type]
    norms = [float(product(ONE).norm()), float(product(OTHER).norm())]
    for key in ONE:
        torch.testing.assert_close(second[key], (norms[0] * ONE[key] + norms[1] * OTHER[key]) / sum(norms))


def test_scaffold_keeps_c_the_mean_of_c_k_when_a_client_is_lost_and_comes_back() -> None:
    algorithm = Scaffold(TWO, EQUAL, "float32")
    clients = [Quadratic(1.0, -1.0), Quadratic(4.0, 2.0)]
    fleet = LossyFleet(algorithm, clients, [2], on_the_way=False)
    state = algorithm.first_state()
    for round in (1, 2, 3):
        state = algorithm.run_round(round, state, fleet, None, evaluate=False).next_state  # type: ignore[arg-type]
        own = [float(client.memory["own." + A]) for client in clients]
        assert float(unpack(state)["control." + A]) == pytest.approx(sum(own) / 2, rel=1e-5)


def test_what_is_averaged_does_not_depend_on_who_is_called_what() -> None:
    """Sums of floats depend on their order: three updates, under all names, have one mean to the last bit."""
    drawn = torch.Generator().manual_seed(0)
    adapters = [{A: torch.randn(1, 2, generator=drawn), B: torch.randn(2, 1, generator=drawn)} for _ in range(3)]
    cohort = Cohort(num_clients=3, participation=1.0, seed=0)
    for kind in (FedAvgLora, FlexLora, HetLora, Flora, FedAvgM, FedAdam, FedExLora, FedSaLora):
        algorithm = kind(cohort, (1, 1, 1), "float32")
        states = set()
        for order in itertools.permutations(range(3)):
            fleet = FakeFleet(algorithm, [FakeClient(adapters[index], index + 1) for index in order])
            outcome = algorithm.run_round(1, b"", fleet, None, evaluate=False)  # type: ignore[arg-type]
            states.add(algorithm.downlinks(2, outcome.next_state, [0])[0])
        assert len(states) == 1


def test_an_average_that_overflows_its_type_on_the_wire_ends_the_run_with_the_setting_to_change() -> None:
    algorithm = FedAvgLora(TWO, EQUAL, "float16")
    state = pack(lora([[70000.0, 0.0]], [[1.0], [0.0]]), "float32")
    with pytest.raises(ConfigError, match=r"what the server sends: .*algorithm\.weight_dtype to bfloat16 or float32"):
        algorithm.downlinks(2, state, [0])


FULL = shapes_of(ONE)
CONTROLS = {"control." + key: shape for key, shape in FULL.items()}
CROSSING = [
    (FedAvgLora(TWO, (1, 2)), FULL),
    (FedProx(TWO, (1, 2)), FULL),
    (OneShotFedAvgLora(TWO, (1, 2)), FULL),
    (FfaLora(TWO, (1, 2)), {B: FULL[B]}),
    (Scaffold(TWO, (1, 2)), FULL | CONTROLS),
    (Flora(TWO, (1, 2)), FULL),
    (FlexLora(TWO, (1, 2)), FULL),
    (HetLora(TWO, (1, 2)), FULL),
    (FedAvgM(TWO, (1, 2)), FULL),
    (FedAdam(TWO, (1, 2)), FULL),
    (FedExLora(TWO, (1, 2)), FULL),
    (FedSaLora(TWO, (1, 2)), {A: FULL[A]}),
]


def some(shapes: Shapes) -> Adapter:
    return {key: torch.ones(shape) for key, shape in shapes.items()}


def wrong(right: Shapes) -> Iterator[tuple[Adapter, str]]:
    """Adapters that are not of these shapes, or not of numbers, and the tensor that shows it."""
    for key, shape in right.items():
        yield {name: value for name, value in some(right).items() if name != key}, "missing"
        yield some({**right, key: (shape[0] + 1, *shape[1:])}), key
        yield some({**right, key: (1, *shape)}), key
        yield some({**right, key: ()}), key
        for value in (math.nan, math.inf):
            yield {**some(right), key: torch.full(shape, value)}, f"{key} is not finite"
    yield some({**right, "other.lora_A.weight": (1, 2)}), "other"
    yield {}, "missing"


@pytest.mark.parametrize(("algorithm", "crossing"), CROSSING, ids=lambda value: type(value).__name__)
def test_an_update_holds_what_a_client_of_its_rank_trains(algorithm: FedAvgLora, crossing: Shapes) -> None:
    fleet = FakeFleet(algorithm, [])
    for client_id, rank in enumerate((1, 2)):
        right = shapes_at(crossing, rank)
        reply = fleet.reply(client_id, 1, update(some(right), 5, client_id).encode("zstd"), None)
        assert algorithm.received(reply, FULL).num_examples == 5
        for tensors, says in [*wrong(right), (some(shapes_at(crossing, 3)), "not")]:
            reply = fleet.reply(client_id, 1, update(tensors, 5, client_id).encode("zstd"), None)
            with pytest.raises(MessageError, match=f"^client {client_id}, round 1: tensors: .*{re.escape(says)}"):
                algorithm.received(reply, FULL)


@pytest.mark.parametrize("says", [{"client_id": 1}, {"round_number": 2}])
def test_an_update_that_says_it_is_anothers_is_refused(says: dict[str, int]) -> None:
    algorithm = FedAvgLora(TWO, EQUAL)
    uplink = structs.replace(update(ONE, 1), **says).encode()
    with pytest.raises(MessageError, match=r"^client 0, round 1: AdapterUpdate: says that it is"):
        algorithm.received(FakeFleet(algorithm, []).reply(0, 1, uplink, None), FULL)


@pytest.mark.parametrize(
    ("algorithm", "crossing"),
    [pair for pair in CROSSING if not isinstance(pair[0], Flora)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_adopted_is_what_the_client_has_a_place_for(algorithm: FedAvgLora, crossing: Shapes) -> None:
    def adopt(tensors: Adapter, round_number: int = 1) -> None:
        message = GlobalAdapter(round_number=round_number, tensors=packed(tensors))
        algorithm.adopt(FakeClient(), 2, message.encode())  # type: ignore[arg-type]

    adopt(some(crossing))
    for tensors, says in wrong(crossing):
        with pytest.raises(MessageError, match=re.escape(says)):
            adopt(tensors)
    with pytest.raises(MessageError, match="GlobalAdapter: of round 2, sent in round 2"):
        adopt(some(crossing), round_number=2)
    with pytest.raises(MessageError, match="GlobalAdapter"):
        algorithm.adopt(FakeClient(), 2, b"nonsense")  # type: ignore[arg-type]


def test_floras_stacks_have_any_rank_and_follow_on_what_the_client_has() -> None:
    algorithm = Flora(TWO, EQUAL, "float32")

    def adopt(client: FakeClient, stacks: Mapping[str, Adapter], round: int = 3) -> None:
        tensors = {f"{number}.{key}": tensor for number, stack in stacks.items() for key, tensor in stack.items()}
        message = GlobalAdapter(round_number=2, tensors=packed(tensors))
        algorithm.adopt(client, round, message.encode())  # type: ignore[arg-type]

    right, client = some(shapes_at(FULL, 7)), FakeClient()
    adopt(client, {"0": right})
    adopt(client, {"0": right, "1": some(FULL)})
    assert client.frozen[A].shape == (8, 2)
    assert int(client.memory["stacks"]) == 2
    for stack in [
        *(each for each, _ in wrong(FULL) if each),
        some({A: (3, 2), B: (2, 2)}),
        some({A: (0, 2), B: (2, 0)}),
    ]:
        with pytest.raises(MessageError, match="tensors: "):
            adopt(FakeClient(), {"0": stack})
    for numbers, says in (
        (["1"], "stacks from number 1 on, but the client has only 0"),
        (["0", "2"], "do not follow each other"),
        (["x"], "has no number of a stack"),
        (["-1"], "has no number of a stack"),
        (["9" * 5000], "has no number of a stack"),
        ([""], "has no number of a stack"),
        (["\u00b2"], "has no number of a stack"),
    ):
        with pytest.raises(MessageError, match=says):
            adopt(FakeClient(), dict.fromkeys(numbers, right))
    with pytest.raises(MessageError, match="GlobalAdapter: of round 2, sent in round 2"):
        adopt(FakeClient(), {"0": right}, round=2)


def test_fedexs_residuals_come_with_the_means_of_the_clients_own_shapes() -> None:
    algorithm = FedExLora(TWO, EQUAL, "float32")

    def adopt(client: FakeClient, tensors: Adapter) -> None:
        algorithm.adopt(client, 2, GlobalAdapter(round_number=1, tensors=packed(tensors)).encode())  # type: ignore[arg-type]

    residual = {f"0.{key}": tensor for key, tensor in some(shapes_at(FULL, 7)).items()}
    adopt(client := FakeClient(), {**some(FULL), **residual})
    assert (client.adapter[A].shape, client.frozen[A].shape) == ((1, 2), (7, 2))
    for tensors, says in wrong(FULL):
        with pytest.raises(MessageError, match=f"tensors: .*{re.escape(says)}"):
            adopt(FakeClient(), {**tensors, **residual})
    for broken in ({f"1{key[1:]}": tensor for key, tensor in residual.items()}, {f"0.{A}": residual[f"0.{A}"]}):
        with pytest.raises(MessageError, match=r"tensors: "):
            adopt(FakeClient(), {**some(FULL), **broken})


def test_who_sends_no_update_is_left_out_of_the_average() -> None:
    class Garbled(FakeFleet):
        def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
            for reply in super().visit(round, downlinks, evaluate=evaluate):
                yield structs.replace(reply, uplink=b"nonsense") if reply.client_id == 1 else reply

        def leave_out(self, round: int, reasons: Mapping[int, str]) -> None:
            self.left_out = (round, dict(reasons))

    for kind in (FedAvgLora, FlexLora, HetLora, Scaffold):
        algorithm = kind(TWO, EQUAL, "float32")
        fleet = Garbled(algorithm, [FakeClient(ONE) if kind is not Scaffold else Quadratic(1.0, 1.0) for _ in range(2)])
        outcome = algorithm.run_round(1, b"", fleet, None, evaluate=False)  # type: ignore[arg-type]
        assert fleet.left_out == (1, {1: "client 1, round 1: AdapterUpdate: unknown framing byte b'n'"})
        assert [reply.client_id for reply in outcome.replies] == [0, 1]
        if kind is FedAvgLora:
            torch.testing.assert_close(unpack(outcome.next_state), ONE)


def test_one_shot_trains_apart_and_averages_once() -> None:
    clients = [FakeClient(ONE, 1), FakeClient(OTHER, 3)]
    algorithm = OneShotFedAvgLora(TWO, EQUAL, "float32", num_rounds=2)
    fleet = FakeFleet(algorithm, clients)
    first = algorithm.run_round(1, b"", fleet, None, evaluate=True)  # type: ignore[arg-type]
    assert [reply.uplink for reply in first.replies] == [b"", b""]
    assert {c: e.nll_sum for c, e in first.evaluations.items() if e} == {0: 0.0, 1: 1.0}
    assert first.next_state == b""
    second = algorithm.run_round(2, first.next_state, fleet, None, evaluate=True)  # type: ignore[arg-type]
    assert unpack(second.next_state)[A].tolist() == [[2.5, -1.0]]
    assert len(fleet.measured) == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("compression", "framing"), [("none", PLAIN), ("zstd", ZSTD)])
def test_weights_cross_in_the_type_and_compression_of_the_settings(
    dtype: str, compression: str, framing: bytes
) -> None:
    """Both ways, for every algorithm whose clients send an adapter; the server keeps float32."""
    plain = {FedAvgLora: {}, OneShotFedAvgLora: {"num_rounds": 1}, FedProx: {}, FedSaLora: {}}
    for kind, more in (plain | {Flora: {}, FedExLora: {}, FedAvgM: {}, FedAdam: {}}).items():
        clients = [FakeClient(ONE), FakeClient(OTHER)]
        algorithm = kind(TWO, EQUAL, dtype, compression, **more)
        fleet = FakeFleet(algorithm, clients)
        outcome = algorithm.run_round(1, algorithm.first_state(), fleet, None, evaluate=False)  # type: ignore[arg-type]
        [downlink] = algorithm.downlinks(2, outcome.next_state, [0]).values()
        for sent, message in ((outcome.replies[0].uplink, AdapterUpdate), (downlink, GlobalAdapter)):
            assert sent[:1] == framing
            tensors = load(message.decode(sent).tensors)
            assert {str(value.dtype) for value in tensors.values()} == {f"torch.{dtype}"}
        if kind in plain:
            assert {value.dtype for value in load(outcome.next_state).values()} == {torch.float32}


def test_centralized_trains_client_0_for_all() -> None:
    clients = [FakeClient(), FakeClient()]
    algorithm = Centralized(TWO)
    outcome = algorithm.run_round(1, b"", FakeFleet(algorithm, clients), None, evaluate=True)  # type: ignore[arg-type]
    assert [reply.client_id for reply in outcome.replies] == [0]
    assert {c: e.nll_sum for c, e in outcome.evaluations.items() if e} == {0: 0.0, 1: 0.0}
    assert clients[1].notes == []
    assert outcome.next_state == b""


LATE = Cohort(num_clients=4, participation=1.0, seed=0, hears_late=True)


@pytest.mark.parametrize("kind", [FedAvgLora, FedProx, HetLora])
def test_where_late_updates_count_the_average_moves_by_their_share_and_age(kind: type[FedAvgLora]) -> None:
    algorithm = kind(LATE, (1,) * 4, dtype="float32")
    fleet = FakeFleet(algorithm, [FakeClient()])
    before = pack(ONE, "float32")
    # Of four that are asked two are heard, one of this round, 5, and one of round 2: (1 + 1 / sqrt(4)) / 4.
    updates = [update(OTHER, 1, 0, round=5), update(OTHER, 3, 1, round=2)]
    after = unpack(algorithm.towards(5, before, updates, fleet))
    for key in (A, B):
        torch.testing.assert_close(after[key], 0.625 * ONE[key] + 0.375 * OTHER[key])


def test_where_all_are_heard_in_time_it_is_the_mean() -> None:
    algorithm = FedAvgLora(LATE, (1,) * 4, dtype="float32")
    updates = [update(OTHER if client else ONE, 1, client, round=2) for client in range(4)]
    after = unpack(algorithm.towards(2, pack(ONE, "float32"), updates, FakeFleet(algorithm, [FakeClient()])))
    torch.testing.assert_close(after[A], (ONE[A] + 3 * OTHER[A]) / 4)


def test_before_there_is_an_average_it_moves_from_the_adapter_from_which_all_start() -> None:
    algorithm = FedAvgLora(LATE, (1,) * 4, dtype="float32")
    fleet = FakeFleet(algorithm, [FakeClient()])
    after = unpack(algorithm.towards(1, b"", [update(OTHER, 1, round=1)], fleet))
    torch.testing.assert_close(after[B], 0.25 * OTHER[B])  # B is zero at first
    torch.testing.assert_close(after[A], 0.75 * fleet.first_adapter[A] + 0.25 * OTHER[A])
    assert algorithm.towards(7, b"as it was", [], fleet) == b"as it was"


@pytest.mark.parametrize(
    "kind", [Flora, FedExLora, FlexLora, FedSaLora, Scaffold, FedAvgM, FedAdam, OneShotFedAvgLora]
)
def test_what_is_defined_by_a_round_of_equals_hears_nobody_late(kind: type[FedAvgLora]) -> None:
    assert not kind.can_hear_late
    assert FedAvgLora.can_hear_late
    assert SemanticConsensus.can_hear_late
