"""Runs with parts from a module of the working folder, which is neither installed nor on PYTHONPATH."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, load_config
from semcons_ray.errors import RunFolderError
from semcons_ray.parts import find
from semcons_ray.reporting import read_run, render_result, write_report
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from semcons_ray.studies.search_space import load_sweep
from semcons_ray.studies.sweep import run_sweep
from tests.invariants.runs import Silent, StoppedError, assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.real]

NUMBERS = itertools.count()
MakeConfig = Callable[..., ExperimentConfig]

OWN = '''
from dataclasses import dataclass

import torch

from semcons_ray.federation.algorithms.semantic_consensus import SemanticConsensus
from {name}_beside import offset


@dataclass(frozen=True)
class Rule:
    """The medoid, or its opposite."""

    sign: int = 1

    def __call__(self, ballots):
        return self.sign * ballots.similarity + offset()


@dataclass(frozen=True)
class Algorithm(SemanticConsensus):
    """Semantic consensus in which clients do not answer in the first rounds."""

    quiet: int = 0

    def visit(self, client, round, downlink):
        return super().visit(client, round, downlink)


@dataclass(frozen=True)
class Embedder:
    """Counts letters."""

    letters: str = "abcdefghijklmnopqrstuvwxyz"

    @property
    def dimension(self):
        return len(self.letters) + 1

    def embed(self, texts):
        counts = [[text.count(letter) for letter in self.letters] + [1] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(counts, dtype=torch.float32), dim=1)


def vowels(answer, reference, *, which: str = "aeiou"):
    return float(sum(letter in which for letter in answer))


vowels.lower_is_better = True


def halves(examples, num_clients, examples_per_client, random):
    """The shuffled examples in turn."""
    return [range(client, num_clients * examples_per_client, num_clients) for client in range(num_clients)]


def shortest(candidates, budget, embed, *, most: int = 100):
    """The shortest questions."""
    return sorted(range(len(candidates)), key=lambda place: len(candidates[place].prompt[:most]))[:budget]


def pairs(source, split, *, count: int = 100):
    """Questions by the hundred."""
    for number in range(count):
        yield {{"question": f"{{source}} {{number}}", "answer": f"it is {{number}}"}}


class Notes:
    """A line for each round."""

    def __init__(self, subject):
        self.file = subject.folder / "notes.txt"

    def log(self, step, at, values):
        self.file.open("a").write(f"{{step}}\\n")

    def close(self, *, finished): ...
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the module, which is found from the working folder alone."""
    name = f"own_{next(NUMBERS)}"
    (tmp_path / f"{name}.py").write_text(OWN.format(name=name))
    (tmp_path / f"{name}_beside.py").write_text("def offset(): return 0.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield name
    for module in (name, f"{name}_beside"):
        sys.modules.pop(module, None)
    find.resolve.cache_clear()


def forget(own: str) -> None:
    """Let the working folder and this process have nothing of the module any more."""
    for name in (own, f"{own}_beside"):
        Path(f"{name}.py").unlink()
        sys.modules.pop(name, None)
    find.resolve.cache_clear()


def all_parts(own: str) -> dict[str, Any]:
    """Settings that name a part of each kind."""
    return {
        "data": {"source": "numbers", "reader": f"{own}:pairs", "reader_options": {"count": 120},
                 "partition": f"{own}:halves"},
        "prompts": {"selection": f"{own}:shortest", "selection_options": {"most": 50}},
        "algorithm": {"name": f"{own}:Algorithm", "options": {"quiet": 1}, "rule": f"{own}:Rule"},
        "server": {"embedder": f"{own}:Embedder", "embedder_options": {"letters": "aeiost"}},
        "evaluation": {"metrics": ["similarity", f"{own}:vowels"], "metric_options": {f"{own}:vowels": {"which": "i"}}},
        "tracking": {"report_to": [f"{own}:Notes"]},
    }  # fmt: skip


def test_a_run_with_a_part_of_each_kind_does_what_they_say(tiny_config: MakeConfig, own: str, tmp_path: Path) -> None:
    run_experiment(tiny_config(**all_parts(own)), tmp_path / "run", Silent())
    data = pd.read_parquet(tmp_path / "run" / "data.parquet")
    assert set(data["prompt"]) <= {f"numbers {number}" for number in range(120)}
    assert len(data[data["role"] == "public"]) == 6
    assert data.loc[data["role"] == "public", "prompt"].str.len().is_monotonic_increasing
    metrics, name = pd.read_parquet(tmp_path / "run" / "metrics.parquet"), f"{own}:vowels"
    items = pd.read_parquet(tmp_path / "run" / "items" / "round_002.parquet")
    answered = items.dropna(subset="answer")
    assert answered[name].tolist() == [answer.count("i") for answer in answered["answer"]]
    by_hand = items.groupby("client_id")[name].mean()
    assert metrics.loc[metrics["round"] == 2, name].tolist() == pytest.approx(by_hand.tolist())
    assert (tmp_path / "run" / "notes.txt").read_text() == "0\n1\n2\n"
    consensus = pd.read_parquet(tmp_path / "run" / "consensus" / "round_001.parquet")
    assert consensus.groupby("prompt_id")["chosen"].sum().tolist() == [1] * 6
    best = consensus.groupby("prompt_id")["similarity"].transform("max")
    assert np.allclose(consensus.loc[consensus["chosen"], "similarity"], best[consensus["chosen"]], atol=1e-5)
    assert "\nvowels " in render_result(read_run(tmp_path / "run"), 140)
    kept = {path.name for path in (tmp_path / "run" / "code").iterdir()}
    assert kept == {f"{own}.py", f"{own}_beside.py"}


def test_a_rule_that_is_the_medoid_gives_the_medoids_bits_and_another_does_not(
    tiny_config: MakeConfig, own: str, tmp_path: Path
) -> None:
    for name, algorithm in (
        ("medoid", {}),
        ("own", {"rule": f"{own}:Rule"}),
        ("opposite", {"rule": f"{own}:Rule", "rule_options": {"sign": -1}}),
    ):
        run_experiment(tiny_config(algorithm=algorithm), tmp_path / name, Silent())
    assert_same_run(tmp_path / "medoid", tmp_path / "own")
    votes = [pd.read_parquet(tmp_path / name / "consensus/round_001.parquet") for name in ("medoid", "opposite")]
    assert votes[0]["answer"].equals(votes[1]["answer"])
    assert not votes[0]["chosen"].equals(votes[1]["chosen"])


class Forgets(Silent):
    """Once the run has begun, nothing but its folder has the module."""

    def __init__(self, own: str) -> None:
        super().__init__()
        self.own = own

    def stage(self, text: str) -> None:
        if text == "loading models":
            for path in Path.cwd().glob(f"{self.own}*.py"):
                path.unlink()


@pytest.mark.ray
@pytest.mark.usefixtures("one_cluster")
def test_workers_take_the_module_from_the_runs_folder(tiny_config: MakeConfig, own: str, tmp_path: Path) -> None:
    run_experiment(tiny_config(**all_parts(own)), tmp_path / "local", Silent())
    config = tiny_config(**all_parts(own), resources={"fleet": "ray"})
    run_experiment(config, tmp_path / "run", Forgets(own))
    assert not [*tmp_path.glob("own_*.py")]
    assert_same_run(tmp_path / "local", tmp_path / "run")


@pytest.mark.ray
@pytest.mark.usefixtures("one_cluster")
def test_a_sweep_tries_options_and_is_ranked_by_a_metric_of_ones_own(
    tiny_config: MakeConfig, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {**all_parts(own), "tracking": {}}
    experiment = tiny_config(num_rounds=1, **parts).model_dump(mode="json", exclude={"name"})
    values = {
        "experiment": experiment, "metric": f"{own}:vowels",
        "space": {"algorithm.rule_options.sign": {"grid": [1, -1]}, "algorithm.rule": {"grid": [f"{own}:Rule"]}},
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values))
    sweep = load_sweep(tmp_path / "sweep.yaml")
    assert not sweep.higher_is_better
    assert sweep.configure(sweep.points()[1]).algorithm.rule_options == {"sign": -1}
    assert sweep.configure(sweep.points()[1]).algorithm.options == {"quiet": 1}
    result, failed = run_sweep(sweep, tmp_path / "swept", print)
    assert result is not None
    assert failed == 0, capsys.readouterr().out
    assert result.trials["status"].tolist() == ["finished"] * 2
    assert result.trials[f"{own}:vowels"].is_monotonic_increasing
    assert "mean vowels" in (tmp_path / "swept" / "report.html").read_text()


def test_a_finished_run_is_shown_without_its_parts_and_not_resumed_with_others(
    tiny_config: MakeConfig, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_experiment(tiny_config(num_rounds=1, **all_parts(own)), tmp_path / "run", Silent())
    forget(own)
    text = render_result(read_run(tmp_path / "run"), 140)
    assert f"\n{own}:vowels " in text  # what it is called is not known any more
    said = write_report(tmp_path / "run").read_text()
    assert f"They do as {own}:Algorithm (quiet 1) says; where it elects answers, by {own}:Rule." in said
    with pytest.raises(Exception, match=f"cannot import {own}"):
        load_config(tmp_path / "run" / "config.yaml")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert main(["watch", str(tmp_path / "run")]) == 0
    assert "finished" in capsys.readouterr().out


def stop_in_round_two(config: ExperimentConfig, out: Path) -> None:
    def stop(reply: Any) -> None:
        if reply.round == 2:
            raise RuntimeError

    with pytest.raises(StoppedError):
        run_experiment(config, out, Silent(stop))


def test_a_run_goes_on_with_the_code_that_it_began_with(tiny_config: MakeConfig, own: str, tmp_path: Path) -> None:
    config = tiny_config(**all_parts(own))
    run_experiment(config, tmp_path / "whole", Silent())
    stop_in_round_two(config, tmp_path / "run")
    forget(own)
    resume_experiment(tmp_path / "run", Silent())
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert not math.isnan(pd.read_parquet(tmp_path / "run" / "metrics.parquet")[f"{own}:vowels"].iloc[-1])


def test_a_run_does_not_go_on_with_code_that_was_changed(tiny_config: MakeConfig, own: str, tmp_path: Path) -> None:
    stop_in_round_two(tiny_config(**all_parts(own)), tmp_path / "run")
    Path(f"{own}_beside.py").write_text("def offset(): return 1.0\n")
    with pytest.raises(RunFolderError, match=rf"^{own}_beside\.py was changed since the run began"):
        resume_experiment(tmp_path / "run", Silent())
