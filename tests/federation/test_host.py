"""A host: what it is built of, what its visits leave behind, and what it makes of clients that fail."""

import dataclasses
import itertools
import math
import socket
import threading
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from semcons_ray.config import GenerationConfig, LoraConfig, ModelConfig, PerClient, ShardingConfig, TrainingConfig
from semcons_ray.data.examples import Example
from semcons_ray.errors import ClientError, MessageError, ModelError, NotFiniteError, StorageError
from semcons_ray.federation.adapter_model import AdapterModel, AdapterModels
from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.algorithms.fedprox import FedProx
from semcons_ray.federation.algorithms.semantic_consensus import SemanticConsensus
from semcons_ray.federation.client import Client
from semcons_ray.federation.fleet import Evaluation
from semcons_ray.federation.host import ClientHost, HostSpec
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.store import ClientStore, mark
from semcons_ray.federation.weights import pack
from semcons_ray.messages import Answers, GlobalAdapter, PseudoLabels, PublicPrompts
from semcons_ray.metering.ledger import Ledger, Place
from semcons_ray.modeling.language_model import LanguageModel
from semcons_ray.modeling.packaged import resolve_model
from tests.federation.rows import work

PRIVATE = {
    client: tuple(Example(f"add one and {word}", f"it is {word}", "add") for word in words)
    for client, words in {0: ("two", "three", "four"), 2: ("five", "six")}.items()
}
MakeSpec = Callable[..., HostSpec]
PROMPTS = PublicPrompts(prompts=("add two and two", "spell one", "spell two")).encode("zstd")
NO_WORDS = PseudoLabels(round_number=0, prompt_ids=(), responses=()).encode()


@pytest.fixture
def make_spec(tiny_llama: Path, tmp_path: Path) -> MakeSpec:
    def make(**changes: Any) -> HostSpec:
        state = tmp_path / "state"
        models = AdapterModels(
            model=ModelConfig(name=str(tiny_llama), dtype="float32", max_length=64, lora=LoraConfig(rank=4)),
            device="cpu",
            threads=1,
            ranks=(4, 4, 2),
            training=PerClient(TrainingConfig(learning_rate=1e-2, batch_size=2)),
            generation=PerClient(GenerationConfig(batch_size=32), {2: GenerationConfig(batch_size=16)}),
            clients=range(3),
        )
        own = [key for key in changes if hasattr(models, key) and key != "generation"]
        of_models = {key: changes.pop(key) for key in own}
        spec = HostSpec(
            models=dataclasses.replace(models, **of_models),
            algorithm=SemanticConsensus(Cohort(3, 1.0, 0), exchanges=range(1, 9), ema_decay=0.5),
            private=PRIVATE,
            public_prompts=PROMPTS,
            test=(Example("spell six", "s i x", "spell"), Example("add one and one", "it is 2", "add")),
            num_answers=1,
            generation=PerClient(GenerationConfig(max_new_tokens=4)),
            seed=11,
            state=state,
            mark=mark(state),
        )
        return dataclasses.replace(spec, **changes)

    return make


def test_each_client_has_its_own_settings(make_spec: MakeSpec) -> None:
    common = make_spec()
    assert isinstance(common.models, AdapterModels)
    own_training = TrainingConfig(learning_rate=1e-3, batch_size=1)
    own_generation = GenerationConfig(max_new_tokens=2, stop=("x",))
    spec = make_spec(
        training=PerClient(common.models.training[0], {2: own_training}),
        generation=PerClient(common.generation[0], {2: own_generation}),
    )
    clients: Any = spec.build("worker-7").clients
    assert (clients[0].model.training, clients[0].generation) == (common.models.training[0], common.generation[0])
    assert (clients[2].model.training, clients[2].generation) == (own_training, own_generation)
    assert (clients[0].model.batch_size, clients[2].model.batch_size) == (32, 16)


COLUMNS = ("gpus", "uplink_bytes", "downlink_bytes")
HERE = ("worker-7", socket.gethostname(), "")


def test_a_visit_replies_with_the_answers_the_evaluation_and_a_row_for_each_piece_of_work(make_spec: MakeSpec) -> None:
    host = make_spec().build("worker-7")
    reply = host.visit(2, 1, NO_WORDS, True)
    message = Answers.decode(reply.uplink)
    assert (message.round_number, message.client_id, message.num_examples, len(message.answers)) == (1, 2, 2, 3)
    assert (reply.client_id, reply.round, reply.num_private, reply.num_pseudo_labels) == (2, 1, 2, 0)
    assert 0 < reply.train_loss < 20
    assert work(reply.rows, *COLUMNS) == [
        ("load", 0, -1, *HERE, 0, 0),  # of the worker, once
        ("load", 1, 2, *HERE, 0, len(PROMPTS)),  # a client is sent the public prompts before its first visit
        ("fine_tune", 1, 2, *HERE, 0, len(NO_WORDS)),
        ("generate", 1, 2, *HERE, len(reply.uplink), 0),
        ("evaluate", 1, 2, *HERE, 0, 0),
    ]
    later = host.visit(2, 2, PseudoLabels(round_number=1, prompt_ids=(1,), responses=("o n e",)).encode(), False)
    assert (later.evaluation, later.num_pseudo_labels) == (None, 1)
    assert [row[0] for row in work(later.rows)] == ["fine_tune", "generate"]
    # A visit that is asked for again is not done again.
    assert msgspec.msgpack.encode(host.visit(2, 1, b"whatever", False)) == msgspec.msgpack.encode(reply)


@pytest.mark.parametrize(
    "algorithm", [None, FedProx(Cohort(4, 1.0, 0), (4, 4, 2, 4), mu=0.5)], ids=["consensus", "fedprox"]
)
def test_clients_that_train_together_reply_as_in_turn_and_share_its_time(
    make_spec: MakeSpec, tmp_path: Path, algorithm: FedAvgLora | None
) -> None:
    """Client 1 learns in more batches, and client 2 has a smaller rank; both are stored with the visit of client 0."""
    changes: dict[str, Any] = {} if algorithm is None else {"algorithm": algorithm, "public_prompts": b""}
    private = {**PRIVATE, 1: PRIVATE[0] * 2}
    message = NO_WORDS if algorithm is None else b""
    found = []
    for name, beside in (("turns", {}), ("together", {1: message, 2: message})):
        state = tmp_path / name
        host = make_spec(private=private, state=state, mark=mark(state), **changes).build("worker-7")
        replies = {0: host.visit(0, 1, message, True, beside)}
        if beside:
            assert all(host.store.reply(client, 1) for client in (0, 1, 2))
        for client in (1, 2):
            replies[client] = host.visit(client, 1, message, True)
        assert host.ledger.take() == []
        found.append((host, replies))
    (turns, in_turn), (host, together) = found
    for client, reply in together.items():
        expected = in_turn[client]
        assert work(reply.rows, "tokens", *COLUMNS)[-4:] == work(expected.rows, "tokens", *COLUMNS)[-4:]
        assert {row.client_id for row in reply.rows} <= {client, -1}
        assert reply.train_loss == pytest.approx(expected.train_loss, rel=1e-5)
        assert len(reply.uplink) == pytest.approx(len(expected.uplink), rel=0.01)
        assert reply.evaluation is not None
        assert expected.evaluation is not None
        assert reply.evaluation.nll == pytest.approx(expected.evaluation.nll, rel=1e-4)
        states = [one.store.load(client, before=2) for one in (host, turns)]
        assert states[0].keys() == states[1].keys()
        for key, value in states[1].items():
            assert isinstance(value, torch.Tensor)
            torch.testing.assert_close(states[0][key], value, rtol=1e-3, atol=1e-5)
    learnt = [next(row for row in together[client].rows if row.stage == "fine_tune") for client in (0, 1, 2)]
    for before, after in itertools.pairwise(learnt):  # one after another, each as long as its tokens ask for
        assert before.started_at + before.duration_seconds == pytest.approx(after.started_at, abs=1e-6)
        a_token = [row.duration_seconds / row.tokens for row in (before, after)]
        assert a_token[0] == pytest.approx(a_token[1], rel=0.01)  # unix seconds have 7 digits behind the point
    later = [row for reply in together.values() for row in reply.rows if row.stage in ("generate", "evaluate")]
    assert min(row.started_at for row in later) >= learnt[-1].started_at + learnt[-1].duration_seconds - 1e-3


def test_a_client_that_fails_among_others_fails_alone(make_spec: MakeSpec, caplog: pytest.LogCaptureFixture) -> None:
    """One diverges while all train; one cannot read its message, so that the others do not wait for it."""
    common = make_spec().models.training[0]  # type: ignore[attr-defined]
    wild = PerClient(common, {1: common.model_copy(update={"learning_rate": 1e30})})
    spec = make_spec(private={**PRIVATE, 1: PRIVATE[0], 3: PRIVATE[2]}, training=wild)
    host = spec.build("worker-7")
    host.visit(0, 1, NO_WORDS, True, {1: NO_WORDS, 3: b"nonsense", 2: NO_WORDS})
    assert [client for client in range(4) if host.store.reply(client, 1)] == [0, 2]
    warned = [line.message for line in caplog.records if line.levelname == "WARNING"]
    assert [text.endswith("; it is visited again, alone") for text in warned] == [True, True]
    with pytest.raises(NotFiniteError, match=r"^client 1, round 1: "):
        host.visit(1, 1, NO_WORDS, True)
    with pytest.raises(ClientError, match=r"^client 3, round 1, worker-7: .*PseudoLabels"):
        host.visit(3, 1, b"nonsense", True)
    # What is done is not done again, and a group of which but one is left is no group.
    stored = {path: path.stat().st_mtime_ns for path in spec.state.rglob("*") if path.is_file()}
    host.visit(2, 1, NO_WORDS, True, {0: NO_WORDS})
    assert stored == {path: path.stat().st_mtime_ns for path in spec.state.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("error", "says"), [(RuntimeError("torch is ill"), None), (ModelError("no memory"), "no memory")]
)
def test_what_fails_for_all_is_done_in_turn_unless_the_user_must_mend_it(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str | None
) -> None:
    host = make_spec().build("worker-7")
    fine_tune = LanguageModel.fine_tune_together

    def alone_only(model: LanguageModel, lessons: Any) -> Any:
        if len(lessons) > 1:
            raise error
        return fine_tune(model, lessons)

    monkeypatch.setattr(LanguageModel, "fine_tune_together", alone_only)
    if says is None:
        assert host.visit(0, 1, NO_WORDS, False, {2: NO_WORDS}).client_id == 0
        assert host.store.reply(2, 1) is None
        assert host.visit(2, 1, NO_WORDS, False).client_id == 2
    else:
        with pytest.raises(ModelError, match=says):
            host.visit(0, 1, NO_WORDS, False, {2: NO_WORDS})
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("visit")]


def test_clients_whose_batches_differ_in_kind_train_apart(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    common = make_spec().models.training[0]  # type: ignore[attr-defined]
    own = PerClient(common, {1: common.model_copy(update={"packing": True})})
    host = make_spec(private={**PRIVATE, 1: PRIVATE[0]}, training=own).build("worker-7")
    groups = []
    fine_tune = LanguageModel.fine_tune_together

    def spy(model: LanguageModel, lessons: Any) -> Any:
        groups.append([one.training.packing for one in lessons])
        return fine_tune(model, lessons)

    monkeypatch.setattr(LanguageModel, "fine_tune_together", spy)
    host.visit(0, 1, NO_WORDS, False, {1: NO_WORDS, 2: NO_WORDS})
    assert groups == [[False, False], [True]]
    assert all(host.store.reply(client, 1) for client in (0, 1, 2))


def test_a_measurement_is_of_the_model_after_a_round_and_leaves_nothing_behind(make_spec: MakeSpec) -> None:
    spec = make_spec()
    host = spec.build("worker-7")
    base = host.measure(0, 0, b"")
    first, second = (host.visit(0, round, NO_WORDS, True) for round in (1, 2))
    stored = {path: path.read_bytes() for path in spec.state.rglob("*") if path.is_file()}
    for round, visit in ((1, first), (2, second)):
        reply = host.measure(0, round, b"")
        assert reply.evaluation == visit.evaluation
        assert (reply.client_id, reply.round, reply.uplink, reply.num_private) == (0, round, b"", 3)
        assert math.isnan(reply.train_loss)
        assert work(reply.rows, *COLUMNS) == [("evaluate", round, 0, *HERE, 0, 0)]
        of_test = reply.evaluation.nll, reply.evaluation.num_tokens, reply.evaluation.num_bytes
    assert base.evaluation is not None
    assert base.evaluation == host.measure(0, 0, b"").evaluation
    other = host.measure(0, 2, b"", spec.test[1:]).evaluation
    assert (other, len(spec.test)) == (Evaluation(*(values[1:] for values in of_test), ()), 2)
    assert base.evaluation.nll_sum > (first.evaluation or base.evaluation).nll_sum
    assert stored == {path: path.read_bytes() for path in spec.state.rglob("*") if path.is_file()}


def test_what_is_measured_and_exported_is_what_the_client_would_adopt_next(make_spec: MakeSpec, tmp_path: Path) -> None:
    host = make_spec(algorithm=FedAvgLora(Cohort(3, 1.0, 0), (4, 4, 2))).build("worker-7")
    client = host.clients[0]
    average = {key: value + 0.05 for key, value in client.fresh_adapter().items()}
    message = GlobalAdapter(round_number=1, tensors=pack(average, "float32")).encode()
    measured = host.measure(0, 1, message).evaluation
    client.adapter = average
    assert measured == client.evaluate(1)
    host.export_adapter(0, 2, message, tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(written[key.replace(".default", "")], value) for key, value in average.items())
    with pytest.raises(ClientError, match="GlobalAdapter: of round 1, sent in round 1"):
        host.measure(0, 0, message)


def test_the_adapter_of_a_client_is_that_with_which_it_would_start_the_round(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    host = make_spec().build("worker-7")
    for round in (1, 2):
        host.visit(2, round, NO_WORDS, False)
    for before in (2, 3):
        folder = tmp_path / "not" / "there" / f"before {before}"
        for _ in range(2):  # over what is there
            host.export_adapter(2, before, NO_WORDS, folder)
        assert PeftConfig.from_pretrained(folder).r == 2
        of_client = {key.removeprefix("adapter."): value for key, value in host.store.load(2, before=before).items()}
        written = load_file(folder / "adapter_model.safetensors")
        assert len(written) == len(of_client)
        for key, value in of_client.items():
            assert torch.equal(written[key.replace(".default", "")], value)


def test_an_adapter_that_the_disk_has_no_room_for_is_said_to_be_so(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills_the_disk(model: AdapterModel, folder: Path) -> None:
        raise OSError("No space left on device")

    host = make_spec().build("worker-7")
    monkeypatch.setattr(AdapterModel, "export", fills_the_disk)
    with pytest.raises(StorageError, match=f"^cannot write {tmp_path / 'adapters'}: the disk is full"):
        host.export_adapter(2, 1, NO_WORDS, tmp_path / "adapters" / "client_002")


def test_a_model_that_scores_no_number_has_failed_but_for_the_base_model(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    host = spec.build("worker-7")
    scored = Evaluation(nll=(1.0, math.nan), num_tokens=(1, 1), num_bytes=(1, 1), answers=())
    monkeypatch.setattr(Client, "evaluate", lambda client, round: scored)
    assert host.measure(0, 0, b"").evaluation is scored  # of which the driver says what to change
    with pytest.raises(NotFiniteError, match=r"^client 0, round 1: its test NLL is nan; "):
        host.visit(0, 1, NO_WORDS, True)
    assert host.store.reply(0, 1) is None
    host.visit(0, 1, NO_WORDS, False)
    with pytest.raises(NotFiniteError, match=r"^client 0, round 1: its test NLL is nan; "):
        host.measure(0, 1, b"")


def test_a_host_without_public_prompts_sends_none(make_spec: MakeSpec) -> None:
    host = make_spec(public_prompts=b"").build("worker-7")
    assert host.clients[2].prompts == ()
    assert "load" not in [row.stage for row in host.visit(2, 1, NO_WORDS, False).rows[1:]]


def test_a_host_that_does_not_see_the_marked_folder_works_on_files_that_it_is_lent(make_spec: MakeSpec) -> None:
    spec = make_spec()
    host, afar = spec.build("worker-7"), make_spec(mark=".mark-of-another").build("worker-7")
    kept: dict[str, bytes] = {}
    for round in (1, 2, 3):
        reply = host.visit(2, round, NO_WORDS, True)
        with afar.lent(2, kept) as changed:
            lent = afar.visit(2, round, NO_WORDS, True)
        assert [*changed] == [f"round_{round:03d}.safetensors"]
        assert (lent.uplink, lent.train_loss, lent.evaluation) == (reply.uplink, reply.train_loss, reply.evaluation)
        assert not (afar.store.folder / "client_002").exists()  # nothing of a client stays
        kept |= changed
        with afar.lent(2, kept) as again:  # a visit that is asked for again is not done again
            repeated = afar.visit(2, round, b"whatever", True)
            assert msgspec.msgpack.encode(repeated) == msgspec.msgpack.encode(lent)
        assert again == {}
        with afar.lent(2, kept) as measured:
            assert afar.measure(2, round, NO_WORDS).evaluation == reply.evaluation
        assert measured == {}


class Noted:
    """What a host needs of a language model until a client is visited; it notes what it was made of."""

    writes = False
    of = classmethod(LanguageModel.of.__func__)  # type: ignore[attr-defined]

    def __init__(self, name: str, **settings: Any) -> None:
        self.name, self.settings = name, settings

    def fresh_adapter(self, generator: object = None) -> dict[str, torch.Tensor]:
        return {}

    def of_all_ranks(self, place: Place) -> list[Place]:
        return [place, Place(place.node, "GPU-of-another-rank")]


@pytest.mark.usefixtures("one_gpu", "own_threads")
def test_the_model_is_made_of_all_that_the_settings_say(
    make_spec: MakeSpec, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or divided, with every setting far from its default; here on a machine with a GPU."""
    monkeypatch.setattr("semcons_ray.modeling.language_model.LanguageModel", Noted)
    monkeypatch.setattr("semcons_ray.modeling.sharded.ShardedLanguageModel", Noted)
    model = ModelConfig(
        name=str(tiny_llama),
        dtype="float16",
        quantization="8bit",
        max_length=48,
        attn_implementation="eager",
        system_prompt="be brief",
        chat_template_kwargs={"enable_thinking": False},
        template_date=date(2001, 2, 3),
        lora=LoraConfig(rank=3),
    )
    engine, sharding = object(), ShardingConfig(zero_stage=2)
    for device, gpus in (("cpu", "GPU-of-another-rank"), ("cuda", "GPU-0,GPU-of-another-rank")):
        for divided in (None, sharding):
            host = make_spec(model=model, device=device, threads=3, sharding=divided, engine=engine).build("worker-7")
            assert torch.get_num_threads() == 3
            first, second = host.clients[0], host.clients[2]
            settings = {name: getattr(model, name) for name in ModelConfig.model_fields if name != "name"}
            wanted = {**settings, "device": device, "seed": 11} | ({"sharding": sharding} if divided else {})
            one, other = (cast(AdapterModel, client.model) for client in (first, second))
            made: Any = one.base
            assert made.settings.pop("trainings") == (one.training,)
            assert (made.name, made.settings) == (resolve_model(str(tiny_llama)), wanted)
            assert other.base is made
            assert [(each.client_id, each.rank) for each in (one, other)] == [(0, 4), (2, 2)]
            assert one.handover is other.handover
            assert one.handover is not None
            assert one.handover.engine is engine
            assert work(host.ledger.take(), "gpus") == [("load", 0, -1, "worker-7", socket.gethostname(), gpus)]
            assert not host.store.writes  # a rank that is not the first


def test_clients_get_their_data_and_what_all_have_in_common(make_spec: MakeSpec) -> None:
    spec = make_spec()
    host = spec.build("worker-7")
    assert [(pair.prompt, pair.response) for pair in host.clients[2].private] == [
        ("add one and five", "it is five"),
        ("add one and six", "it is six"),
    ]
    for client in (host.clients[0], host.clients[2]):
        assert client.prompts == ("add two and two", "spell one", "spell two")
        assert [(pair.prompt, pair.response) for pair in client.test] == [
            ("spell six", "s i x"),
            ("add one and one", "it is 2"),
        ]
        assert (client.num_answers, client.seed) == (1, 11)
        assert client.ledger is host.ledger
    assert {shape[0] for key, shape in host.adapter_shapes.items() if "lora_A" in key} == {4}
    assert {shape[1] for key, shape in host.adapter_shapes.items() if "lora_B" in key} == {4}
    assert all(torch.equal(host.clients[0].adapter[key], value) for key, value in host.first_adapter.items())


class Idle:
    """A client that is never asked for anything."""

    def restore(self, tensors: dict[str, object]) -> None:
        assert not tensors


class Reading:
    """An algorithm that reads what it is sent, and no more."""

    def visit(self, client: Idle, round: int, downlink: bytes) -> bytes:
        PseudoLabels.decode(downlink)
        return b""

    def adopt(self, client: Idle, round: int, downlink: bytes) -> None:
        self.visit(client, round, downlink)


def test_a_message_that_is_none_is_the_failure_of_the_client_that_got_it(tmp_path: Path) -> None:
    ledger = Ledger("worker-0", "n")
    host = ClientHost({3: Idle()}, Reading(), ClientStore(tmp_path), ledger, prompt_bytes=0)  # type: ignore[arg-type,dict-item]
    for asked in (lambda: host.visit(3, 2, b"nonsense", False), lambda: host.measure(3, 2, b"nonsense")):
        with pytest.raises(ClientError, match=r"^client 3, round 2, worker-0: .*PseudoLabels") as failure:
            asked()
        assert isinstance(failure.value.__cause__, MessageError)
    assert not any(tmp_path.iterdir())
