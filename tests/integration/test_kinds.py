"""Runs in which two clients are parrots: they answer, vote and win, and what they do not tell is nowhere a number."""

import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import semcons_ray as sr
from semcons_ray.config import ExperimentConfig, ModelConfig, TrainingConfig
from semcons_ray.errors import ConfigError
from semcons_ray.reporting.comparison import compare_runs
from semcons_ray.reporting.html import render_report
from semcons_ray.reporting.progress import describe_round
from semcons_ray.reporting.summary import notes
from semcons_ray.reporting.tables import metric_table, read_run, render_result
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from semcons_ray.runs.run_folder import RunFolder
from semcons_ray.runs.trackers import Series
from tests.invariants.runs import Silent, StoppedError, assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.real]

Make = Callable[..., ExperimentConfig]


def flock(model: Path, name: str = "Parrot", share: float = 2, **options: Any) -> dict[str, Any]:
    """Four clients: two with the model, two parrots."""
    return {
        "num_clients": 4,
        "mix": {str(model): 2, "polly": share},
        "models": {"polly": {"kind": f"tests.parrots:{name}", "options": options}},
    }


@pytest.fixture(scope="module")
def run(tiny_config: Make, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds, in which parrots are paid."""
    out = tmp_path_factory.mktemp("flock") / "run"
    observer = Silent()
    run_experiment(of_flock(tiny_config, tiny_llama, price=0.25), out, observer)
    assert "no core: answers come from elsewhere, " in observer.plan
    return out


def of_flock(tiny_config: Make, tiny_llama: Path, name: str = "Parrot", **options: Any) -> ExperimentConfig:
    return tiny_config(
        num_rounds=3,
        clients=flock(tiny_llama, name, **options),
        algorithm={"first_exchange": 1},
        generation={"max_new_tokens": 4, "num_samples": 2},
    )


def test_parrots_vote_and_win(run: Path) -> None:
    votes = pd.concat(pd.read_parquet(path) for path in run.glob("consensus/*.parquet"))
    won = votes[votes["chosen"]]["client_id"]
    assert {2, 3} & set(won)
    assert set(votes["client_id"]) == {0, 1, 2, 3}


def test_what_parrots_do_not_tell_is_absent_and_the_rest_is_there(run: Path) -> None:
    metrics = pd.read_parquet(run / "metrics.parquet").set_index(["round", "client_id"])
    parrots = metrics[metrics["model"] == "polly"]
    assert len(parrots) == 4 * 2
    assert parrots[["nll", "perplexity", "bits_per_byte", "train_loss"]].isna().all(axis=None)
    assert parrots[["rouge_l", "similarity"]].notna().all(axis=None)
    others = metrics[metrics["model"] != "polly"]
    assert others[["nll", "perplexity", "bits_per_byte", "rouge_l"]].notna().all(axis=None)
    items = pd.read_parquet(run / "items" / "round_003.parquet")
    assert items.loc[items["client_id"] >= 2, ["nats", "num_tokens", "num_bytes"]].isna().all(axis=None)
    assert items.loc[items["client_id"] < 2, "nats"].notna().all()
    assert sorted(path.name for path in (run / "adapters").iterdir()) == ["client_000", "client_001"]


def test_what_was_paid_is_in_the_ledger_and_energy_is_not_made_up(run: Path) -> None:
    ledger = pd.read_parquet(run / "ledger.parquet")
    paid = ledger.groupby("client_id")["cost_usd"].sum()
    assert (paid[[2, 3]] > 0).all()
    assert not paid[[0, 1, -1]].any()
    worker = ledger.loc[ledger["client_id"] == 2, "worker"].iloc[0]
    of_parrots = ledger[ledger["worker"] == worker]
    assert set(of_parrots["energy_source"]) == {"unavailable"}
    assert of_parrots["energy_joules"].isna().all()
    assert "unavailable" not in set(ledger.loc[ledger["worker"] != worker, "energy_source"])


def test_means_are_over_the_clients_that_tell_and_every_table_says_so(run: Path) -> None:
    commits, metrics = RunFolder(run).commits(), pd.read_parquet(run / "metrics.parquet")
    last = metrics[metrics["round"] == 3].set_index("client_id")
    mean = last["nll"][[0, 1]].mean()
    line = f"mean test NLL {mean:.3f} of 2 clients  no likelihood from 2, mean ROUGE-L of 4 "
    assert line in describe_round(commits[3])
    series = Series()
    values = [series.add(commit) for commit in commits][-1]
    assert values["mean/nll"] == pytest.approx(mean)
    assert values["mean/rouge_l"] == pytest.approx(last["rouge_l"].mean())
    assert values["total/cost_usd"] == pytest.approx(pd.read_parquet(run / "ledger.parquet")["cost_usd"].sum())
    assert "client_2/nll" not in values
    read = read_run(run)
    shown = render_result(read, width=120)
    assert f"{mean:.3f}" in next(line for line in shown.splitlines() if line.lstrip().startswith("mean"))
    assert "likelihood is known of 2 of 4 clients" in shown
    assert "paid         US$ " in shown
    assert metric_table(read).loc["nll", "last"] == pytest.approx(last["nll"][[0, 1]].mean(), rel=0.2)
    page = render_report(read)
    assert "likelihood is known of 2 of 4 clients" in page
    assert "nan" not in page.lower().replace("nanosecond", "")


def test_a_comparison_takes_intervals_over_the_clients_that_tell(
    run: Path, tiny_config: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    run_experiment(tiny_config(num_rounds=3, clients={"num_clients": 4}), tmp_path / "open", Silent())
    folders = {("flock", 0): run, ("open", 0): tmp_path / "open"}
    result = compare_runs(folders, first="open", reference="none", baseline="none")
    assert list(result.summary["untold"]) == [2, 0]
    assert math.isfinite(result.summary.loc["flock", "nll"])
    assert math.isfinite(result.summary.loc["flock", "difference"])
    assert result.summary.loc["flock", "cost_usd"] > 0
    assert any("flock without 2" in line for line in notes(result.summary, reference="none", baseline="none"))
    nll = result.metrics[result.metrics["metric"] == "nll"].set_index("arm")
    assert nll["value"].notna().all()


def test_a_run_of_parrots_alone_needs_no_model(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config(
        algorithm={"first_exchange": 1},
        clients={"models": {"polly": {"kind": "tests.parrots:Parrot"}}},
        evaluation={"metrics": ["nll", "rouge_l", "exact_match"]},
        model={**ModelConfig().model_dump(), "name": "polly"},
        training=TrainingConfig().model_dump(),
    )
    run_experiment(config, tmp_path / "run", Silent())
    assert "exact_match" in pd.read_parquet(tmp_path / "run" / "metrics.parquet")
    render_report(read_run(tmp_path / "run"))
    render_result(read_run(tmp_path / "run"))
    compare_runs({("a", 0): tmp_path / "run"}, first="a", reference="a", baseline="a")
    assert not any((tmp_path / "run" / "adapters").iterdir())


def test_a_run_stopped_and_resumed_is_the_same(run: Path, tiny_config: Make, tiny_llama: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(reply: Any) -> None:
        seen.append(reply.client_id)
        assert len(seen) < 8

    with pytest.raises(StoppedError):
        run_experiment(of_flock(tiny_config, tiny_llama, price=0.25), tmp_path / "run", Silent(stop))
    resume_experiment(tmp_path / "run", Silent())
    assert_same_run(run, tmp_path / "run")


@pytest.mark.ray
def test_fleets_and_packings_agree(run: Path, tiny_config: Make, tiny_llama: Path, tmp_path: Path) -> None:
    config = of_flock(tiny_config, tiny_llama, price=0.25)
    resources = config.resources.model_copy(update={"fleet": "ray", "max_workers": 1})
    run_experiment(config.model_copy(update={"resources": resources}), tmp_path / "ray", Silent())
    assert_same_run(run, tmp_path / "ray")


@pytest.mark.ray
def test_a_worker_gets_the_variables_that_its_kind_names_and_they_are_nowhere_on_disk(
    tiny_config: Make, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_flock(tiny_config, tiny_llama, "Caged").model_copy(update={"num_rounds": 1})
    resources = config.resources.model_copy(update={"fleet": "ray", "max_workers": 1})
    config = config.model_copy(update={"resources": resources})
    with pytest.raises(ConfigError, match="CAGE_KEY"):
        run_experiment(config, tmp_path / "refused", Silent())
    key = secrets.token_hex(16)  # not written here, as the run keeps this module's code
    monkeypatch.setenv("CAGE_KEY", key)
    run_experiment(config, tmp_path / "run", Silent())
    items = pd.read_parquet(tmp_path / "run" / "items" / "round_001.parquet")
    assert set(items.loc[items["client_id"] == 2, "answer"].dropna()) == {"opened True"}
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes()


def test_a_parrot_that_fails_is_lost_for_the_round_and_the_run_goes_on(
    tiny_config: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    run_experiment(of_flock(tiny_config, tiny_llama, "Shy"), tmp_path / "run", Silent())
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet").set_index("round")
    assert list(rounds["lost"]) == ["", "", "2, 3", ""]
    assert "pieces of eight" in rounds.loc[2, "failures"]


def test_a_dry_run_says_what_is_not_known(tiny_config: Make, tiny_llama: Path) -> None:
    shown = str(sr.plan(of_flock(tiny_config, tiny_llama)))
    assert "no core: answers come from elsewhere" in shown
    assert "Tokens, time and cost of polly are not known here." in shown
