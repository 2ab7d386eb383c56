"""The exchange of token probabilities: clients of the tiny model, and what the server makes of their messages."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig
from semcons_ray.data.examples import Example
from semcons_ray.errors import MessageError, QuorumError
from semcons_ray.federation.adapter_model import AdapterModel
from semcons_ray.federation.algorithms.logit_exchange import LogitExchange
from semcons_ray.federation.client import Client, Duties
from semcons_ray.federation.fleet import Reply
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.token_probabilities import TokenProbabilities
from semcons_ray.messages import NO_LABELS, NO_TARGETS, PseudoLabels, TokenScores, TokenTargets
from semcons_ray.metering.ledger import Ledger
from semcons_ray.modeling.language_model import LanguageModel, Pair
from tests.federation.rows import work

PROMPTS = ("add one and six", "spell two")
TOKENS = np.arange(3, dtype=np.uint32).tobytes()
THREE = np.full(3, 0.125, np.float16).tobytes()
COHORT = Cohort(num_clients=3, participation=1.0, seed=0)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LanguageModel:
    return LanguageModel(str(tiny_llama), lora=LoraConfig(rank=4), dtype="float32", device="cpu", max_length=64)


def client_of(model: LanguageModel, client_id: int = 0, *, num_private: int = 4, **training: Any) -> Client:
    ledger = Ledger("worker-0", "here")
    words = ("two", "three", "four", "five")[:num_private]
    settings = TrainingConfig.model_validate({"learning_rate": 1e-2, "batch_size": 2, **training})
    return Client(
        client_id,
        [Example(f"add one and {word}", f"it is {word} {client_id}", "add") for word in words],
        generation=GenerationConfig(max_new_tokens=4),
        duties=Duties(prompts=PROMPTS, test=(), num_answers=0, seed=0),
        model=AdapterModel(client_id, model, rank=4, training=settings, batch_size=32, seed=0, ledger=ledger),
        ledger=ledger,
    )


class Visits:
    """A fleet of three clients, the messages of some of which are lost or forged."""

    def __init__(self, clients: Mapping[int, Client], algorithm: LogitExchange, forged: Mapping[int, bytes]) -> None:
        self.clients, self.algorithm, self.forged = clients, algorithm, forged
        self.refused: Mapping[int, str] = {}

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        for client_id, downlink in reversed(downlinks.items()):
            uplink = self.algorithm.visit(self.clients[client_id], round, downlink)
            yield Reply(client_id, round, self.forged.get(client_id, uplink), 0.0, 4, 0, None, ())

    def leave_out(self, round: int, reasons: Mapping[int, str]) -> None:
        self.refused = reasons
        if len(reasons) == len(self.clients):
            raise QuorumError("; ".join(reasons.values()))


def run(model: LanguageModel, rounds: int = 2, forged: Mapping[int, bytes] | None = None, **more: Any) -> Any:
    algorithm = LogitExchange(COHORT, exchanges=range(1, rounds), **{"top_k": 3, **more})
    fleet = Visits({client: client_of(model, client) for client in range(3)}, algorithm, forged or {})
    state, states = algorithm.first_state(), []
    for round in range(1, rounds + 1):
        outcome = algorithm.run_round(round, state, fleet, None, evaluate=True)  # type: ignore[arg-type]
        state = outcome.next_state
        states.append(state)
    return fleet, states, outcome


def test_a_round_by_its_messages(model: LanguageModel) -> None:
    fleet, (state, unchanged), outcome = run(model)
    targets = TokenTargets.decode(state)
    assert (targets.round_number, len(targets.answers)) == (1, 2)
    assert unchanged == state  # nobody sends in the last round
    assert [reply.client_id for reply in outcome.replies] == [0, 1, 2]
    assert {client.num_pseudo_labels for client in fleet.clients.values()} == {2}
    rows = {row.stage: row for row in fleet.clients[0].ledger.take()}
    assert rows["fine_tune"].downlink_bytes == len(state)


def test_what_is_sent_is_what_plain_transformers_finds_likely(model: LanguageModel) -> None:
    client = client_of(model)
    client.fine_tune(1, NO_LABELS)
    client.ledger.take()
    sent = client.token_scores(2, 3, "zstd")
    message = TokenScores.decode(sent)
    found = TokenProbabilities.unpacked(message.answers, message.tokens, message.probabilities, 3)
    with model.holding(client.adapter) as plain:
        for prompt, answer, tokens, chances in zip(
            PROMPTS, found.answers, found.tokens, found.probabilities, strict=True
        ):
            ids = [*model.chat.prompt_ids(prompt), *answer]
            logits = plain(input_ids=torch.tensor([ids])).logits[0, -len(answer) - 1 : -1]
            expected = logits.softmax(dim=1).topk(3)
            assert tokens.tolist() == expected.indices.tolist()
            np.testing.assert_allclose(chances, expected.values, atol=1e-3)
            assert tokens[0, 0] == answer[0]  # greedy, though generation.temperature is 1
            assert len(answer) <= 4
    assert message.encode("zstd") == sent
    assert message.encode("none") != sent
    rows = client.ledger.take()
    assert [row.client_id for row in rows] == [0]
    ((*_, tokens_read, uplink_bytes),) = work(rows, "tokens", "uplink_bytes")
    assert uplink_bytes == len(sent)
    assert tokens_read > sum(map(len, message.answers))


def test_the_loss_is_the_cross_entropy_with_the_targets(model: LanguageModel) -> None:
    """One step on one prompt: -sum p log q at each place, by hand from the logits of the model before the step."""
    client = client_of(model, num_private=0, local_steps=1)
    answer = (7, 20)
    targets = TokenProbabilities(
        ((7, 20),) * 2,
        (np.array([[7, 30], [20, 31]], np.uint32),) * 2,
        (np.array([[0.75, 0.25], [0.25, 0.25]], np.float16),) * 2,  # the last of which are made to add up to 1
    )
    expected = 0.0
    with model.holding(client.adapter) as plain:
        for prompt in PROMPTS:
            ids = [*model.chat.prompt_ids(prompt), *answer]
            logs = plain(input_ids=torch.tensor([ids])).logits[0, -3:-1].log_softmax(dim=1)
            expected -= float(0.75 * logs[0, 7] + 0.25 * logs[0, 30] + 0.5 * logs[1, 20] + 0.5 * logs[1, 31]) / 4
    client.distil(2, targets)
    assert client.train_loss == pytest.approx(expected, rel=1e-5)
    assert client.num_pseudo_labels == 2


def test_certain_targets_are_learnt_as_the_answer_itself_is(model: LanguageModel) -> None:
    """Private examples in the same batch, which are learnt as they are, and the same weight."""
    one, other = (client_of(model, local_epochs=2, batch_size=6) for _ in range(2))  # all in one step
    texts = ("it is 3", "t w o")
    ids = tuple(tuple(model.response_ids(*pair)) for pair in zip(PROMPTS, texts, strict=True))
    one.generation = GenerationConfig(max_new_tokens=16)
    certain = TokenProbabilities(
        ids,
        tuple(np.array([[token, 0] for token in answer], np.uint32) for answer in ids),
        tuple(np.array([[1, 0]] * len(answer), np.float16) for answer in ids),
    )
    one.distil(2, certain, weight=0.5)
    labels = PseudoLabels(round_number=1, prompt_ids=(0, 1), responses=texts)
    other.fine_tune(2, labels, weight=0.5)
    assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)
    for key, value in one.adapter.items():
        torch.testing.assert_close(value, other.adapter[key], rtol=1e-3, atol=1e-4)
    other.restore({})
    other.fine_tune(2, NO_LABELS)
    assert any(not torch.allclose(value, other.adapter[key], atol=1e-4) for key, value in one.adapter.items())


def test_who_is_taught_what_it_holds_already_has_nothing_to_learn(model: LanguageModel) -> None:
    """With all tokens of the vocabulary, the gradient of the cross-entropy with one's own distribution is zero."""
    client = client_of(model)
    assert isinstance(client.model, AdapterModel)
    one_step = TrainingConfig(local_steps=1, batch_size=2)
    norms: list[float] = []

    def look(masters: Mapping[str, torch.nn.Parameter]) -> None:
        norms.append(sum(float(value.grad.square().sum()) for value in masters.values() if value.grad is not None))

    for top_k in (client.model.num_tokens, 1):
        found, _ = client.model.likeliest(PROMPTS, ["it is 3", "t w o"], top_k, max_tokens=4)
        certain = [one._replace(probabilities=one.probabilities / one.probabilities.sum(1, True)) for one in found]
        pairs = [Pair(prompt, "", targets=targets) for prompt, targets in zip(PROMPTS, certain, strict=True)]
        model.fine_tune(model.fresh_adapter(), pairs, one_step, np.random.default_rng(0), adjust=look)
    assert norms[0] < 1e-8 * norms[1]


@pytest.mark.parametrize(
    ("forge", "says"),
    [
        (lambda sent: b"nonsense", "client 1, round 1: TokenScores"),
        (lambda sent: sent(client_id=2), "says that it is client 2's"),
        (lambda sent: sent(probabilities=b"\xff" * 2), "scores: not 3 tokens"),
        (lambda sent: sent(answers=((7,),), tokens=TOKENS, probabilities=THREE), "TokenScores: 1 answers to 2 prompts"),
    ],
)
def test_what_is_no_message_of_this_round_counts_for_nothing(model: LanguageModel, forge: Any, says: str) -> None:
    client = client_of(model, 1)
    algorithm = LogitExchange(COHORT, exchanges=range(1, 2), top_k=3)
    message = TokenScores.decode(algorithm.visit(client, 1, NO_TARGETS.encode()))

    def sent(**changes: Any) -> bytes:
        fields = {name: getattr(message, name) for name in message.__struct_fields__}
        return TokenScores(**{**fields, **changes}).encode()

    fleet, states, _ = run(model, forged={1: forge(sent)})
    assert [*fleet.refused] == [1]
    assert says in fleet.refused[1]
    given = {}
    for other in (0, 2):
        own = TokenScores.decode(fleet.algorithm.visit(client_of(model, other), 1, NO_TARGETS.encode()))
        given[other] = TokenProbabilities.unpacked(own.answers, own.tokens, own.probabilities, 3)
    assert fleet.algorithm.targets(1, given).encode() == states[0]


def test_where_no_message_counts_all_are_left_out(model: LanguageModel) -> None:
    with pytest.raises(QuorumError, match=r"client 0, round 1: .*client 1, round 1: .*client 2, round 1: "):
        run(model, forged=dict.fromkeys(range(3), b"nothing"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answers": ((7,),), "tokens": TOKENS, "probabilities": THREE}, "1 answers to 2 prompts"),
        ({"answers": ((7,), (7,)), "tokens": TOKENS * 2, "probabilities": THREE[:-2] * 2}, "not 3 tokens"),
        ({"round_number": 2}, "of round 2, sent in round 2"),
    ],
)
def test_targets_that_a_client_cannot_learn_are_refused(
    model: LanguageModel, changes: dict[str, Any], says: str
) -> None:
    fields = {"round_number": 1, "answers": (), "tokens": b"", "probabilities": b"", **changes}
    algorithm = LogitExchange(COHORT, exchanges=range(1, 2), top_k=3)
    with pytest.raises(MessageError, match=says):
        algorithm.visit(client_of(model), 2, TokenTargets(**fields).encode())


def test_targets_of_a_token_that_the_model_does_not_know_teach_nothing(model: LanguageModel) -> None:
    """A client that lies about one prompt takes nothing away from the others."""
    client, chances = client_of(model), np.ones((1, 1), np.float16)
    for bad in ((4000, 7), (7, 2**32 - 1)):
        tokens = tuple(np.array([[token]], np.uint32) for token in (bad[1], 7))
        client.distil(2, TokenProbabilities(((bad[0],), (7,)), tokens, (chances, chances)))
        assert client.num_pseudo_labels == 1


def test_of_a_longer_answer_than_its_own_may_be_a_client_learns_the_beginning(model: LanguageModel) -> None:
    client = client_of(model, num_private=0, local_steps=1)
    long = TokenProbabilities(
        ((7,) * 6,) * 2, (np.full((6, 1), 7, np.uint32),) * 2, (np.ones((6, 1), np.float16),) * 2
    )
    short = TokenProbabilities(*(tuple(part[:4] for part in parts) for parts in vars(long).values()))
    client.distil(2, long)
    loss = client.train_loss
    client.restore({})
    client.distil(2, short)
    assert client.train_loss == loss
