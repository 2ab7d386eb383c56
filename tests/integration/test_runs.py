"""Whole experiments on tiny models, in this process: what is in the folder, and whether it adds up."""

import dataclasses
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, Literal, cast

import msgspec
import pandas as pd
import pytest
import yaml
from peft import AutoPeftModelForCausalLM

from semcons_ray.config import ExperimentConfig, LoraConfig
from semcons_ray.distributed.placement import WorkerPlan
from semcons_ray.errors import ModelError
from semcons_ray.evaluation.scores import rouge_l
from semcons_ray.federation.client import Client
from semcons_ray.federation.fleet import Evaluation, Reply
from semcons_ray.messages import NO_LABELS, Answers, PseudoLabels, PublicPrompts
from semcons_ray.metering.energy import EnergyWindow
from semcons_ray.metering.ledger import LedgerRow, Place
from semcons_ray.modeling.embedding import Embedder
from semcons_ray.modeling.language_model import FineTuned, LanguageModel, Lesson
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.reporting import read_run, render_result, write_report
from semcons_ray.runs import experiment, trackers
from semcons_ray.runs.experiment import Rounds, label_churn, resume_experiment, run_experiment
from semcons_ray.runs.run_folder import Commit, MetricsRow, RoundRow
from tests.invariants.runs import Silent, StoppedError

pytestmark = [pytest.mark.slow, pytest.mark.real]

MakeConfig = Callable[..., ExperimentConfig]


def once(fixture_name: str, config: pytest.Config) -> Literal["function", "module"]:
    """Mutation testing knows what a test passes through, but not what a fixture of its module did before."""
    return "function" if "MUTANT_UNDER_TEST" in os.environ else "module"


def test_a_client_with_settings_of_its_own_trains_by_them_and_is_resumed_with_them(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    own = {1: {"training": {"local_steps": 2, "batch_size": 1}, "generation": {"max_new_tokens": 1}}}
    config = tiny_config(num_rounds=1, algorithm={"first_exchange": 1}, clients={"num_clients": 3, "overrides": own})
    run_experiment(config, tmp_path / "run", Silent())
    ledger = pd.read_parquet(tmp_path / "run/ledger.parquet")
    wrote = ledger[ledger["stage"] == "generate"].groupby("client_id")["tokens"].sum()
    assert wrote[1] == 6 < min(wrote[0], wrote[2])
    trained = ledger[ledger["stage"] == "fine_tune"].groupby("client_id")["tokens"].sum()
    assert trained[1] < min(trained[0], trained[2]) / 2
    assert "own: 1." in write_report(tmp_path / "run").read_text(encoding="utf-8")
    resume_experiment(tmp_path / "run", Silent())


@pytest.fixture(scope=once)
def run(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds of three clients, with settings that the defaults don't try."""
    out = tmp_path_factory.mktemp("run") / "out"
    config = tiny_config(
        num_rounds=3,
        data={"partition": "category"},
        prompts={"selection": "k_center"},
        algorithm={"agreement_threshold": 0.5, "rule": "plurality", "first_exchange": 1},
        evaluation={"every": 2},
    )
    run_experiment(config, out, Silent())
    return out


def table(run: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(run / f"{name}.parquet")


def labels_of(run: Path, round: int) -> PseudoLabels:
    votes = table(run, f"consensus/round_{round:03d}")
    chosen = votes[votes["chosen"]].sort_values("prompt_id")
    return PseudoLabels(round_number=round, prompt_ids=tuple(chosen["prompt_id"]), responses=tuple(chosen["answer"]))


def test_a_run_folder_holds_what_it_should(run: Path) -> None:
    write_report(run)
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.yaml", "environment.json", "placement.json", "data.parquet", "data_report.json", "ledger.parquet"),
        *("metrics.parquet", "rounds.parquet", "consensus", "items", "adapters", "state", "report.html", "run.log"),
        "tensorboard",
    }
    answered = [path.name for path in sorted((run / "consensus").iterdir())]
    assert answered == ["round_001.parquet", "round_002.parquet"]  # nobody would learn the last round's labels
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["resources"]["device"] == "cpu"
    assert resolved["model"]["dtype"] == "float32"


def test_metrics_are_there_for_the_base_model_and_each_evaluated_round(run: Path) -> None:
    metrics = table(run, "metrics")
    assert sorted(set(zip(metrics["round"], metrics["client_id"], strict=True))) == [
        (round, client) for round in (0, 2, 3) for client in range(3)
    ]
    base = metrics[metrics["round"] == 0]
    assert base["nll"].nunique() == 1
    assert metrics["perplexity"].tolist() == pytest.approx([math.exp(nll) for nll in metrics["nll"]])


def test_bits_per_byte_are_the_same_likelihood_over_bytes(run: Path) -> None:
    metrics = table(run, "metrics")
    assert (metrics["bits_per_byte"] / metrics["nll"]).nunique() < 4  # one factor, but for rounding
    data = table(run, "data")
    responses = data.loc[data["role"] == "test", "response"]
    model = LanguageModel(
        read_run(run).config["model"]["name"], lora=LoraConfig(), dtype="float32", device="cpu", max_length=64
    )
    tokens = sum(len(model.tokenizer(text)["input_ids"]) + 1 for text in responses)
    num_bytes = sum(len(text.encode()) for text in responses)
    base = metrics[metrics["round"] == 0].iloc[0]
    assert base["bits_per_byte"] == pytest.approx(base["nll"] * tokens / math.log(2) / num_bytes, rel=1e-6)


def test_bytes_are_those_of_the_messages(run: Path) -> None:
    data = table(run, "data")
    ledger = table(run, "ledger")
    num_private = data[data["role"] == "private"].groupby("client_id").size()
    prompts = data.loc[data["role"] == "public", "prompt"]
    downlink = len(PseudoLabels(round_number=0, prompt_ids=(), responses=()).encode("zstd"))
    for round in (1, 2):
        votes = table(run, f"consensus/round_{round:03d}")
        rows = ledger[ledger["round"] == round].set_index(["stage", "client_id"])
        for client, answers in votes.sort_values("prompt_id").groupby("client_id")["answer"]:
            message = Answers(
                round_number=round, client_id=client, num_examples=int(num_private[client]), answers=tuple(answers)
            )
            assert rows.loc[("generate", client), "uplink_bytes"] == len(message.encode("zstd"))
            assert rows.loc[("fine_tune", client), "downlink_bytes"] == downlink
        downlink = len(labels_of(run, round).encode("zstd"))
    last = ledger[ledger["round"] == 3].groupby("stage")[["uplink_bytes", "downlink_bytes"]].sum()
    assert last.loc["fine_tune", "downlink_bytes"] == 3 * downlink
    assert last["uplink_bytes"].sum() == 0
    sent = ledger[ledger["downlink_bytes"].gt(0) & (ledger["stage"] == "load")].set_index(["round", "client_id"])
    once = len(PublicPrompts(prompts=tuple(prompts)).encode("zstd"))
    assert sent["downlink_bytes"].to_dict() == {(1, client): once for client in range(3)}


def test_votes_add_up(run: Path) -> None:
    rounds = table(run, "rounds").set_index("round")
    for round in (1, 2):
        votes = table(run, f"consensus/round_{round:03d}")
        per_prompt = votes.groupby("prompt_id")
        assert (per_prompt["chosen"].sum() == (~per_prompt["abstained"].first()).astype(int)).all()
        assert (per_prompt["abstained"].first() == ~(per_prompt["agreement"].first() >= 0.5 - 1e-6)).all()
        assert rounds.loc[round, "num_labels"] == votes["chosen"].sum()
        assert rounds.loc[round, "mean_agreement"] == pytest.approx(per_prompt["agreement"].first().mean(), rel=1e-6)


def test_private_public_and_test_data_never_overlap(run: Path) -> None:
    data = table(run, "data")
    assert data["prompt"].is_unique
    assert data.groupby("role").size().to_dict() == {"private": 36, "public": 6, "test": 6}


def test_pseudo_labels_are_trained_on_from_the_second_round(run: Path) -> None:
    metrics = table(run, "metrics").set_index(["round", "client_id"])
    labels = table(run, "rounds").set_index("round")["num_labels"]
    assert metrics.loc[(2, 0), "num_pseudo_labels"] == labels[1]
    assert metrics.loc[(3, 0), "num_pseudo_labels"] == labels[2]


def test_adapters_load_in_plain_peft(run: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(run / "adapters" / "client_002")
    assert any("lora_B" in name and bool(value.any()) for name, value in model.named_parameters())


def test_every_joule_and_second_has_a_source(run: Path) -> None:
    ledger = table(run, "ledger")
    assert set(ledger["energy_source"]) <= {"measured", "estimated"}
    assert (ledger["energy_joules"] >= 0).all()
    assert set(ledger["stage"]) == {"load", "fine_tune", "generate", "embed", "consensus", "evaluate", "idle"}
    for _, rows in ledger[ledger["round"] > 0].groupby(["round", "worker"]):
        busy = rows[rows["stage"] != "idle"].sort_values("started_at")
        ends = busy["started_at"] + busy["duration_seconds"]
        assert (
            busy["started_at"].to_numpy()[1:] >= ends.to_numpy()[:-1] - 0.05
        ).all()  # a worker does one thing at once


def test_the_result_names_every_client(run: Path) -> None:
    text = render_result(read_run(run), width=120)
    assert "3 of 3 rounds" in text
    assert "on the wire" in text


def test_local_only_sends_nothing(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_experiment(tiny_config(algorithm={"name": "local_only"}), tmp_path / "out", Silent())
    ledger = table(tmp_path / "out", "ledger")
    assert ledger[["uplink_bytes", "downlink_bytes"]].to_numpy().sum() == 0
    assert not (tmp_path / "out" / "consensus").exists()
    assert write_report(tmp_path / "out").stat().st_size > 0


class Notes(Silent):
    """Keeps all that it is told; stops the run after a round, if asked to."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.told: list[Any] = []
        self.replies: list[Reply] = []
        self.stop_after = stop_after

    def stage(self, text: str) -> None:
        self.told.append(text)

    def planned(self, text: str) -> None:
        self.plan = text

    def round_begins(self, round: int, num_rounds: int, num_participants: int) -> None:
        self.told.append((round, num_rounds, num_participants))

    def client_done(self, reply: Reply) -> None:
        self.told.append(reply.client_id)
        self.replies.append(reply)

    def round_ends(self, commit: Commit) -> None:
        self.told.append((commit.summary, commit.metrics))
        if commit.summary.round == self.stop_after:
            raise StoppedError


class Exported:
    """Keeps what Prometheus would be told."""

    made: "list[Exported]"

    def __init__(self, run: str, num_rounds: int) -> None:
        self.run, self.num_rounds = run, num_rounds
        self.told: list[Any] = []
        self.rows: list[int] = []
        Exported.made.append(self)

    def start(self) -> None:
        assert not self.told

    def stop(self) -> None:
        self.told.append("closed")

    def round_begins(self, round: int, num_clients: int) -> None:
        self.told.append((round, num_clients))

    def client_answered(self) -> None:
        self.told.append("answered")

    def round_committed(self, rows: Iterable[LedgerRow], **values: float) -> None:
        self.rows.append(len(list(rows)))
        self.told.append(values)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Exported]:
    Exported.made = []
    monkeypatch.setattr(trackers, "RunMetrics", Exported)
    return Exported.made


def test_a_run_that_is_stopped_loses_clients_and_goes_on_is_told_and_written_as_it_was(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: list[Exported]
) -> None:
    """Of four clients, two fail in round 2 of three; the run stops after it, and goes on."""
    out, fine_tune, place = tmp_path / "out", Client.fine_tune, experiment.place

    def failing(client: Client, round: int, *args: Any, **more: Any) -> None:
        if round == 2 and client.client_id in (1, 3):
            raise RuntimeError("it fell ill")
        fine_tune(client, round, *args, **more)

    def warned(*args: Any) -> experiment.Placement:
        return dataclasses.replace(place(*args), notes=("  a GPU is not used", "  nor is another"))

    monkeypatch.setattr(Client, "fine_tune", failing)
    monkeypatch.setattr(experiment, "place", warned)
    config = tiny_config(
        server={"embedding_model": "packaged:all-minilm-l6-v2"},
        num_rounds=3,
        clients={"num_clients": 4},
        algorithm={"first_exchange": 1, "agreement_threshold": 0.3, "compression": "none"},
        evaluation={"every": 2},
    )
    first, then = Notes(stop_after=2), Notes()
    with pytest.raises(StoppedError):
        run_experiment(config, out, first, alone=False)
    assert json.loads((out / "placement.json").read_text())["alone"] is False
    resume_experiment(out, then)

    # What the user is told, in order.
    plan = then.plan.split("\n")
    assert plan[0] == "4 clients on 1 workers, 1 node, device cpu"
    assert plan[2].startswith("  GiB of a worker of ")
    assert plan[3:] == ["  a GPU is not used", "  nor is another"]
    summaries = [told for told in first.told + then.told if isinstance(told, tuple) and isinstance(told[0], RoundRow)]
    ends = {row.round: (row, metrics) for row, metrics in summaries}
    beginning = ["reading data", "finding models", "loading models"]
    assert first.told == [
        *beginning, (0, 3, 1), 0, ends[0], (1, 3, 4), 0, 1, 2, 3, ends[1], (2, 3, 4), 0, 2, ends[2],
    ]  # fmt: skip
    assert then.told == [*beginning, (3, 3, 4), 0, 1, 2, 3, ends[3], "writing adapters"]

    # The rounds.
    rounds, ledger, metrics = table(out, "rounds"), table(out, "ledger"), table(out, "metrics")
    told = pd.DataFrame([msgspec.structs.asdict(ends[round][0]) for round in range(4)])
    pd.testing.assert_frame_equal(rounds, told, check_exact=True)
    assert rounds["num_participants"].tolist() == [1, 4, 4, 4]
    assert rounds["num_answered"].tolist() == [1, 4, 2, 4]
    ill = "client {}, round 2, worker-0: RuntimeError: it fell ill"
    assert rounds["lost"].tolist() == ["", "", "1, 3", ""]
    assert rounds["failures"].tolist() == ["", "", f"{ill.format(1)}; {ill.format(3)}", ""]
    labels = [NO_LABELS, *(labels_of(out, round) for round in (1, 2))]
    assert rounds["num_labels"].tolist() == [*(len(each.prompt_ids) for each in labels), 0]
    agreement = [math.nan] * 4
    churn = [math.nan] * 4
    for round in (1, 2):
        agreement[round] = table(out, f"consensus/round_{round:03d}").groupby("prompt_id")["agreement"].first().mean()
        old, new = (dict(zip(each.prompt_ids, each.responses, strict=True)) for each in labels[round - 1 : round + 1])
        if round > 1:
            churn[round] = sum(old.get(prompt) != new.get(prompt) for prompt in range(6)) / 6
    assert rounds["mean_agreement"].tolist() == pytest.approx(agreement, nan_ok=True)
    assert rounds["label_churn"].tolist() == pytest.approx(churn, nan_ok=True)
    assert 0 < churn[2] < 1
    ended = rounds["started_at"] + rounds["duration_seconds"]
    assert (rounds["started_at"].to_numpy()[1:] >= ended.to_numpy()[:-1] - 1e-3).all()
    assert rounds["started_at"][0] <= ledger["started_at"].min()

    # The ledger has all that clients did, with the bytes of the labels, and what nobody did.
    replies = first.replies + then.replies
    columns = ["round", "client_id", "stage", "tokens", "uplink_bytes", "downlink_bytes", "started_at"]
    of_clients = ledger[(ledger["worker"] == "worker-0") & (ledger["stage"] != "idle")][columns]
    expected = pd.DataFrame([msgspec.structs.asdict(row) for reply in replies for row in reply.rows])[columns]
    order = ["round", "started_at"]
    pd.testing.assert_frame_equal(
        of_clients.sort_values(order).reset_index(drop=True), expected.sort_values(order).reset_index(drop=True)
    )
    sent = ledger[ledger["stage"] == "fine_tune"].groupby("round")["downlink_bytes"].agg(["min", "max"])
    for round in (1, 2, 3):
        assert sent.loc[round].tolist() == [len(labels[round - 1].encode("none"))] * 2
    idle = ledger[ledger["stage"] == "idle"].groupby("round")["worker"].agg(sorted)
    assert idle.tolist() == [["server", "worker-0"]] * 4
    assert set(ledger["node"]) == {socket.gethostname()}
    assert set(ledger["energy_source"]) <= {"measured", "estimated"}

    # The metrics are those of the replies.
    data = table(out, "data")
    references = data.loc[data["role"] == "test", "response"].tolist()[:3]
    embedder = Embedder(resolve_model(config.server.embedding_model))
    wanted = []
    measured = {(reply.round, reply.client_id): reply for reply in replies if reply.evaluation}
    assert sorted(measured) == [(0, 0), (2, 0), (2, 2), *((3, client) for client in range(4))]
    for round, client in [*((0, client) for client in range(4)), *(key for key in sorted(measured) if key[0])]:
        reply = measured[round, client if round else 0]
        of = cast(Evaluation, reply.evaluation)
        cosines = (embedder.embed(of.answers) * embedder.embed(references)).sum(dim=1).tolist()
        wanted.append(
            MetricsRow(
                round=round,
                client_id=client,
                model=config.model.name,
                nll=of.nll_sum / sum(of.num_tokens),
                perplexity=math.exp(of.nll_sum / sum(of.num_tokens)),
                bits_per_byte=of.nll_sum / math.log(2) / sum(of.num_bytes),
                rouge_l=fmean(map(rouge_l, of.answers, references)),
                similarity=fmean(cosine if text else 0.0 for cosine, text in zip(cosines, of.answers, strict=True)),
                train_loss=reply.train_loss if round else math.nan,
                num_private=12,
                num_pseudo_labels=len(labels[round - 1].prompt_ids) if round else 0,
            )
        )
    expected = pd.DataFrame([msgspec.structs.asdict(row) for row in wanted]).drop(columns="others")
    pd.testing.assert_frame_equal(metrics, expected)

    # Prometheus is told the same; by the second process, what the first had done as well.
    by_round = metrics.groupby("round")

    def committed(round: int) -> Any:
        means = by_round.get_group(round)[["bits_per_byte", "nll"]].mean() if round in by_round.groups else {}
        values = {
            "num_lost": 2 if round == 2 else 0,
            "bits_per_byte": means.get("bits_per_byte", math.nan),
            "nll": means.get("nll", math.nan),
            "agreement": agreement[round],
        }
        return pytest.approx(values, nan_ok=True)

    answered = [(round, 4 if round else 1) for round in range(4)]
    steps = [[answered[round], *["answered"] * {0: 1, 2: 2}.get(round, 4), committed(round)] for round in range(4)]
    assert [(each.run, each.num_rounds) for each in exported] == [("out", 3)] * 2
    assert exported[0].told == [*(step for round in range(3) for step in steps[round]), "closed"]
    again = [committed(round) for round in range(3)]
    assert exported[1].told == [*again, *steps[3], "closed"]

    assert exported[1].rows[:3] == exported[0].rows
    assert sum(exported[1].rows) == len(ledger)

    # And where it ran.
    placement = json.loads((out / "placement.json").read_text())
    assert {key: placement[key] for key in ("device", "engines", "alone")} == {
        "device": "cpu",
        "engines": [],
        "alone": True,
    }
    [worker], [here] = placement["workers"], placement["nodes"]
    assert (worker["name"], worker["clients"], worker["node"]) == ("worker-0", [0, 1, 2, 3], here["name"])
    assert list(placement["energy_meters"]) == [socket.gethostname()]
    assert sorted(path.name for path in (out / "adapters").iterdir()) == [f"client_00{client}" for client in range(4)]

    # Once it is finished, only the tables are written again.
    shutil.rmtree(out / "rounds.parquet")
    last = Notes()
    resume_experiment(out, last)
    assert last.told == []
    pd.testing.assert_frame_equal(table(out, "rounds"), rounds)


def test_centralized_training_is_of_one_client_with_all_data(tiny_config: MakeConfig, tmp_path: Path) -> None:
    notes, out = Notes(), tmp_path / "out"
    run_experiment(tiny_config(num_rounds=1, algorithm={"name": "centralized"}), out, notes)
    metrics = table(out, "metrics").set_index(["round", "client_id"])
    assert [(reply.round, reply.client_id) for reply in notes.replies] == [(0, 0), (1, 0)]
    assert metrics["num_private"].tolist() == [36, 0, 0] * 2
    assert metrics.loc[1, "nll"].nunique() == 1  # its model is everyone's
    assert metrics.loc[(1, 0), "nll"] < metrics.loc[(0, 0), "nll"]
    assert [path.name for path in (out / "adapters").iterdir()] == ["client_000"]


@pytest.mark.parametrize(
    ("algorithm", "evaluation", "is_made"),
    [
        ("fedavg_lora", {"num_answers": 0}, False),
        ("fedavg_lora", {"metrics": ["nll"]}, False),
        ("fedavg_lora", {}, True),
        ("semantic_consensus", {"num_answers": 0}, True),
    ],
)
def test_a_server_with_nothing_to_embed_is_not_made(
    algorithm: str, evaluation: dict[str, Any], is_made: bool, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    run_experiment(tiny_config(num_rounds=1, algorithm={"name": algorithm}, evaluation=evaluation), tmp_path / "out")
    assert ("server" in set(table(tmp_path / "out", "ledger")["worker"])) == is_made


def test_each_architecture_is_measured_once_before_training(
    tiny_config: MakeConfig, tiny_llama: Path, tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    exported: list[Exported],
) -> None:  # fmt: skip
    names = [str(tiny_llama), str(tiny_qwen)]
    config = tiny_config(
        num_rounds=1, clients={"mix": {names[0]: 2, names[1]: 1}}, algorithm={"name": "local_only"},
        evaluation={"num_answers": 0},
    )  # fmt: skip
    models, notes = config.client_models(), Notes()
    run_experiment(config, tmp_path / "out", notes)
    firsts = sorted(models.index(name) for name in names)
    assert [reply.client_id for reply in notes.replies if reply.round == 0] == firsts
    metrics = table(tmp_path / "out", "metrics").set_index(["round", "client_id"])
    assert metrics.loc[0, "model"].tolist() == [*models]
    assert metrics.loc[0].groupby("model")["nll"].nunique().tolist() == [1, 1]
    assert metrics.loc[0, "nll"].nunique() == 2
    assert metrics[["rouge_l", "similarity"]].isna().all(axis=None)  # nothing was answered
    # Nats a token of different tokenizers have no mean.
    values = [told for told in exported[0].told if isinstance(told, dict)]
    assert [math.isnan(each["nll"]) for each in values] == [True, True]
    assert values[1]["bits_per_byte"] == pytest.approx(metrics.loc[1, "bits_per_byte"].mean())

    evaluate = Client.evaluate

    def overflowing(client: Client, round: int) -> Evaluation:
        found = evaluate(client, round)
        mine = client.model.base.name == names[0]  # type: ignore[attr-defined]
        return found if mine else msgspec.structs.replace(found, nll=(math.inf,) * 6)

    monkeypatch.setattr(Client, "evaluate", overflowing)
    says = f"^the base model {names[1]} has a test NLL of inf in float32: set model.dtype to bfloat16 or float32$"
    with pytest.raises(ModelError, match=says):
        run_experiment(config, tmp_path / "other", Notes())


def test_a_label_that_is_new_gone_or_another_has_changed() -> None:
    before = PseudoLabels(round_number=1, prompt_ids=(0, 1, 2), responses=("a", "b", "c"))
    after = PseudoLabels(round_number=2, prompt_ids=(1, 2, 3), responses=("b", "x", "d"))
    assert label_churn(before, after, 8) == 3 / 8  # 0 is gone, 2 is another, 3 is new
    assert label_churn(before, before, 8) == 0.0
    assert math.isnan(label_churn(NO_LABELS, after, 8))


def test_beside_other_runs_only_the_counters_of_whole_gpus_are_its_own() -> None:
    windows = [EnergyWindow("n", 1.0, 0.0, 1.0, f"GPU-{index}") for index in range(3)]

    def worker(name: str, gpus: float) -> WorkerPlan:
        return WorkerPlan(name, "n", "n", "m", (0,), 1, gpus, 1)

    fleet = SimpleNamespace(
        laps=lambda: windows, workers={f"worker-{index}": Place("n", f"GPU-{index}") for index in range(2)}
    )
    placement = SimpleNamespace(workers=(worker("worker-0", 1.0), worker("worker-1", 0.5)))
    of = {"placement": placement, "fleet": fleet}
    others = dict.fromkeys(("folder", "split", "method", "server", "observer"))
    for alone, own in ((True, windows), (False, windows[:1])):
        assert Rounds(**cast(Any, of | others), alone=alone)._windows() == own


def test_a_run_whose_clients_train_together_has_the_numbers_of_turns_but_for_rounding(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    fine_tune = LanguageModel.fine_tune_together

    def spy(model: LanguageModel, lessons: Sequence[Lesson]) -> list[FineTuned]:
        groups.append(len(lessons))
        return fine_tune(model, lessons)

    monkeypatch.setattr(LanguageModel, "fine_tune_together", spy)
    tables = []
    for count in (1, 2):
        groups.clear()
        out = tmp_path / str(count)
        run_experiment(tiny_config(num_rounds=1, training={"train_together": count}), out)
        tables.append((pd.read_parquet(out / "metrics.parquet"), pd.read_parquet(out / "ledger.parquet")))
    assert groups[-2:] == [2, 1]  # the third client is left over
    assert groups.count(2) == 2  # the model was tried, and two clients trained
    turns, together = tables
    pd.testing.assert_frame_equal(together[0], turns[0], rtol=1e-4)
    work = [
        table.query("stage == 'fine_tune'").set_index("client_id")[["round", "tokens", "downlink_bytes"]].sort_index()
        for _, table in tables
    ]
    pd.testing.assert_frame_equal(*work)
