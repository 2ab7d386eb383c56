"""The round itself, with clients and a server that only take notes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from semcons_ray.config import AlgorithmConfig
from semcons_ray.errors import ClientError, QuorumError, UserError
from semcons_ray.federation.algorithms import build_algorithm
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
from semcons_ray.federation.algorithms.local_only import LocalOnly
from semcons_ray.federation.algorithms.logit_exchange import LogitExchange
from semcons_ray.federation.algorithms.one_shot_fedavg_lora import OneShotFedAvgLora
from semcons_ray.federation.algorithms.scaffold import Scaffold
from semcons_ray.federation.algorithms.semantic_consensus import SemanticConsensus
from semcons_ray.federation.fleet import NO_OTHERS, LocalFleet, Reply
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.server import ServerState
from semcons_ray.messages import NO_LABELS, PseudoLabels
from semcons_ray.metering.ledger import Place
from semcons_ray.parts import BUILT_IN

LABELS = PseudoLabels(round_number=1, prompt_ids=(0, 2), responses=("x", "y"))
STATE = ServerState(b"labels", b"earlier").encode()
COHORT = Cohort(num_clients=3, participation=1.0, seed=0)


class Notes:
    def __init__(self, refused: Mapping[int, str] | None = None) -> None:
        self.taken: list[Any] = []
        self.refused = refused or {}

    # as a client
    def fine_tune(self, round: int, labels: PseudoLabels, **more: Any) -> None:
        self.taken.append(("fine_tune", round, labels, more))

    def answer(self, round: int, compression: str) -> bytes:
        self.taken.append(("answer", round, compression))
        return b"answers"

    # as a server
    def begin(self, round: int, client_ids: Sequence[int], kept: bytes = b"") -> None:
        self.taken.append(("begin", round, tuple(client_ids), kept))

    def collect(self, client_id: int, uplink: bytes, asked_in: int | None = None) -> None:
        self.taken.append(("collect", client_id, uplink))

    def conclude(self) -> Any:
        self.taken.append("conclude")
        return type("Verdict", (), {"labels": LABELS, "kept": b"trust", "refused": self.refused})()


def reply(client_id: int, round: int = 1) -> Reply:
    return Reply(
        client_id=client_id,
        round=round,
        uplink=b"from %d" % client_id,
        train_loss=0.0,
        num_private=1,
        num_pseudo_labels=0,
        evaluation=None,
        rows=(),
    )


class Backwards:
    """A fleet whose clients answer last first."""

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        self.asked = (round, dict(downlinks), evaluate)
        yield from (reply(client, round) for client in reversed(list(downlinks)))

    def leave_out(self, round: int, reasons: Mapping[int, str]) -> None:
        self.left_out = (round, reasons)


def test_a_client_trains_on_the_labels_it_is_sent_and_then_answers() -> None:
    client = Notes()
    downlink = LABELS.encode("zstd")
    algorithm = SemanticConsensus(COHORT, 0.5, "zstd", exchanges=range(1, 4), ema_decay=0.25)
    assert algorithm.visit(client, 2, downlink) == b"answers"  # type: ignore[arg-type]
    assert client.taken == [
        ("fine_tune", 2, LABELS, {"weight": 0.5, "ema_decay": 0.25, "downlink_bytes": len(downlink)}),
        ("answer", 2, "zstd"),
    ]


def test_a_round_collects_as_answers_come_and_hands_out_the_consensus() -> None:
    fleet, server = Backwards(), Notes()
    outcome = SemanticConsensus(COHORT).run_round(1, STATE, fleet, server, evaluate=True)  # type: ignore[arg-type]
    assert fleet.asked == (1, dict.fromkeys(range(3), b"labels"), True)
    assert server.taken == [
        ("begin", 1, (0, 1, 2), b"earlier"),
        ("collect", 2, b"from 2"),
        ("collect", 1, b"from 1"),
        ("collect", 0, b"from 0"),
        "conclude",
    ]
    assert [reply.client_id for reply in outcome.replies] == [0, 1, 2]
    assert ServerState.decode(outcome.next_state) == ServerState(LABELS.encode(), b"trust")


def test_who_sends_no_answers_is_left_out_of_the_round() -> None:
    fleet, server = Backwards(), Notes(refused={1: "no message"})
    outcome = SemanticConsensus(COHORT).run_round(1, STATE, fleet, server, evaluate=True)  # type: ignore[arg-type]
    assert fleet.left_out == (1, {1: "no message"})
    assert [reply.client_id for reply in outcome.replies] == [0, 1, 2]  # its work was done all the same
    assert sorted(outcome.evaluations) == [0, 2]


def test_before_the_first_exchange_clients_train_and_the_server_is_not_asked() -> None:
    client, fleet, server = Notes(), Backwards(), Notes()
    algorithm = SemanticConsensus(COHORT, exchanges=range(2, 4))
    state = algorithm.first_state()
    labels = NO_LABELS.encode()
    assert algorithm.visit(client, 1, labels) == b""  # type: ignore[arg-type]
    assert [note[0] for note in client.taken] == ["fine_tune"]
    assert algorithm.visit(client, 2, labels) == b"answers"  # type: ignore[arg-type]
    outcome = algorithm.run_round(1, state, fleet, server, evaluate=True)  # type: ignore[arg-type]
    assert fleet.asked == (1, dict.fromkeys(range(3), labels), True)
    assert server.taken == []
    assert [reply.client_id for reply in outcome.replies] == [0, 1, 2]
    assert (outcome.next_state, outcome.verdict) == (state, None)
    algorithm.run_round(2, state, fleet, server, evaluate=True)  # type: ignore[arg-type]
    assert server.taken[-1] == "conclude"


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_first_round_has_no_labels_and_each_further_one_those_of_the_last(compression: str) -> None:
    algorithm = SemanticConsensus(COHORT, compression=compression)
    first = algorithm.first_state()
    assert ServerState.decode(first) == ServerState(NO_LABELS.encode(compression))
    assert algorithm.downlinks(1, first, [2]) == {2: NO_LABELS.encode(compression)}
    outcome = algorithm.run_round(1, STATE, Backwards(), Notes(), evaluate=True)  # type: ignore[arg-type]
    assert algorithm.downlinks(2, outcome.next_state, [1, 2]) == dict.fromkeys([1, 2], LABELS.encode(compression))


def test_local_only_sends_nothing_either_way() -> None:
    client, fleet, server = Notes(), Backwards(), Notes()
    algorithm = LocalOnly(COHORT, 0.75)
    assert algorithm.first_state() == b""
    assert algorithm.visit(client, 1, b"") == b""  # type: ignore[arg-type]
    assert client.taken == [("fine_tune", 1, NO_LABELS, {"ema_decay": 0.75})]
    outcome = algorithm.run_round(1, b"", fleet, server, evaluate=False)  # type: ignore[arg-type]
    assert fleet.asked == (1, dict.fromkeys(range(3), b""), False)
    assert server.taken == []
    assert outcome.next_state == b""


def test_nobody_answers_in_the_last_round_since_nobody_would_learn_it() -> None:
    client, fleet, server = Notes(), Backwards(), Notes()
    algorithm = SemanticConsensus(COHORT, exchanges=range(1, 3))
    labels = LABELS.encode()
    assert algorithm.visit(client, 3, labels) == b""  # type: ignore[arg-type]
    assert [note[0] for note in client.taken] == ["fine_tune"]
    outcome = algorithm.run_round(3, STATE, fleet, server, evaluate=True)  # type: ignore[arg-type]
    assert server.taken == []
    assert (outcome.next_state, outcome.verdict) == (STATE, None)


@pytest.mark.parametrize(
    ("num_rounds", "first", "exchanges"),
    [(1, 3, [1]), (2, 3, [1]), (3, 3, [2]), (4, 3, [3]), (9, 3, [3, 4, 5, 6, 7, 8]), (3, 1, [1, 2]), (1, 1, [1])],
)
def test_every_exchange_has_a_round_to_be_learnt_in(num_rounds: int, first: int, exchanges: list[int]) -> None:
    settings = AlgorithmConfig(first_exchange=first)
    assert [*settings.exchanges(num_rounds)] == exchanges
    built = build_algorithm(settings, COHORT, (4, 4, 4), num_rounds)
    assert built == SemanticConsensus(COHORT, 1.0, "zstd", settings.exchanges(num_rounds), ema_decay=0.5)
    asked = AlgorithmConfig(first_exchange=first, answer_last_round=True).exchanges(num_rounds)
    assert [*asked] == [*range(exchanges[0], num_rounds + 1)]


def test_algorithms_are_built_by_name() -> None:
    common = {"compression": "none"}
    own = {
        "semantic_consensus": {"pseudo_label_weight": 0.25, "first_exchange": 3, "ema_decay": 0.75},
        "logit_exchange": {"pseudo_label_weight": 0.25, "first_exchange": 3, "options": {"top_k": "5"}},
        "local_only": {"ema_decay": 0.75},
        "centralized": {},
    }
    averaged = {"self_labels": True, "pseudo_label_weight": 0.25, "first_exchange": 3, "weight_dtype": "float32"}
    averaged_with = {"fedavgm": {"options": {"momentum": 0.5}}, "fedadam": {"options": {"tau": "1e-4", "beta1": 0}}}
    ranks = (4, 4, 4)
    built = {
        name: build_algorithm(
            AlgorithmConfig.model_validate(
                {
                    **common,
                    **own.get(name, averaged),
                    **averaged_with.get(name, {}),
                    "proximal_mu": 0.5,
                    "name": name,
                }
            ),
            COHORT,
            ranks,
            7,
        )
        for name in BUILT_IN["algorithm"]
    }
    averaging = (COHORT, ranks, "float32", "none", True, 0.25, range(3, 7))
    assert built == {
        "semantic_consensus": SemanticConsensus(COHORT, 0.25, "none", range(3, 7), 0.75),
        "logit_exchange": LogitExchange(COHORT, 0.25, "none", range(3, 7), 0.5, top_k=5),
        "local_only": LocalOnly(COHORT, 0.75),
        "centralized": Centralized(COHORT),
        "fedavg_lora": FedAvgLora(*averaging),
        "one_shot_fedavg_lora": OneShotFedAvgLora(*averaging, num_rounds=7),
        "fedprox": FedProx(*averaging, mu=0.5),
        "scaffold": Scaffold(*averaging),
        "ffa_lora": FfaLora(*averaging),
        "flora": Flora(*averaging),
        "flexlora": FlexLora(*averaging),
        "hetlora": HetLora(*averaging),
        "fedavgm": FedAvgM(*averaging, momentum=0.5),
        "fedadam": FedAdam(*averaging, tau=1e-4, beta1=0.0),
        "fedex_lora": FedExLora(*averaging),
        "fedsa_lora": FedSaLora(*averaging),
    }
    assert isinstance(built["fedadam"].tau, float)  # from text, as a command line gives it
    own_answers = build_algorithm(AlgorithmConfig(rule="own_answer"), COHORT, ranks, 3)
    assert own_answers == SemanticConsensus(COHORT, 1.0, "zstd", range(2, 3), 0.5, self_training=True)


@pytest.mark.parametrize("name", BUILT_IN["algorithm"])
def test_only_those_that_leave_each_client_its_own_model_have_a_moving_average(name: str) -> None:
    expected = 0.5 if name in ("semantic_consensus", "logit_exchange", "local_only") else 0.0
    assert AlgorithmConfig(name=name).moving_average == expected
    assert getattr(build_algorithm(AlgorithmConfig(name=name), COHORT, (4,) * 3, 3), "ema_decay", 0.0) == expected


class Host:
    def __init__(self, failing: Mapping[int, Exception]) -> None:
        self.failing = failing
        self.asked: list[tuple[int, ...]] = []

    def visit(
        self, client_id: int, round: int, downlink: bytes, evaluate: bool, beside: Mapping[int, bytes] = NO_OTHERS
    ) -> Reply:
        self.asked.append((client_id, *beside))
        if client_id in self.failing:
            raise self.failing[client_id]
        return reply(client_id, round)

    def measure(self, client_id: int, round: int, downlink: bytes) -> Reply:
        raise NotImplementedError

    def export_adapter(self, client_id: int, round: int, downlink: bytes, folder: Any) -> None:
        raise NotImplementedError


def local_fleet(failing: Mapping[int, Exception], quorum: float) -> LocalFleet:
    return LocalFleet({"worker-0": Host(failing)}, {"worker-0": range(4)}, place=Place("n"), quorum=quorum)


def visited(fleet: LocalFleet) -> list[int]:
    return [reply.client_id for reply in fleet.visit(1, dict.fromkeys(range(4), b""), evaluate=False)]


def test_clients_of_a_host_are_asked_in_groups_that_train_together() -> None:
    hosts = {"worker-0": Host({}), "worker-1": Host({})}
    clients = {"worker-0": range(4), "worker-1": range(4, 6)}
    fleet = LocalFleet(hosts, clients, place=Place("n"), quorum=1.0, train_together=3)
    downlinks = dict.fromkeys((0, 1, 4, 3, 2, 5), b"")
    assert [reply.client_id for reply in fleet.visit(1, downlinks, evaluate=False)] == [*downlinks]
    assert hosts["worker-0"].asked == [(0, 1, 3), (1,), (3,), (2,)]
    assert hosts["worker-1"].asked == [(4, 5), (5,)]


def test_a_failed_client_is_left_out_while_the_quorum_holds() -> None:
    fleet = local_fleet({2: ClientError("ill")}, quorum=0.75)
    assert visited(fleet) == [0, 1, 3]
    assert fleet.lost == {2: "ill"}


def test_without_its_quorum_a_round_does_not_count() -> None:
    failing = {1: ClientError("ill"), 2: ClientError("asleep")}
    with pytest.raises(QuorumError, match=r"2 of 4 clients answered.*client 1: ill; client 2: asleep"):
        visited(local_fleet(failing, quorum=0.75))


def test_a_client_that_is_left_out_later_counts_for_the_quorum_as_well() -> None:
    fleet = local_fleet({2: ClientError("ill")}, quorum=0.5)
    assert visited(fleet) == [0, 1, 3]
    fleet.leave_out(1, {3: "no message"})
    assert fleet.lost == {2: "ill", 3: "no message"}
    with pytest.raises(
        QuorumError, match=r"1 of 4 clients answered.*client 0: no message; client 2: ill; client 3: no"
    ):
        fleet.leave_out(1, {0: "no message"})


def test_nobody_is_no_quorum_even_if_none_is_asked_for() -> None:
    with pytest.raises(QuorumError):
        visited(local_fleet(dict.fromkeys(range(4), ClientError("gone")), quorum=0.0))


def test_what_the_user_must_mend_ends_the_run_at_once() -> None:
    with pytest.raises(UserError, match="mend me"):
        visited(local_fleet({0: UserError("mend me")}, quorum=0.0))
