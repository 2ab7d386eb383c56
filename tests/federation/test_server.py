import math
import re
import socket
import struct
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from semcons_ray.config import GenerationConfig
from semcons_ray.consensus import Election
from semcons_ray.consensus.evidence import Evidence
from semcons_ray.errors import ModelError
from semcons_ray.federation.server import SAMPLES, Server, ServerOnDemand, ServerSpec, build_embedder
from semcons_ray.messages import Answers, PseudoLabels
from semcons_ray.metering.ledger import Ledger
from tests.federation.rows import work

ANGLES = {"left": 0.0, "middle": 40.0, "right": 90.0, "": 0.0}
# With its prompt in front, another answer is in the middle.
ANGLES |= {f"{prompt}\n{text}": angle for prompt in "ab" for text, angle in
           {"left": 40.0, "middle": 0.0, "right": 90.0, "": 0.0}.items()}  # fmt: skip


class Compass:
    """An embedder of four words, by angle."""

    dimension = 2

    def embed(self, texts: Sequence[str]) -> Tensor:
        angles = torch.deg2rad(torch.tensor([ANGLES[text] for text in texts]))
        return torch.stack([angles.cos(), angles.sin()], dim=1)


def server(
    rule: str = "medoid",
    prompts: Sequence[str] = (),
    num_samples: Sequence[int] = (),
    *,
    send: Any = "all",
    embeds_both: bool = False,
    **settings: Any,
) -> Server:
    return Server(
        Compass(), num_prompts=2, election=Election(rule, **settings), prompts=prompts, seed=0, embeds_both=embeds_both,
        generation=[GenerationConfig(num_samples=count, send_draws=send) for count in num_samples],
        ledger=Ledger("server", "n"),
    )  # fmt: skip


def choice(client_id: int, answers: Sequence[str], counts: Sequence[int]) -> bytes:
    return Answers(
        round_number=1, client_id=client_id, num_examples=1, answers=tuple(answers), counts=tuple(counts)
    ).encode()


def uplink(client_id: int, *answers: str, round_number: int = 1, num_examples: int = 1) -> bytes:
    return Answers(round_number=round_number, client_id=client_id, num_examples=num_examples, answers=answers).encode(
        "zstd"
    )


def test_the_middle_answer_wins_and_becomes_the_pseudo_label() -> None:
    judge = server()
    judge.begin(1, [2, 5, 9])
    judge.collect(9, uplink(9, "right", "left"))
    judge.collect(2, uplink(2, "left", "left"))
    judge.collect(5, uplink(5, "middle", "right"))
    verdict = judge.conclude()
    assert verdict.client_ids == (2, 5, 9)
    assert verdict.winner[0] == 5
    assert verdict.winner[1] in (2, 9)  # who say the same
    assert verdict.similarity[0] == pytest.approx([0.383, 0.704, 0.321], abs=1e-3)  # clients ascending
    assert verdict.labels.responses == ("middle", "left")
    assert verdict.labels.prompt_ids == (0, 1)
    assert verdict.labels.round_number == 1
    assert [row.stage for row in verdict.rows] == ["embed", "embed", "embed", "consensus"]


def test_answers_are_embedded_with_their_prompts_if_there_are_any() -> None:
    judge = server(prompts=("a", "b"), embeds_both=True)
    judge.begin(1, [0, 1, 2])
    judge.collect(0, uplink(0, "right", "left"))
    judge.collect(1, uplink(1, "left", ""))
    judge.collect(2, uplink(2, "middle", ""))
    verdict = judge.conclude()
    assert verdict.labels.responses == ("left",)  # alone, "middle" would win; empty ones have no vote


def samples(client_id: int, *draws: Sequence[str], num_examples: int = 1) -> bytes:
    first, *further = map(tuple, draws)
    return Answers(
        round_number=1, client_id=client_id, num_examples=num_examples, answers=first, further=tuple(further)
    ).encode()


def test_samples_are_ballots_that_share_their_clients_vote() -> None:
    """Client 0 says "left" in all of its four samples; clients 2 and 5 say "right" in one of two, and once."""
    words = {0: ["left"] * 4, 2: ["right", "middle"], 5: ["right"]}
    judge = server("plurality", options={"min_cosine": 0.99}, num_samples=(4, 1, 2, 1, 1, 1))
    judge.begin(1, [0, 2, 5])
    for client, said in words.items():
        judge.collect(client, samples(client, *([word, "left"] for word in said)))
    verdict = judge.conclude()
    assert verdict.client_ids == (0, 0, 0, 0, 2, 2, 5)
    assert verdict.samples == (0, 1, 2, 3, 0, 1, 0)
    assert [answer for answer, _ in verdict.answers] == [*["left"] * 4, "right", "middle", "right"]
    # For "right" are half of client 2 and client 5: more than client 0, though that has four ballots.
    assert verdict.labels.responses == ("right", "left")
    assert (verdict.winner[0], verdict.winning_sample[0]) in ((2, 0), (5, 0))
    assert verdict.winning_sample[1] == 0
    assert verdict.similarity.shape == (2, 7)


def consistent(evidence: Evidence) -> Tensor:
    """Competence: a part of the draws that say the same, however many ballots they are."""
    same = (evidence.opinions[:, :, None] == evidence.opinions[:, None]) & (evidence.voters[:, None] == evidence.voters)
    return (same * evidence.shares[:, None]).sum(dim=2)


def test_how_far_a_client_agrees_with_itself_is_known_of_all_draws_and_of_a_choice() -> None:
    """Client 0 says "left" in 3 of 4 draws, client 1 "right" in 2 of 4, with one that is empty."""
    first = [["left"] * 2] * 3 + [["middle"] * 2]
    second = [["right"] * 2] * 2 + [[""] * 2, ["middle"] * 2]
    ratios = {}
    for send, messages in {
        "all": (samples(0, *first), samples(1, *second)),
        "choice": (choice(0, ["left"] * 2, [3] * 2), choice(1, ["right"] * 2, [2] * 2)),
    }.items():
        judge = server("plurality", num_samples=(4, 4), send=send, competence=f"{__name__}:consistent")
        judge.begin(1, [0, 1])
        for client, message in enumerate(messages):
            judge.collect(client, message)
        verdict = judge.conclude()
        assert verdict.refused == {}
        assert verdict.labels.responses == ("left", "left")
        left, right = (
            sum(verdict.votes[0, place] for place, texts in enumerate(verdict.answers) if texts[0] == word)
            for word in ("left", "right")
        )
        ratios[send] = left / right
    # 3/4 of a vote at 3/4 each against 2/3 at 1/2; of choices, whole votes.
    assert ratios == pytest.approx({"all": (9 / 16) / (1 / 3), "choice": 3 / 2})


def test_a_choice_is_one_ballot_with_a_whole_vote() -> None:
    judge = server("plurality", num_samples=(8, 8, 8, 8), send="choice")
    judge.begin(1, [0, 1, 2, 3])
    for client, (word, count) in enumerate({"left": 8, "right": 2, "": 0}.items()):
        judge.collect(client, choice(client, [word, "left"], [count, 1]))
    verdict = judge.conclude()
    assert (verdict.client_ids, verdict.samples) == ((0, 1, 2, 3), (0, 0, 0, 0))
    assert verdict.votes.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert np.array(verdict.draws).T.tolist() == [[8, 2, 0, 0], [1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("send", "message", "says"),
    [
        ("all", choice(0, ["left"] * 2, [1, 1]), "1 samples of each answer, not 2"),
        ("choice", samples(0, ["left"] * 2, ["left"] * 2), "2 samples of each answer, not 1"),
        ("choice", uplink(0, "left", "left"), "counts of draws that were not asked for, or none that were"),
        ("choice", choice(0, ["left"] * 2, [1, 3]), "counts 3 draws of 2"),
    ],
)
def test_a_client_that_counts_otherwise_than_it_is_asked_to_has_no_vote(send: str, message: bytes, says: str) -> None:
    judge = server(num_samples=(2,), send=send)
    judge.begin(1, [0])
    judge.collect(0, message)
    assert judge.conclude().refused == {0: f"client 0, round 1: Answers: {says}"}


def test_counts_that_were_not_asked_for_are_refused() -> None:
    judge = server()
    judge.begin(1, [0])
    judge.collect(0, choice(0, ["left"] * 2, [1, 1]))
    assert "counts of draws that were not asked for" in judge.conclude().refused[0]


def sure(evidence: Evidence) -> Tensor:
    """Competence: what clients say of how likely an answer is; who says nothing has half a vote."""
    assert evidence.confidence is not None
    return evidence.confidence.exp().nan_to_num(0.5)


def test_what_clients_say_of_their_confidence_reaches_competence() -> None:
    asked = GenerationConfig(send_confidence=True)
    judge = Server(
        Compass(), num_prompts=2, election=Election("plurality", competence=f"{__name__}:sure"), seed=0,
        generation=[asked] * 3, ledger=Ledger("server", "n"),
    )  # fmt: skip
    judge.begin(1, [0, 1, 2])
    for client, (word, values) in enumerate({"left": (-3, math.nan), "right": (-0.1, math.nan)}.items()):
        answers = Answers(
            round_number=1, client_id=client, num_examples=1, answers=(word, ""), confidence=struct.pack("<2f", *values)
        )
        judge.collect(client, answers.encode())
    judge.collect(2, uplink(2, "middle", "right"))
    verdict = judge.conclude()
    weights = [math.exp(-3), math.exp(-0.1), 0.5]
    assert verdict.votes[0] == pytest.approx([3 * one / sum(weights) for one in weights])
    assert verdict.labels.responses[0] == "right"
    assert np.array(verdict.confidence)[:, 0] == pytest.approx([-3, -0.1, math.nan], nan_ok=True)


def test_confidence_that_was_not_asked_for_is_refused() -> None:
    judge = server()
    judge.begin(1, [0])
    answers = Answers(
        round_number=1, client_id=0, num_examples=1, answers=("left", ""), confidence=struct.pack("<2f", -1, math.nan)
    )
    judge.collect(0, answers.encode())
    assert judge.conclude().refused == {0: "client 0, round 1: Answers: confidence that was not asked for"}


def test_two_clients_with_two_samples_by_hand() -> None:
    """At 0 and 40, and 40 and 90 degrees: an answer's similarity is its mean cosine to the other client's."""
    judge = server(num_samples=(2, 2))
    judge.begin(1, [0, 1])
    judge.collect(0, samples(0, ["left", "left"], ["middle", ""]))
    judge.collect(1, samples(1, ["middle", ""], ["right", ""]))
    verdict = judge.conclude()
    cos40, cos50 = 0.766044, 0.642788
    expected = [cos40 / 2, (1 + cos50) / 2, (cos40 + 1) / 2, cos50 / 2]
    assert verdict.similarity[0] == pytest.approx(expected, abs=1e-5)
    assert verdict.agreement[0] == pytest.approx(expected[2], abs=1e-5)
    assert verdict.labels.responses == ("middle",)
    assert (verdict.winner[0], verdict.winning_sample[0]) == (1, 0)
    assert verdict.winner[1] == 0  # alone, which is one vote of the two that are needed
    assert verdict.abstained.tolist() == [False, True]


def test_where_nobody_answers_nobody_wins() -> None:
    judge = server(num_samples=(2, 2))
    judge.begin(1, [0, 1])
    for client in (0, 1):
        judge.collect(client, samples(client, ["left", ""], ["left", ""]))
    verdict = judge.conclude()
    assert (verdict.winner[1], verdict.winning_sample[1]) == (-1, -1)
    assert verdict.labels.prompt_ids == (0,)


def test_more_samples_are_no_more_chances_in_a_tie() -> None:
    """Of two clients the one with eight samples wins half of the ties, as it would with one."""
    wins = []
    for count in (1, 8):
        judge = Server(
            Compass(), num_prompts=40, election=Election("random_client"), seed=0,
            generation=[GenerationConfig(num_samples=count), GenerationConfig()], ledger=Ledger("server", "n"),
        )  # fmt: skip
        judge.begin(1, [0, 1])
        judge.collect(0, samples(0, *[["left"] * 40, *[["middle"] * 40] * (count - 1)]))
        judge.collect(1, samples(1, ["right"] * 40))
        verdict = judge.conclude()
        assert set(verdict.labels.responses) == {"left", "right"}  # never a later sample
        wins.append(verdict.winner.tolist())
    assert wins[0] == wins[1]


def test_as_many_samples_are_taken_as_a_client_draws() -> None:
    judge = server(num_samples=(2, 1))
    judge.begin(1, [0, 1])
    judge.collect(0, uplink(0, "left", "left"))
    judge.collect(1, samples(1, ["left", "left"], ["left", "left"]))
    assert judge.conclude().refused == {
        0: "client 0, round 1: Answers: 1 samples of each answer, not 2",
        1: "client 1, round 1: Answers: 2 samples of each answer, not 1",
    }


def test_order_of_arrival_and_repetition_change_nothing() -> None:
    messages = [uplink(0, "left", "middle"), uplink(1, "right", "middle"), uplink(2, "middle", "left")]
    verdicts = []
    for order in ([0, 1, 2], [2, 0, 1, 0, 2]):
        judge = server()
        judge.begin(1, [0, 1, 2])
        for index in order:
            judge.collect(index, messages[index])
        verdicts.append(judge.conclude())
    assert verdicts[0].labels == verdicts[1].labels
    assert verdicts[0].similarity.tolist() == verdicts[1].similarity.tolist()


def test_large_embeddings_are_in_a_file_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts, mapped = [], []
    for most in (1 << 20, 8):
        monkeypatch.setattr("semcons_ray.federation.server.IN_MEMORY", most)
        judge = server(num_samples=[2, 1, 2])
        judge.begin(1, [0, 1, 2])
        judge.collect(2, samples(2, ["left", "middle"], ["right", ""]))
        judge.collect(0, samples(0, ["middle", "left"], ["left", "left"]))
        mapped.append(judge._embeddings is not None and judge._embeddings.is_contiguous())
        verdicts.append(judge.conclude())
    assert mapped == [True, False]
    first, second = verdicts
    for name in ("winner", "similarity", "agreement", "votes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.labels == second.labels


def test_missing_clients_and_empty_answers_have_no_vote() -> None:
    judge = server(min_votes=1)
    judge.begin(1, [0, 1, 2])
    judge.collect(1, uplink(1, "", "right"))
    verdict = judge.conclude()
    assert verdict.winner.tolist() == [-1, 1]
    assert verdict.labels.prompt_ids == (1,)
    assert verdict.answers == (("", ""), ("", "right"), ("", ""))


def test_references_are_handed_out_instead_of_what_was_elected() -> None:
    judge = Server(
        Compass(), num_prompts=2, election=Election(), known={0: "north", 1: "south"}, seed=0,
        ledger=Ledger("server", "n"),
    )  # fmt: skip
    judge.begin(1, [0, 1])
    judge.collect(0, uplink(0, "left", ""))
    judge.collect(1, uplink(1, "middle", ""))
    verdict = judge.conclude()
    assert verdict.labels.responses == ("north", "south")
    assert verdict.winner.tolist() == [-1, -1]
    assert verdict.agreement[0] == pytest.approx(0.766, abs=1e-3)  # cos 40 degrees: how far the clients agree


def knows(evidence: Evidence) -> Tensor:
    """Competence: who gives a known answer has all the weight there."""
    assert evidence.known is not None
    return (evidence.opinions == evidence.known[:, None]).float() + 1e-3


def test_known_answers_reach_competence_and_become_labels_and_others_are_elected() -> None:
    judge = Server(
        Compass(), num_prompts=3, election=Election("plurality", competence=f"{__name__}:knows"), seed=0,
        known={0: "LEFT.", 2: "south"}, ledger=Ledger("server", "n"),
    )  # fmt: skip
    judge.begin(1, [0, 1, 2])
    for client, word in enumerate(("left", "right", "right")):
        judge.collect(client, uplink(client, word, word, word))
    verdict = judge.conclude()
    assert verdict.labels.responses == ("LEFT.", "right", "south")
    assert verdict.winner.tolist()[::2] == [-1, -1]
    assert verdict.winner[1] in (1, 2)
    assert verdict.abstained.tolist() == [False] * 3
    assert verdict.votes[0] == pytest.approx([3 * 1.001 / 1.003, 3e-3 / 1.003, 3e-3 / 1.003], rel=1e-4)
    assert verdict.votes[1].tolist() == verdict.votes[2].tolist() == [1, 1, 1]  # unknown, and known to nobody


def test_a_round_without_any_answer_abstains() -> None:
    judge = server()
    judge.begin(1, [0])
    assert judge.conclude().labels.prompt_ids == ()


def test_agreement_under_the_threshold_gives_no_label() -> None:
    judge = server(threshold=0.9)
    judge.begin(1, [0, 1])
    judge.collect(0, uplink(0, "left", "left"))
    judge.collect(1, uplink(1, "right", "left"))
    verdict = judge.conclude()
    assert verdict.abstained.tolist() == [True, False]
    assert verdict.labels.responses == ("left",)


def test_weights_are_the_numbers_of_private_examples() -> None:
    judge = server("weighted_medoid")
    judge.begin(1, [0, 1, 2])
    for client, word, examples in ((0, "left", 1), (1, "left", 1), (2, "right", 50)):
        judge.collect(client, uplink(client, word, word, num_examples=examples))
    assert judge.conclude().winner.tolist() == [2, 2]


def test_an_answer_that_comes_late_is_of_the_round_in_which_its_client_was_asked() -> None:
    judge = server(min_votes=1)
    judge.begin(3, [0, 1, 2])
    judge.collect(0, uplink(0, "left", "left", round_number=3))
    judge.collect(1, uplink(1, "right", "right", round_number=1), 1)
    judge.collect(2, uplink(2, "right", "right", round_number=1), 2)  # of another round than that
    verdict = judge.conclude()
    assert [*verdict.refused] == [2]
    assert "client 2, round 2" in verdict.refused[2]
    assert verdict.labels.round_number == 3
    assert verdict.answers[1] == ("right", "right")


def test_a_new_round_forgets_the_old_one() -> None:
    judge = server(min_votes=1)
    judge.begin(1, [0])
    judge.collect(0, uplink(0, "left", "left"))
    judge.begin(2, [1])
    judge.collect(1, uplink(1, "right", "right", round_number=2))
    assert judge.conclude().labels.responses == ("right", "right")


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (uplink(0, "left"), "^client 0, round 1: Answers: 1 answers to 2 prompts$"),
        (uplink(1, "left", "left"), "^client 0, round 1: Answers: says that it is client 1's"),
        (uplink(0, "left", "left", round_number=3), "^client 0, round 1: Answers: says .* round 3"),
        (b"\x00nonsense", "^client 0, round 1: Answers"),
    ],
)
def test_messages_that_do_not_belong_are_refused_and_leave_no_trace(message: bytes, says: str) -> None:
    judge = server()
    judge.begin(1, [0, 1])
    judge.collect(0, message)
    judge.collect(1, uplink(1, "right", "right"))
    verdict = judge.conclude()
    assert verdict.answers == (("", ""), ("right", "right"))
    assert verdict.labels.responses == ()  # of two clients one is left, which agrees with nobody
    assert list(verdict.refused) == [0]
    assert re.search(says, verdict.refused[0])
    judge.begin(2, [0])
    assert not judge.conclude().refused


def test_what_was_refused_once_may_come_again_and_what_was_taken_stays() -> None:
    judge = server()
    judge.begin(1, [0, 1])
    for message in (b"nonsense", uplink(0, "left", "left"), uplink(0, "right", "right"), b"nonsense"):
        judge.collect(0, message)
    verdict = judge.conclude()
    assert verdict.answers == (("left", "left"), ("", ""))
    assert verdict.refused == {}


def test_nobody_answers_who_was_not_asked() -> None:
    judge = server()
    judge.begin(1, [0])
    judge.collect(7, uplink(7, "left", "left"))
    assert judge.conclude().refused == {7: "client 7, round 1: Answers: from a client that was not asked"}


def test_similarity_of_predictions_to_references() -> None:
    cosines = server().similarity(1, ["left", "right", ""], ["left", "left", "left"])
    assert cosines == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)


def test_ties_fall_to_each_client_and_as_they_fell_the_first_time() -> None:
    """Two clients tie on every prompt: each wins some, whoever answers first, and the same in a second run."""
    words = ["left", "right"] * 20
    wins = []
    for order in ([0, 1], [1, 0], [0, 1]):
        judge = Server(Compass(), num_prompts=40, election=Election(), seed=0, ledger=Ledger("server", "n"))
        judge.begin(1, order)
        for client in order:
            judge.collect(client, uplink(client, *words[client : client + 39], "left"))
        wins.append(judge.conclude().winner.tolist())
    assert 8 < sum(wins[0]) < 32
    assert wins[0] == wins[1] == wins[2]
    judge.begin(2, [0, 1])
    for client in (0, 1):
        judge.collect(client, uplink(client, *words[client : client + 39], "left", round_number=2))
    assert judge.conclude().winner.tolist() != wins[0]


def test_all_that_the_server_does_is_in_its_ledger() -> None:
    judge = server()
    judge.begin(3, [0, 1])
    judge.collect(1, uplink(1, "left", "middle", round_number=3))
    judge.collect(1, uplink(1, "left", "middle", round_number=3))
    judge.collect(0, b"nonsense")
    columns = ("gpus", "tokens")
    rows = judge.conclude().rows
    embedded = [("embed", 3, -1, "server", "n", "", words) for words in (2, 0, 0)]  # nothing is embedded twice
    assert work(rows, *columns) == [*embedded, ("consensus", 3, -1, "server", "n", "", 0)]
    judge.similarity(4, ["left"], ["right"])
    assert work(judge.take_rows(), *columns) == [("evaluate", 4, -1, "server", "n", "", 0)]
    assert judge.take_rows() == []


def test_a_verdict_without_answers_is_whole() -> None:
    judge = server()
    judge.begin(2, [7, 3])
    verdict = judge.conclude()
    assert (verdict.client_ids, verdict.answers) == ((3, 7), (("", ""), ("", "")))
    assert verdict.winner.tolist() == [-1, -1]
    assert verdict.abstained.tolist() == [True, True]
    assert np.isnan(verdict.agreement).all()
    assert np.isnan(verdict.similarity).all()
    assert verdict.similarity.shape == (2, 2)
    assert verdict.labels == PseudoLabels(round_number=2, prompt_ids=(), responses=())
    assert verdict.refused == {}


def test_a_server_on_demand_is_made_once_when_it_is_first_needed() -> None:
    made: list[Server] = []

    def make() -> Server:
        made.append(Server(Compass(), num_prompts=2, election=Election(), seed=0, ledger=Ledger("server", "n")))
        return made[-1]

    asked = ServerOnDemand(make)
    assert asked.take_rows() == []
    asked.close()
    assert not made
    asked.begin(1, [0])
    asked.collect(0, uplink(0, "left", "right"))
    assert asked.conclude().answers == (("left", "right"),)
    assert asked.similarity(1, ["left"], ["left"]) == [1.0]
    assert [row.stage for row in asked.take_rows()] == ["evaluate"]
    assert len(made) == 1


class Noted(Compass):
    """Notes what an embedder is made of; texts that are no words point north."""

    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, *, turn: float = 0.0, device: str) -> None:
        self.made.append({"turn": turn, "device": device})

    def embed(self, texts: Sequence[str]) -> Tensor:
        return super().embed([text if text in ANGLES else "left" for text in texts])


@pytest.mark.usefixtures("one_gpu", "own_threads")
@pytest.mark.parametrize(("device", "gpus"), [("cpu", ""), ("cuda", "GPU-0")])
def test_a_server_is_built_of_all_that_its_spec_says(
    device: str, gpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a GPU, which it uses or doesn't."""
    monkeypatch.setattr(Noted, "made", [])

    def build(**more: Any) -> Server:
        spec = {"prompts": ("a", "b"), "known": {}, "election": Election(min_votes=1), "seed": 0} | more
        return ServerSpec(
            f"{__name__}:Noted", {"turn": 2}, device=device, threads=3, num_prompts=2, embeds_both=True, **spec
        ).build()

    judge = build()
    assert torch.get_num_threads() == 3
    assert Noted.made == [{"turn": 2.0, "device": device}]
    assert work(judge.take_rows(), "gpus", "tokens") == [("load", 0, -1, "server", socket.gethostname(), gpus, 0)]
    judge.begin(1, [0, 1, 2])
    for client, word in enumerate(("right", "left", "middle")):
        judge.collect(client, uplink(client, word, ""))
    assert judge.conclude().labels.responses == ("left",)  # as it is with prompts, and as one vote is enough
    judge = build(known={0: "north", 1: "south"})
    judge.begin(1, [0])
    assert judge.conclude().labels.responses == ("north", "south")


class Flat(Compass):
    dimension = 3


class Long(Compass):
    def embed(self, texts: Sequence[str]) -> Tensor:
        return 2 * torch.eye(2)


class Broken(Compass):
    def embed(self, texts: Sequence[str]) -> Tensor:
        raise KeyError("sample")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Flat, r"gives vectors of shape \(2, 2\) for 2 texts, not \(2, 3\)"),
        (Long, r"gives vectors of lengths \[2\.0, 2\.0\], not 1"),
        (Broken, "cannot embed: KeyError: 'sample'"),
    ],
)
def test_an_embedder_that_gives_no_unit_vectors_is_refused_when_it_is_loaded(
    kind: type[Compass], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.federation.test_server.ANGLES", dict.fromkeys((*ANGLES, *SAMPLES), 0.0))
    with pytest.raises(ModelError, match=rf"^server\.embedder tests\.federation\.test_server:{kind.__name__} {says}$"):
        build_embedder(f"{__name__}:{kind.__name__}", {}, "cpu")


def test_the_seed_decides_ties() -> None:
    winners = []
    for seed in (0, 1, 1):
        judge = Server(Compass(), num_prompts=40, election=Election(), seed=seed, ledger=Ledger("server", "n"))
        judge.begin(1, [0, 1])
        for client in (0, 1):
            judge.collect(client, uplink(client, *["left", "right"][:: 1 - 2 * client] * 20))
        winners.append(judge.conclude().winner.tolist())
    assert winners[0] != winners[1] == winners[2]
