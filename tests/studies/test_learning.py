"""Runs that go on with other labels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import semcons_ray as sr
from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig, dump_config
from semcons_ray.consensus import Election
from semcons_ray.data.split import read_split
from semcons_ray.errors import UserError
from semcons_ray.runs.experiment import run_experiment
from semcons_ray.security.attacks import Backdoor
from semcons_ray.studies.attacks import attack_table
from semcons_ray.studies.learning import learn
from tests.invariants.runs import Silent
from tests.studies.test_attacks import RUN

MakeConfig = Callable[..., ExperimentConfig]


@pytest.fixture(scope="module")
def answered(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last round has an exchange."""
    out = tmp_path_factory.mktemp("answered") / "run"
    algorithm = {"answer_last_round": True, "rule": "plurality", "plurality_similarity": 1.0}
    run_experiment(tiny_config(num_rounds=1, algorithm=algorithm), out, Silent())
    return out


def elected(run: Path) -> list[str | None]:
    table = pd.read_parquet(run / "consensus/round_001.parquet")
    chosen = table[table["chosen"]].set_index("prompt_id")["answer"]
    return [chosen.get(prompt) for prompt in range(table["prompt_id"].max() + 1)]


def test_with_the_labels_that_it_elected_a_run_goes_on_as_it_would_have(
    answered: Path, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in answered.rglob("*") if path.is_file()}
    items = learn(answered, elected(answered), tmp_path / "learnt" / "one")
    algorithm = {"rule": "plurality", "plurality_similarity": 1.0}
    longer = tiny_config(num_rounds=2, algorithm=algorithm, evaluation={"num_answers": 6})
    run_experiment(longer, tmp_path / "longer", Silent())
    both = (tmp_path / "learnt" / "one", tmp_path / "longer")
    tables = [pd.read_parquet(path / "metrics.parquet").query("round == 2") for path in both]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    whole = pd.read_parquet(tmp_path / "longer/items/round_002.parquet")
    assert len(items) == 3 * 6
    assert items["answer"].tolist() == whole["answer"].tolist()
    test = read_split(answered / "data.parquet").test
    assert items["response"].tolist() == [test[item].response for item in whole["item"]]
    assert {path: path.read_bytes() for path in answered.rglob("*") if path.is_file()} == before


def test_other_labels_are_learnt_and_not_twice(answered: Path, tmp_path: Path) -> None:
    own, others = tmp_path / "own", tmp_path / "others"
    learn(answered, elected(answered), own)
    first = learn(answered, ["nonsense", *[None] * 5], others)
    metrics = [pd.read_parquet(path / "metrics.parquet").query("round == 2") for path in (own, others)]
    assert (metrics[0]["num_pseudo_labels"] == 6).all()
    assert (metrics[1]["num_pseudo_labels"] == 1).all()
    assert (metrics[0]["nll"].to_numpy() != metrics[1]["nll"].to_numpy()).all()
    began = pd.read_parquet(others / "rounds.parquet")
    again = learn(answered, ["nonsense", *[None] * 5], others)
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(began, pd.read_parquet(others / "rounds.parquet"))


def test_a_run_that_cannot_go_on_is_told_what_to_set(
    tiny_config: MakeConfig, tmp_path: Path, answered: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_experiment(tiny_config(num_rounds=2), tmp_path / "silent", Silent())
    few = str(tmp_path / "out")
    assert main(["attack", str(answered), "--attacks", "one_text", "--learn", "--out", few]) == 2
    assert "--learn needs an attack that wants something of models, such as backdoor" in capsys.readouterr().err
    assert main(["attack", str(tmp_path / "silent"), "--learn", "--out", few]) == 2
    assert "nobody answers in the last round" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"nobody answers in the last round; .* algorithm\.answer_last_round to true"):
        learn(tmp_path / "silent", [None] * 6, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_how_often_models_say_what_a_backdoor_wants_by_hand() -> None:
    run = replace(RUN, prompts=["door one", "two", "three", "four"])
    asked = ["a door", "a door", "a Door", "a wall"]

    def learnt(_: object, labels: object) -> pd.DataFrame:
        """Of two clients the first says what is wanted to one of two doors, and the second to the only one that it was
        asked; without attackers nobody does."""
        answers = ["In!", "out", "in", "in"] if "in" in list(labels) else ["out", "out", "out", "in"]  # type: ignore[call-overload]
        table = {"client_id": [0, 0, 1, 1], "prompt": asked, "response": ["in", "out", "out", "in"], "answer": answers}
        return pd.DataFrame(table)

    attacks = {"door": Backdoor(trigger="door", text="in")}
    done = attack_table([run], [Election("plurality", {"min_cosine": 1.0})], attacks, [0.6], print, learnt)
    row = done.table.set_index("attack").loc["door"]
    assert (row["success"], row["usual_success"]) == ((1 / 2 + 1) / 2, 0.0)
    assert (row["test_accuracy"], row["usual_test_accuracy"]) == ((1 + 1 / 2) / 2, (1 / 2 + 1) / 2)
    assert "75%" in str(done)


def test_the_command_has_backdoors_learnt(answered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["attack", str(answered), "--attacks", "{trigger: which, text: three}", "one_text", "--shares", "0.6"]
    words[3] = "backdoor " + words[3]
    words += ["--defences", "none", "--learn", "--out", str(out)]
    assert main(words) == 0
    table = pd.read_csv(out / "attack.csv").set_index("attack")
    assert table.loc["one_text", ["success", "test_accuracy"]].isna().all()
    learnt = table.loc[words[3]]
    assert learnt["captured"] > 0
    assert 0 <= learnt["usual_success"] <= learnt["success"] <= 1
    assert len([*(out / "learnt" / "0-run").iterdir()]) == 2  # with attackers and without
    assert "Models that learnt the labels" in capsys.readouterr().out
    rounds = {path: path.stat().st_mtime_ns for path in out.rglob("state/round_002.msgpack")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("state/round_002.msgpack")} == rounds


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--attacks", "one_tex"], "one_text"),
        (["--attacks", "one_text {texts: a}"], "texts"),
        (["--shares", "0.3", "1.5"], "--shares must be above 0 and under 1, not 1.5"),
        (["--rules", "mediod"], "medoid"),
        (["--rules", "medoid {temperature: 1}"], "temperature"),
        (["--defences", "indep"], "independent"),
        (["--attacks", "one_text", "--learn"], "--learn needs an attack that wants something"),
        (["--learn"], "the experiment: nobody answers in the last round; set algorithm.answer_last_round to true"),
        (["no-such-run"], "attack needs folders of runs, or settings of an experiment"),
        (["--seeds", "1", "1"], "name a seed twice"),
    ],
)
def test_what_is_wrong_is_said_before_an_experiment_is_run(
    words: list[str], told: str, tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config(num_rounds=2)))
    assert main(["attack", str(tmp_path / "config.yaml"), *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_runs_needs_a_folder(answered: Path, tiny_config: MakeConfig) -> None:
    for place, learns in ((tiny_config(), False), (answered, True)):
        with pytest.raises(UserError, match="attack needs a folder for what it runs: out"):
            sr.attack(place, attacks=["backdoor"], learn=learns)


@pytest.mark.long
def test_the_command_runs_an_experiment_first(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config(num_rounds=1)))
    words = ["attack", str(tmp_path / "config.yaml"), "--seeds", "1", "2", "--attacks", "one_text", "--shares", "0.5"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert set(pd.read_csv(tmp_path / "out" / "attack.csv")["seed"]) == {1, 2}
    finished = "2 of 2 runs are finished"
    assert finished not in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert finished in capsys.readouterr().err
