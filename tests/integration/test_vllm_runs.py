"""Whole runs with a vLLM engine: under both fleets, and when the engine is killed in mid-round."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import semcons_ray as sr
from semcons_ray.config import ExperimentConfig
from semcons_ray.errors import ConfigError
from semcons_ray.federation.fleet import Reply
from semcons_ray.modeling import vllm_engine
from semcons_ray.runs.experiment import run_experiment
from tests.invariants.runs import Silent
from tests.invariants.test_kills import kill_actor
from tests.invariants.test_virtual_time import FEDERATION

MakeConfig = Callable[..., ExperimentConfig]

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
    pytest.mark.filterwarnings("ignore"),
]

VLLM = {"engine": "vllm", "temperature": 0.0}
SMALL_CACHE = {"engine_cache_gib": 0.1}


def run_config(tiny_config: MakeConfig, model: Path, **resources: object) -> ExperimentConfig:
    settings = {"generation": VLLM, "resources": {**SMALL_CACHE, **resources}, "federation": FEDERATION}
    return tiny_config(model={"name": str(model)}, **settings)


def answers(run: Path) -> list[pd.DataFrame]:
    columns = ["prompt_id", "client_id", "answer", "chosen"]
    return [pd.read_parquet(path)[columns] for path in sorted(run.glob("consensus/*.parquet"))]


def test_without_vllm_the_run_is_refused_before_anything_is_loaded(
    tiny_config: MakeConfig, wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        run_experiment(run_config(tiny_config, wide_llama, fleet="local"), tmp_path / "run", Silent())


class KillsAnEngine(Silent):
    """Kills an engine after the first reply of round 1."""

    def __init__(self) -> None:
        super().__init__(self.kill)
        self.has_killed = False

    def kill(self, reply: Reply) -> None:
        if reply.round == 1 and not self.has_killed:
            self.has_killed = True
            kill_actor("ray::EngineActor")


class TestRuns:
    pytestmark = needs_vllm

    def test_an_engine_killed_in_mid_round_is_replaced_and_both_fleets_give_the_answers_of_transformers(
        self, tiny_config: MakeConfig, wide_llama: Path, tmp_path: Path
    ) -> None:
        """float32 and greedy on a tiny model: no ties, so the answers are equal to the letter."""
        settings = {"generation": {"temperature": 0.0}, "federation": FEDERATION}
        plain = tiny_config(model={"name": str(wide_llama)}, **settings)
        run_experiment(plain, tmp_path / "plain", Silent())
        observer = KillsAnEngine()
        run_experiment(run_config(tiny_config, wide_llama, fleet="ray", max_workers=1), tmp_path / "ray", observer)
        assert observer.has_killed
        assert "engine-0 on " in observer.plan
        run_experiment(run_config(tiny_config, wide_llama, fleet="local"), tmp_path / "local", Silent())
        for name in ("ray", "local"):
            for mine, theirs in zip(answers(tmp_path / name), answers(tmp_path / "plain"), strict=True):
                pd.testing.assert_frame_equal(mine, theirs)
        runs = ("plain", "ray", "local")
        seconds = [pd.read_parquet(tmp_path / name / "rounds.parquet")["virtual_seconds"].tolist() for name in runs]
        assert seconds[0] == seconds[1] == seconds[2]
        assert seconds[0][-1] == pytest.approx(sr.replay(tmp_path / "ray").totals["hours"].iloc[0] * 3600)
        ledger = pd.read_parquet(tmp_path / "ray" / "ledger.parquet")
        generated = ledger[ledger.stage == "generate"]
        assert (generated[generated.worker == "engine-0"].tokens > 0).all()
        assert (generated[generated.worker != "engine-0"].tokens == 0).all()
        assert len(generated) == 3 * 2  # clients, an engine's row beside a worker's; nobody learns answers of round 2
        peaks = json.loads((tmp_path / "ray" / "engines.json").read_text())["peak_host_bytes"]
        assert peaks["engine-0"] > 300 << 20

    def test_two_replicas_give_the_answers_of_one_though_one_of_them_is_killed(
        self, tiny_config: MakeConfig, wide_llama: Path, tmp_path: Path
    ) -> None:
        """Sampled: each prompt brings its random stream, so it does not matter who draws."""
        sampled = {"generation": {"engine": "vllm", "temperature": 1.0, "num_samples": 2}}
        one = tiny_config(model={"name": str(wide_llama)}, resources=SMALL_CACHE, **sampled)
        run_experiment(one, tmp_path / "one", Silent())
        resources = {**SMALL_CACHE, "fleet": "ray", "max_workers": 2, "engine_replicas": 2}
        two = tiny_config(model={"name": str(wide_llama)}, resources=resources, **sampled)
        observer = KillsAnEngine()
        run_experiment(two, tmp_path / "two", observer)
        assert observer.has_killed
        assert [f"engine-{number} on" in observer.plan for number in range(3)] == [True, True, False]
        for mine, theirs in zip(answers(tmp_path / "two"), answers(tmp_path / "one"), strict=True):
            pd.testing.assert_frame_equal(mine, theirs)
        ledger = pd.read_parquet(tmp_path / "two" / "ledger.parquet")
        assert {"engine-0", "engine-1"} <= {*ledger.worker}
        peaks = json.loads((tmp_path / "two" / "engines.json").read_text())["peak_host_bytes"]
        assert min(peaks["engine-0"], peaks["engine-1"]) > 300 << 20
