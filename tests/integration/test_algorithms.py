"""Every algorithm, whole runs of a tiny model: it finishes, counts bytes, and leaves adapters that plain PEFT loads."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest

from semcons_ray.config import AlgorithmName, ExperimentConfig
from semcons_ray.data.split import read_split
from semcons_ray.experiment import run_experiment
from semcons_ray.modeling.language_model import Pair
from tests.invariants.runs import Silent

pytestmark = pytest.mark.slow

AVERAGING = ("fedavg_lora", "fedprox", "scaffold", "ffa_lora", "flora", "flexlora", "hetlora")
MakeConfig = Callable[..., ExperimentConfig]


def run(config: ExperimentConfig, out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    run_experiment(config, out, Silent())
    return pd.read_parquet(out / "metrics.parquet"), pd.read_parquet(out / "ledger.parquet")


@pytest.mark.parametrize("name", get_args(AlgorithmName))
def test_runs_and_leaves_the_model_that_it_measured(tiny_config: MakeConfig, tmp_path: Path, name: str) -> None:
    config = tiny_config(algorithm={"name": name, "weight_dtype": "float32"})
    metrics, ledger = run(config, tmp_path / "run")
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
