"""Clients whose models are none of this project's: what they are made of, asked for, counted, and what they may not."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from semcons_ray.config import GenerationConfig
from semcons_ray.data.examples import Example
from semcons_ray.errors import ClientError, ConfigError, NotFiniteError
from semcons_ray.federation.algorithms.semantic_consensus import SemanticConsensus
from semcons_ray.federation.host import ClientHost, HostSpec
from semcons_ray.federation.kinds import KindModels
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.store import mark
from semcons_ray.messages import NO_LABELS, Answers, PseudoLabels, PublicPrompts
from tests.federation.rows import work

PROMPTS = PublicPrompts(prompts=("add two and six", "spell one", "spell six")).encode()
PRIVATE = {3: (Example("spell one", "o n e", "spell"), Example("add two and two", "it is four", "add"))}
TEST = (Example("spell one", "o n e", "spell"), Example("add one and one", "it is two", "add"))


def kind(tmp_path: Path, name: str = "Parrot", **options: Any) -> KindModels:
    named, clients = f"tests.parrots:{name}", range(3, 4)
    return KindModels("polly", named, options, clients, "packaged:all-minilm", "be brief", tmp_path)


def host(tmp_path: Path, name: str = "Parrot", **options: Any) -> ClientHost:
    spec = HostSpec(
        models=kind(tmp_path, name, **options),
        algorithm=SemanticConsensus(Cohort(4, 1.0, 0), exchanges=range(1, 9), ema_decay=0.5),
        private=PRIVATE,
        generation={3: GenerationConfig(num_samples=2)},
        public_prompts=PROMPTS,
        test=TEST,
        num_answers=2,
        seed=5,
        state=tmp_path,
        mark=mark(tmp_path),
    )
    return spec.build("worker-1")


def test_a_parrot_learns_answers_and_is_measured_as_any_client(tmp_path: Path) -> None:
    parrots = host(tmp_path, price=0.5)
    base = parrots.measure(3, 0, b"").evaluation
    assert base is not None
    assert (base.answers, base.nll, base.num_tokens, base.num_bytes) == (("polly", "polly"), (), (), ())
    parrots.ledger.take()
    reply = parrots.visit(3, 1, NO_LABELS.encode(), True)
    assert Answers.decode(reply.uplink).samples == (("it is four", "o n e", "o n e"),) * 2
    assert reply.evaluation is not None
    assert reply.evaluation.answers == ("o n e", "it is four")
    assert math.isnan(reply.train_loss)
    rows = work(reply.rows, "tokens", "cost_usd")
    assert [(row[0], *row[-2:]) for row in rows] == [
        ("load", 0, 0.0), ("fine_tune", 2, 1.0), ("generate", 0, 0.5), ("evaluate", 0, 0.5),
    ]  # fmt: skip
    labels = PseudoLabels(round_number=1, prompt_ids=(2,), responses=("s i x",)).encode()
    again = host(tmp_path)  # another process, which has only the folder
    later = again.visit(3, 2, labels, False)
    assert later.num_pseudo_labels == 1
    assert Answers.decode(later.uplink).answers == ("it is four", "o n e", "s i x")
    assert "load" not in [row.stage for row in later.rows if row.round == 2]  # prompts were sent once
    assert msgspec.msgpack.encode(again.visit(3, 1, b"whatever", False)) == msgspec.msgpack.encode(reply)
    assert (tmp_path / "client_003" / "own" / "calls").read_text() == "1\n2\n"


def test_a_kind_that_tells_likelihoods_is_scored(tmp_path: Path) -> None:
    evaluation = host(tmp_path, "Listening").measure(3, 0, b"").evaluation
    assert evaluation is not None
    assert (evaluation.nll, evaluation.num_bytes) == ((3.0, 6.0), (5, 9))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("fails", "RuntimeError: pieces of eight"),
        ("nothing", r"its model gave \[\] answers, not 2 times 3"),
        ("numbers", r"its model answered with 8, which is no text"),
    ],
)
def test_a_model_that_fails_or_answers_otherwise_than_asked_is_a_lost_client(
    tmp_path: Path, how: str, said: str
) -> None:
    parrots = host(tmp_path, "Shy", how=how)
    parrots.visit(3, 1, NO_LABELS.encode(), False)
    with pytest.raises(ClientError, match=f"^client 3, round 2, worker-1: .*{said}"):
        parrots.visit(3, 2, NO_LABELS.encode(), False)
    parrots.visit(3, 3, NO_LABELS.encode(), False)


def test_states_of_bytes_and_tensors_come_back_and_bad_ones_are_the_clients_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parrots = host(tmp_path)
    model: Any = parrots.clients[3].model
    states = {"heard": b"{}", "empty": b"", "numbers": torch.arange(3)}
    monkeypatch.setattr(model, "state", lambda: states)
    parrots.visit(3, 1, NO_LABELS.encode(), False)
    loaded = parrots.store.load(3, before=2)
    assert (loaded["heard"], loaded["empty"]) == (b"{}", b"")
    assert torch.equal(torch.as_tensor(loaded["numbers"]), torch.arange(3))
    for bad, said in (({"reply": b"x"}, "no room for a reply"), ({"w": torch.tensor(math.inf)}, "w is not finite")):
        monkeypatch.setattr(model, "state", lambda bad=bad: {"heard": b"{}", **bad})
        with pytest.raises(NotFiniteError if "w" in bad else ClientError, match=said):
            parrots.visit(3, 2, NO_LABELS.encode(), False)
    assert parrots.store.reply(3, 2) is None


def test_a_model_without_weights_has_none_to_exchange(tmp_path: Path) -> None:
    client = host(tmp_path).clients[3]
    with pytest.raises(TypeError, match="its model, a Parrot, has no weights to exchange"):
        client.adapter  # noqa: B018
    assert host(tmp_path).adapter_shapes == {}


def test_variables_that_a_kind_needs_are_checked_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"^clients\.models\.polly needs the environment variable MY_KEY, which is"):
        kind(tmp_path, "Caged", key="MY_KEY").needs(0)
    monkeypatch.setenv("MY_KEY", "secret")
    assert kind(tmp_path, "Caged", key="MY_KEY").needs(0) == ("MY_KEY",)
    assert kind(tmp_path).needs(0) == ()
    with pytest.raises(ConfigError, match=r"^clients\.models\.polly\.options: tests\.parrots:Parrot has no option wrd"):
        kind(tmp_path, wrd="x").needs(0)
    assert not any(tmp_path.iterdir())
