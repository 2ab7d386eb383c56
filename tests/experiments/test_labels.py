"""Scripts of experiments/attack, crowd and skills that elect labels anew from stored answers."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from semcons_ray.config import ExperimentConfig
from semcons_ray.data.split import read_split
from semcons_ray.federation.opinions import choices, opinion_of
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from semcons_ray.studies.labels import read_answered
from tests.experiments.scripts import load_script
from tests.invariants.runs import Silent
from tests.studies.test_attacks import RUN

strong = load_script("attack", "strong.py")
margins = load_script("attack", "margins.py")
worth = load_script("skills", "worth.py")
crowd = load_script("crowd", "labels.py")


def test_clients_that_know_all_say_what_is_right_and_others_what_a_client_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strong, "SAYS_IT", 1.0)
    run = replace(RUN, samples={1: RUN.samples[1], 2: {client: [["x", "b", "y", "q"]] * 3 for client in range(3)}})
    for knows, expected in ((1.0, ["a", "b", "c", "z"]), (0.0, ["x", "b", "y", "q"])):
        (answers,) = strong.with_strong(run, 2, knows, 2).samples.values()
        assert [*answers] == [0, 1, 2, 3, 4]
        assert [len(draws) for draws in answers.values()] == [2] * 5
        assert answers[3] == answers[4] == [[*expected]] * 2


def test_what_they_know_is_known_in_each_draw_and_drawn_for_each_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strong, "SAYS_IT", 1.0)
    many = 400
    run = replace(
        RUN,
        samples={1: {0: [["wrong"] * many] * 2, 1: [["wrong"] * many] * 2}},
        prompts=["one"] * many,
        references=["right"] * many,
        categories=[""] * many,
        num_examples={0: 1, 1: 1},
    )
    answers = strong.with_strong(run, 2, 0.5, 2).samples[1]
    assert answers[2][0] == answers[2][1] != answers[3][0]
    assert 160 < answers[2][0].count("right") < 240


def test_labels_are_safe_from_fewer_votes_than_they_lead_by() -> None:
    assert margins.leads(RUN)["lead"].tolist() == [3, 1, 0, 3]
    shares = {row["share"]: row for row in margins.safe(RUN)}
    assert [shares[0.0][key] for key in ("safe", "right", "accuracy")] == [0.75, 0.5, pytest.approx(2 / 3)]
    assert [shares[0.3][key] for key in ("safe", "right", "accuracy")] == [0.5, 0.25, 0.5]  # 1.3 votes beside three


def test_a_draw_is_a_part_of_a_vote_and_none_for_nothing() -> None:
    two = {0: [["a", ""], ["x", ""]], 1: [["a", "b"], ["a", ""]]}
    run = replace(RUN, samples={1: two}, prompts=["one", "two"], references=["a", "y"])
    assert margins.leads(run).to_dict("list") == {"lead": [1.0, 0.5], "right": [True, False]}


def test_labels_come_about_as_they_are_named() -> None:
    assert worth.labels(RUN, worth.REFERENCE) == ["a", "b", "c", "z"]
    assert worth.labels(RUN, worth.NONE) == worth.labels(RUN, worth.OWN) == [None] * 4
    elected, drawn = worth.labels(RUN, worth.ELECTED), worth.labels(RUN, worth.RANDOM)
    assert elected[:2] == ["a", "b"] and elected[3] == "q"
    given = list(zip(*(samples[0] for samples in RUN.samples[1].values()), strict=True))
    assert all(label in answers for label, answers in zip(drawn, given, strict=True))


@pytest.mark.parametrize("way", worth.WAYS)
def test_clients_go_on_with_the_labels_that_are_meant(
    way: str, tiny_config: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worth, "NUM_TEST", 9)
    monkeypatch.setitem(sys.modules, "worth", worth)
    algorithm = {"answer_last_round": True, "rule": "plurality", "plurality_similarity": 1.0}
    config = tiny_config(num_rounds=1, algorithm=algorithm, generation={"num_samples": 3, "max_new_tokens": 4})
    run_experiment(config, tmp_path / "run", Silent())
    run = read_answered(tmp_path / "run")
    worth.go_on(tmp_path / "run", run, way, tmp_path / "on")
    resume_experiment(tmp_path / "on")
    learnt = pd.read_parquet(tmp_path / "on/metrics.parquet").query("round == 2").set_index("client_id")
    elected = worth.labels(run, worth.ELECTED)
    expected = dict.fromkeys(range(3), 0 if way == worth.NONE else 6)
    if way == worth.CONFIRMED:
        for client, draws in run.samples[1].items():
            pairs = zip(choices(draws)[0], elected, strict=True)
            expected[client] = sum(opinion_of(own) == opinion_of(label) for own, label in pairs if label)
        assert 0 < sum(expected.values()) < 18
    assert learnt["num_pseudo_labels"].to_dict() == expected
    tests = [[one.prompt for one in read_split(tmp_path / name / "data.parquet").test] for name in ("run", "on")]
    assert (len(tests[1]), tests[1][: len(tests[0])]) == (9, tests[0])
    scores, items = worth.scores(tmp_path / "on"), pd.read_parquet(tmp_path / "on/items/round_002.parquet")
    assert scores["num_items"].tolist() == [9, 9, 9]
    assert scores["all_skills"].tolist() == items.groupby("client_id")["exact_match"].mean().tolist()
    assert scores["model"].tolist() == [config.model.name] * 3


def test_what_a_client_gains_is_seed_by_seed() -> None:
    rows = [
        {"client": 1, "model": "m", "skill": "sums", "seed": seed, "labels": way, "all_skills": right, "own_skill": 0.5}
        for way, seeds in ((worth.NONE, (0.1, 0.3)), (worth.ELECTED, (0.2, 0.6)))
        for seed, right in enumerate(seeds)
    ]
    (gain,) = worth.by_client(pd.DataFrame(rows).assign(other_skills=0.2)).to_dict("records")
    assert (gain["client"], gain["seeds"], gain["own_skill, gain"]) == (1, 2, 0.0)
    assert (gain["all_skills, none"], gain["all_skills, gain"]) == (pytest.approx(0.2), pytest.approx(0.2))
    assert gain["all_skills, half width"] == pytest.approx(12.7062 * 0.1, rel=1e-4)


def test_differences_are_seed_by_seed() -> None:
    table = pd.DataFrame(
        [
            {"seed": seed, "labels": way, "labels_right": right, "own_skill": 0.5, "other_skills": other}
            for way, right, others in ((worth.RANDOM, 0.2, (0.1, 0.3)), (worth.ELECTED, 0.4, (0.2, 0.6)))
            for seed, other in enumerate(others)
        ]
    )
    told = worth.summary(table).set_index("labels")
    gain = told.loc[worth.ELECTED]
    assert gain["other_skills"] == pytest.approx(0.4)
    assert gain[f"other_skills against {worth.RANDOM}"] == pytest.approx((0.1 + 0.3) / 2)
    # of two values 0.2 apart: t(1, 0.975) = 12.7062 times 0.1 sqrt(2) / sqrt(2)
    assert gain[f"other_skills against {worth.RANDOM}, half width"] == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert told.loc[worth.RANDOM, f"other_skills against {worth.RANDOM}"] == 0.0


def test_a_part_of_the_clients_and_prompts() -> None:
    of_two = crowd.part(RUN, [2, 0], [0, 3])
    assert of_two.samples == {1: {2: [["a", "q"]], 0: [["a", "q"]]}}
    assert (of_two.prompts, of_two.references, of_two.categories) == (["one", "four"], ["a", "z"], ["", ""])
    found = crowd.right(crowd.part(RUN, [0, 1, 2], [0, 1, 2, 3]))
    # First draws are right at a, b and c, at a and b, and at a, of four; a plurality has a and b, and perhaps c.
    assert found[crowd.RANDOM] == pytest.approx((3 + 2 + 1) / 12)
    assert found["plurality"] in (0.5, 0.75)
