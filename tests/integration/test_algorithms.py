"""Every algorithm, whole runs of a tiny model: it finishes, counts bytes, and leaves adapters that plain PEFT loads."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from semcons_ray.config import AlgorithmConfig, ExperimentConfig
from semcons_ray.data.split import read_split
from semcons_ray.errors import ModelError, QuorumError
from semcons_ray.federation.client import Client
from semcons_ray.federation.fleet import Reply
from semcons_ray.messages import PseudoLabels
from semcons_ray.modeling.language_model import LanguageModel
from semcons_ray.modeling.optimizer import AdamW
from semcons_ray.parts import BUILT_IN
from semcons_ray.reporting.html import describe_setting, write_report
from semcons_ray.reporting.tables import read_run
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from tests.invariants.runs import Silent, StoppedError, assert_same_run

pytestmark = pytest.mark.slow

AVERAGING = [name for name in BUILT_IN["algorithm"] if AlgorithmConfig(name=name).averages_weights]
# The tiniest Llama: 1 layer, 32 wide, 16 for keys and values, 64 in the MLP; seven maps; float32.
BYTES_PER_RANK = 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
WIRE = {"weight_dtype": "float32"}
MakeConfig = Callable[..., ExperimentConfig]


@pytest.mark.parametrize("name", BUILT_IN["algorithm"])
def test_runs_and_leaves_the_model_that_it_measured(tiny_config: MakeConfig, tmp_path: Path, name: str) -> None:
    config = tiny_config(algorithm={"name": name, **(WIRE if name in AVERAGING else {})})
    run_experiment(config, tmp_path / "run", Silent())
    metrics = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    last = metrics[metrics["round"] == 2].set_index("client_id")["nll"]
    assert sorted(last.index) == [0, 1, 2]
    assert (last < metrics.loc[metrics["round"] == 0, "nll"].iloc[0]).all()
    if name in (*AVERAGING, "centralized") and name != "fedsa_lora":
        assert last.nunique() == 1
    else:
        assert last.nunique() == 3
    exported = sorted(path.name for path in (tmp_path / "run" / "adapters").iterdir())
    assert exported == (["client_000"] if name == "centralized" else ["client_000", "client_001", "client_002"])
    assert plain_nll(config, tmp_path / "run") == pytest.approx(last[0], rel=1e-4)


@pytest.mark.parametrize("name", [*AVERAGING, "logit_exchange"])
def test_a_run_that_was_stopped_in_mid_round_goes_on_to_the_same_numbers(
    tiny_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    """With two of three clients a round, so that each begins from what it missed."""
    config = tiny_config(num_rounds=4, algorithm={"name": name}, clients={"participation": 0.67})
    run_experiment(config, tmp_path / "whole", Silent())
    seen: list[int] = []

    def stop(reply: Reply) -> None:
        seen.append(reply.round)
        if seen.count(3) == 1:
            raise RuntimeError

    with pytest.raises(StoppedError):
        run_experiment(config, tmp_path / "stopped", Silent(stop))
    resume_experiment(tmp_path / "stopped", Silent())
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def plain_nll(config: ExperimentConfig, out: Path) -> float:
    """Test NLL of client 0's exported adapter, by transformers and PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from semcons_ray.modeling.language_model import LanguageModel

    ours = LanguageModel(config.model.name, lora=config.model.lora, dtype="float32", device="cpu", max_length=64)
    base = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(out / "adapters" / "client_000")).eval()
    total, count = 0.0, 0
    for example in read_split(out / "data.parquet").test:
        text = ours.chat.encode(example.prompt, example.response)
        ids, [(prompt, _)] = text.ids, text.learnt
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[prompt - 1 : -1], torch.tensor(ids[prompt:]), reduction="sum")
        total, count = total + float(losses), count + len(ids) - prompt
    return total / count


def test_before_the_first_exchange_it_is_local_training_and_then_labels_are_learnt(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    run_experiment(tiny_config(num_rounds=3), tmp_path / "late", Silent())
    final = {"answer_last_round": True}
    run_experiment(tiny_config(num_rounds=3, algorithm=final), tmp_path / "final", Silent())
    run_experiment(tiny_config(num_rounds=3, algorithm={"name": "local_only"}), tmp_path / "alone", Silent())
    late, alone = (
        pd.read_parquet(tmp_path / name / "metrics.parquet").set_index(["round", "client_id"])
        for name in ("late", "alone")
    )
    assert late.loc[:2, "nll"].equals(alone.loc[:2, "nll"])
    assert (late.loc[3, "nll"] != alone.loc[3, "nll"]).all()
    assert late["num_pseudo_labels"].groupby("round").max().tolist() == [0, 0, 0, 6]
    assert len([*(tmp_path / "final" / "consensus").iterdir()]) == 2
    metrics = [
        [path.read_bytes() for path in sorted((tmp_path / name / "metrics.parquet").iterdir())]
        for name in ("late", "final")
    ]
    assert metrics[0] == metrics[1]  # answers that nobody learns change nothing
    answered = sorted(path.name for path in (tmp_path / "late" / "consensus").iterdir())
    assert answered == ["round_002.parquet"]
    uplink = pd.read_parquet(tmp_path / "late" / "ledger.parquet").groupby("round")["uplink_bytes"].sum()
    assert uplink[1] == 0 < uplink[2]
    run = read_run(tmp_path / "late")
    assert sorted(set(run.consensus["round"])) == [2]
    assert "From round 2 on they answer 6 public prompts" in describe_setting(run.config)
    write_report(tmp_path / "late")
    assert (tmp_path / "late" / "report.html").stat().st_size > 0


def test_bytes_are_those_of_the_messages(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(algorithm={"name": "fedavg_lora", "compression": "none"}, num_rounds=3)
    run_experiment(config, tmp_path / "run", Silent())
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    per_round = ledger.groupby("round")[["uplink_bytes", "downlink_bytes"]].sum()
    half_precision = 3 * 8 * BYTES_PER_RANK / 2
    assert (per_round.loc[1:, "uplink_bytes"] / half_precision).between(1.0, 1.25).all()
    assert per_round.loc[1, "downlink_bytes"] == 0
    assert (per_round.loc[2:, "downlink_bytes"] / half_precision).between(1.0, 1.25).all()


def test_adapters_of_unequal_rank_are_smaller_and_meet_in_one_model(tiny_config: MakeConfig, tmp_path: Path) -> None:
    for name in ("flora", "flexlora", "hetlora"):
        config = tiny_config(
            algorithm={"name": name, "compression": "none", "weight_dtype": "float32"},
            clients={"num_clients": 3, "lora_ranks": [2, 8]},
        )
        run_experiment(config, tmp_path / name, Silent())
        ledger = pd.read_parquet(tmp_path / name / "ledger.parquet")
        sent = ledger[ledger["round"] == 1].groupby("client_id")["uplink_bytes"].sum()
        assert sent[1] - sent[0] == pytest.approx(6 * BYTES_PER_RANK, abs=100)  # beside a header that names the tensors
        assert sent[2] == sent[0]
        metrics = pd.read_parquet(tmp_path / name / "metrics.parquet")
        last = metrics[metrics["round"] == 2].set_index("client_id")["nll"]
        assert last[0] == last[2]
        assert (last < metrics.loc[metrics["round"] == 0, "nll"].iloc[0]).all()


@pytest.mark.parametrize("name", ["semantic_consensus", "fedavg_lora"])
def test_a_client_whose_numbers_are_not_finite_is_named_and_neither_votes_nor_is_averaged(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fine_tune = Client.fine_tune

    def diverging(client: Client, round: int, labels: PseudoLabels, **more: Any) -> None:
        fine_tune(client, round, labels, **more)
        if (client.client_id, round) == (1, 2):
            client.adapter = {key: value * math.inf for key, value in client.adapter.items()}

    monkeypatch.setattr(Client, "fine_tune", diverging)
    run_experiment(tiny_config(num_rounds=3, algorithm={"name": name}), tmp_path / "run", Silent())
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet").set_index("round")
    assert rounds["lost"].tolist() == ["", "", "1", ""]
    assert rounds["num_answered"].tolist()[1:] == [3, 2, 3]
    assert rounds.loc[2, "failures"].startswith("client 1, round 2: ")
    assert "training.learning_rate is probably too high" in rounds.loc[2, "failures"]
    metrics = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    assert metrics["nll"].map(math.isfinite).all()
    if name == "semantic_consensus":
        votes = pd.read_parquet(tmp_path / "run" / "consensus" / "round_002.parquet")
        assert votes.loc[votes["client_id"] == 1, "answer"].eq("").all()
        assert sorted(metrics.loc[metrics["round"] == 2, "client_id"]) == [0, 2]


def test_all_clients_diverging_is_a_failed_round_that_names_the_setting(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tiny_config(training={"learning_rate": 1e20})
    with pytest.raises(QuorumError, match=r"client 2, round 1: its training loss is nan; training\.learning_rate"):
        run_experiment(config, tmp_path / "run", Silent())


def test_a_base_model_whose_score_is_not_finite_is_refused_before_training(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = LanguageModel.negative_log_likelihood
    monkeypatch.setattr(
        LanguageModel, "negative_log_likelihood", lambda *a, **k: score(*a, **k)._replace(nll=(math.nan,) * 6)
    )
    with pytest.raises(ModelError, match=r"the base model .* has a test NLL of nan in float32: set model\.dtype"):
        run_experiment(tiny_config(), tmp_path / "run", Silent())
    assert not [*tmp_path.glob("run/state/client_*/*")]


def test_after_a_failed_visit_a_host_is_what_it_was(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 0 breaks off in the midst of training, in a model that drops out; the others' numbers stay as they are."""
    config = tiny_config(algorithm={"name": "local_only"}, model={"lora": {"dropout": 0.3}}, num_rounds=1)
    run_experiment(config, tmp_path / "whole", Silent())
    step, steps = AdamW.step, []

    def breaking(self: AdamW) -> None:
        steps.append(self)
        if len(steps) == 2:
            raise RuntimeError("broke")
        step(self)

    monkeypatch.setattr(AdamW, "step", breaking)
    run_experiment(config, tmp_path / "broken", Silent())
    ends = [
        pd.read_parquet(tmp_path / name / "metrics.parquet").set_index(["round", "client_id"])["nll"]
        for name in ("whole", "broken")
    ]
    assert 0 not in ends[1][1].index
    assert ends[1][1].to_dict() == ends[0][1][[1, 2]].to_dict()
