"""A run that mixes a model on two DeepSpeed ranks with a plain one: it completes, survives a kill, and resumes."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
from peft import PeftModel

import semcons_ray as sr
from semcons_ray.config import ExperimentConfig, GenerationConfig, LoraConfig, ShardingConfig
from semcons_ray.data.split import read_split
from semcons_ray.federation.fleet import Reply
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from tests.invariants.runs import Silent, assert_same_run
from tests.invariants.test_virtual_time import FEDERATION

pytestmark = [
    *(pytest.mark.ray, pytest.mark.slow, pytest.mark.real, pytest.mark.deepspeed),
    pytest.mark.usefixtures("one_cluster"),
]

PLAIN = 2
"""The client whose model is whole; 0 and 1 share the other one."""


@pytest.fixture(scope="module")
def config(tiny_config: Callable[..., ExperimentConfig], tiny_llama: Path, tiny_qwen: Path) -> ExperimentConfig:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install --no-deps -r requirements-deepspeed.lock")
    return tiny_config(
        clients={"num_clients": 3, "mix": {str(tiny_llama): 2, str(tiny_qwen): 1}},
        resources={"fleet": "ray", "device": "cpu"},
        sharding={"models": {str(tiny_llama): 2}},
        federation=FEDERATION,
    )


@pytest.fixture(scope="module")
def undisturbed(config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    observer, out = Silent(), tmp_path_factory.mktemp("undisturbed") / "run"
    run_experiment(config, out, observer)
    assert "2 ranks of 1 thread" in observer.plan
    return out


def rank_processes() -> list[psutil.Process]:
    """The ranks of this run, which alone are told what DeepSpeed is to work on."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "DS_ACCELERATOR" in child.environ() and child.name().startswith("ray::"):
                found.append(child)
    return found


def test_a_mixed_run_is_that_of_the_fleet_without_ranks(
    config: ExperimentConfig, undisturbed: Path, tmp_path: Path
) -> None:
    """Greedy answers, votes and adapters of clients on ranks are close to those of clients on one process."""
    metrics = pd.read_parquet(undisturbed / "metrics.parquet").set_index(["round", "client_id"])
    assert sorted(metrics.index) == [(round, client) for round in range(3) for client in range(3)]
    resources = config.resources.model_copy(update={"fleet": "local"})
    whole = config.model_copy(update={"sharding": ShardingConfig(), "resources": resources})
    run_experiment(whole, tmp_path / "run", Silent())
    expected = pd.read_parquet(tmp_path / "run" / "metrics.parquet").set_index(["round", "client_id"])
    # Round 1 trains on private data alone; what follows hangs on answers that are drawn, differently on each rank.
    for round in (0, 1):
        pd.testing.assert_series_equal(metrics.nll[round], expected.nll[round], rtol=1e-5)
        pd.testing.assert_series_equal(metrics.rouge_l[round], expected.rouge_l[round], rtol=1e-5)
    # Whose work is divided among ranks takes as long by the clock, which knows devices and no ranks.
    seconds = [pd.read_parquet(run / "rounds.parquet")["virtual_seconds"] for run in (undisturbed, tmp_path / "run")]
    assert seconds[0][1] == pytest.approx(seconds[1][1], rel=1e-3)
    assert sr.replay(undisturbed).totals["hours"].iloc[0] * 3600 == pytest.approx(seconds[0].iloc[-1])


def test_a_rank_killed_in_mid_round_changes_nothing_and_only_its_group_is_replaced(
    config: ExperimentConfig, undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed: list[int] = []

    def kill_once(reply: Reply) -> None:
        if reply.round == 1 and not killed:
            victim = rank_processes()[-1]
            killed.append(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)

    run_experiment(config, tmp_path / "run", Silent(kill_once))
    assert killed
    assert_same_run(undisturbed, tmp_path / "run")
    assert "attempt 1: " in caplog.text
    assert f"client {PLAIN}, attempt" not in caplog.text
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    # Rows of later rounds are the public prompts, of which each client gets its copy.
    loads = ledger[(ledger.stage == "load") & (ledger["round"] == 0)].groupby("worker").size()
    assert sorted(loads.drop("server")) == [1, 2]


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_trained_on_ranks_scores_in_plain_peft_what_was_measured(
    config: ExperimentConfig, undisturbed: Path, tiny_llama: Path
) -> None:
    metrics = pd.read_parquet(undisturbed / "metrics.parquet").set_index(["round", "client_id"])
    plain = LanguageModel(
        str(tiny_llama), lora=LoraConfig(), dtype="float32", device="cpu", max_length=config.model.max_length
    )
    plain.model = PeftModel.from_pretrained(plain.model.unload(), undisturbed / "adapters" / "client_000").eval()
    plain._parameters = {}
    test = [Pair(example.prompt, example.response) for example in read_split(undisturbed / "data.parquet").test]
    score = plain.negative_log_likelihood({}, test, GenerationConfig().batch_size)
    assert score.nll_sum / sum(score.num_tokens) == pytest.approx(metrics.nll[(2, 0)], rel=1e-5)


def test_a_run_stopped_in_mid_round_resumes_to_the_same_numbers(
    config: ExperimentConfig, undisturbed: Path, tmp_path: Path
) -> None:
    def stop(reply: Reply) -> None:
        if reply.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, tmp_path / "run", Silent(stop))
    deadline = time.monotonic() + 30  # the cluster, which goes on, ends them after the run has
    while rank_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not rank_processes()
    resume_experiment(tmp_path / "run", Silent())
    assert_same_run(undisturbed, tmp_path / "run")
