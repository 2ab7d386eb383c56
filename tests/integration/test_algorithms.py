"""Every algorithm, whole runs of a tiny model: it finishes, counts bytes, and leaves adapters that plain PEFT loads."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest

from semcons_ray.config import AlgorithmName, ExperimentConfig
from semcons_ray.data.split import read_split
from semcons_ray.modeling.language_model import Pair
from semcons_ray.reporting.html import describe_setting, write_report
from semcons_ray.reporting.tables import read_run
from semcons_ray.runs.experiment import run_experiment
from tests.invariants.runs import Silent

pytestmark = pytest.mark.slow

AVERAGING = ("fedavg_lora", "fedprox", "scaffold", "ffa_lora", "flora", "flexlora", "hetlora")
# The tiny Llama: 2 layers, 32 wide, 16 for keys and values, 64 in the MLP; seven maps; float32.
BYTES_PER_RANK = 4 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
MakeConfig = Callable[..., ExperimentConfig]


@pytest.mark.parametrize("name", get_args(AlgorithmName))
def test_runs_and_leaves_the_model_that_it_measured(tiny_config: MakeConfig, tmp_path: Path, name: str) -> None:
    config = tiny_config(algorithm={"name": name, "weight_dtype": "float32"})
    run_experiment(config, tmp_path / "run", Silent())
    metrics = pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    last = metrics[metrics["round"] == 2].set_index("client_id")["nll"]
    assert sorted(last.index) == [0, 1, 2]
    assert (last < metrics.loc[metrics["round"] == 0, "nll"].iloc[0]).all()
    if name in (*AVERAGING, "one_shot_fedavg_lora", "centralized"):
        assert last.nunique() == 1
    else:
        assert last.nunique() == 3
    exported = sorted(path.name for path in (tmp_path / "run" / "adapters").iterdir())
    assert exported == (["client_000"] if name == "centralized" else ["client_000", "client_001", "client_002"])
    assert plain_nll(config, tmp_path / "run") == pytest.approx(last[0], rel=1e-4)


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
        ids, prompt = ours._encode(Pair(example.prompt, example.response))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[prompt - 1 : -1], torch.tensor(ids[prompt:]), reduction="sum")
        total, count = total + float(losses), count + len(ids) - prompt
    return total / count


def test_before_the_first_exchange_it_is_local_training_and_then_labels_are_learnt(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    run_experiment(tiny_config(num_rounds=3, algorithm={"first_exchange": 2}), tmp_path / "late", Silent())
    run_experiment(tiny_config(num_rounds=3, algorithm={"name": "local_only"}), tmp_path / "alone", Silent())
    late, alone = (
        pd.read_parquet(tmp_path / name / "metrics.parquet").set_index(["round", "client_id"])
        for name in ("late", "alone")
    )
    assert late.loc[:2, "nll"].equals(alone.loc[:2, "nll"])
    assert (late.loc[3, "nll"] != alone.loc[3, "nll"]).all()
    assert late["num_pseudo_labels"].groupby("round").max().tolist() == [0, 0, 0, 6]
    answered = sorted(path.name for path in (tmp_path / "late" / "consensus").iterdir())
    assert answered == ["round_002.parquet", "round_003.parquet"]
    uplink = pd.read_parquet(tmp_path / "late" / "ledger.parquet").groupby("round")["uplink_bytes"].sum()
    assert uplink[1] == 0 < uplink[2]
    run = read_run(tmp_path / "late")
    assert sorted(set(run.consensus["round"])) == [2, 3]
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
