"""Label tables: how many labels are right, worked out by hand from answers that are written down here."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

import semcons_ray as sr
from semcons_ray.commands.cli import main
from semcons_ray.config import dump_config, validate_config
from semcons_ray.consensus import Election
from semcons_ray.consensus.evidence import Evidence, Ruling
from semcons_ray.errors import ConfigError, UserError
from semcons_ray.messages import Answers
from semcons_ray.studies.labels import (
    Answered,
    Labels,
    check_seeds,
    elect,
    joint_errors,
    label_table,
    parse_part,
    read_answered,
)

PLURALITY = Election("plurality", {"min_cosine": 1.0})
PROMPTS = ("one", "two", "three", "four")


class Letters:
    """Embeds a text by the letter that it begins with, so different letters have nothing in common."""

    dimension = 26

    def embed(self, texts: Sequence[str]) -> Tensor:
        vectors = torch.zeros(len(texts), self.dimension)
        for row, text in enumerate(texts):
            vectors[row, ord((text or "a")[0].lower()) - ord("a")] = 1
        return vectors


RUN = Answered(
    samples={
        1: {
            0: [["a", "B.", "x", "d"], ["a", "x", "c", "x"]],
            1: [["a", "x", "y", ""], ["a", "b", "c", ""]],
            2: [["y", "b", "z", ""], ["z", "b", "c", ""]],
        }
    },
    prompts=PROMPTS,
    references=["a", "b", "c", ""],
    categories=["early", "early", "late", "late"],
    embedder=Letters(),
    num_examples={0: 5, 1: 5, 2: 5},
)
"""Of the first samples, right at the three prompts that have a reference: client 0 at two, the others at one each."""


class Texts:
    """Embeds each text at random, so different texts have little in common."""

    dimension = 64

    def embed(self, texts: Sequence[str]) -> Tensor:
        seeds = [torch.Generator().manual_seed(int.from_bytes(text.encode()[-6:])) for text in texts]
        vectors = [torch.randn(self.dimension, generator=seed) for seed in seeds]
        return torch.nn.functional.normalize(torch.stack(vectors), dim=1)


def test_known_answers_save_the_votes_of_a_few_that_know_more_from_the_defence() -> None:
    random = torch.Generator().manual_seed(0)
    guesses = torch.randint(30, (5, 4, 40), generator=random).tolist()
    weak = {client: [[f"guess {number}" for number in draw] for draw in draws] for client, draws in enumerate(guesses)}
    right = [f"right {prompt}" for prompt in range(40)]
    run = Answered(
        samples={1: weak | {5: [right] * 4, 6: [right] * 4}},
        prompts=[f"question {prompt}" for prompt in range(40)],
        references=right,
        categories=[""] * 40,
        embedder=Texts(),
        num_examples=dict.fromkeys(range(7), 1),
    )
    defended = replace(PLURALITY, defence="independent")
    assert elect(run, PLURALITY, 4)[1] == right
    assert not set(elect(run, defended, 4)[1]) & set(right)
    known = dict(enumerate(right[:2]))
    assert elect(replace(run, known=known), defended, 4)[1] == right
    few = elect(replace(run, known={0: right[0]}), defended, 4)[1]
    assert few[0] == right[0]  # which the server knows
    assert not set(few[1:]) & set(right)


def stored(folder: Path, **settings: object) -> Path:
    """A run folder that holds its settings."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(validate_config(settings, where="here")))
    return folder


def test_runs_may_differ_in_seeds_lengths_and_where_their_data_lies(tmp_path: Path) -> None:
    one = stored(tmp_path / "one", seed=0, data={"source": str(tmp_path / "here/rows.jsonl")})
    other = stored(
        tmp_path / "other",
        seed=1,
        num_rounds=5,
        name="another",
        data={"source": str(tmp_path / "there/rows.jsonl"), "num_test": 30},
        evaluation={"num_answers": 2},
        resources={"fleet": "local"},
    )
    check_seeds([one, other])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"seed": 0}, "one and .*other both have seed 0"),
        ({"seed": 1, "algorithm": {"rule": "plurality"}}, "algorithm.rule is 'medoid' and 'plurality'"),
        ({"seed": 1, "clients": {"num_clients": 5}}, "clients.num_clients is 4 and 5"),
        ({"seed": 1, "data": {"source": "/elsewhere/other.jsonl"}}, "data.source is .* and '/elsewhere/other.jsonl'"),
    ],
)
def test_runs_that_are_not_of_several_seeds_are_refused(
    settings: dict[str, object], told: str, tmp_path: Path
) -> None:
    folders = [stored(tmp_path / "one", seed=0), stored(tmp_path / "other", **settings)]
    for command in (sr.labels, sr.attack):
        with pytest.raises(UserError, match=told):
            command(*folders)
        with pytest.raises(UserError, match="one is given twice"):
            command(folders[0], folders[0])


def row(labels: Labels, rule: str, samples: int) -> "pd.Series[float]":
    table = labels.table
    (found,) = table[(table["rule"] == rule) & (table["samples"] == samples)].index
    return table.loc[found]


def test_a_table_worked_out_by_hand() -> None:
    labels = label_table([RUN], [PLURALITY])
    exact = "plurality {min_cosine: 1.0}"
    assert list(zip(labels.table["rule"], labels.table["samples"], strict=True)) == [
        *(("random_client", 1), ("own_answer", 1), ("reference", 0), ("any client", 1)),
        *(("any draw", 2), (exact, 1), (exact, 2)),
    ]  # fmt: skip
    assert row(labels, "random_client", 1)["value"] == pytest.approx((2 + 1 + 1) / 9)
    assert row(labels, "any client", 1)["value"] == pytest.approx(2 / 3)
    assert row(labels, "any draw", 2)["value"] == 1
    once, twice = row(labels, exact, 1), row(labels, exact, 2)
    assert once["value"] == pytest.approx(2 / 3)  # a and b have two votes of three; of x, y and z none is right
    assert twice["value"] == 1  # c has a half of each client's vote
    assert once["difference"] == pytest.approx(2 / 3 - 4 / 9)
    assert (once["category: early"], once["category: late"], once["num_items"]) == (1, 0, 3)
    assert (once["num_runs"], labels.left_out) == (1, 1)
    assert twice["value_low"] == 1
    assert once["value_low"] < 2 / 3 < once["value_high"]


def test_bytes_are_those_of_messages_as_they_are_sent() -> None:
    labels = label_table([RUN], [PLURALITY])
    sent = [
        Answers(round_number=1, client_id=client, num_examples=5, answers=tuple(samples[0])).encode()
        for client, samples in RUN.samples[1].items()
    ]
    exact = "plurality {min_cosine: 1.0}"
    assert row(labels, exact, 1)["uplink_bytes"] == row(labels, "random_client", 1)["uplink_bytes"]
    assert row(labels, exact, 1)["uplink_bytes"] == sum(map(len, sent))
    assert row(labels, exact, 2)["uplink_bytes"] > sum(map(len, sent))
    assert row(labels, "own_answer", 1)["uplink_bytes"] == 0
    smaller = label_table([replace(RUN, compression="zstd")], [PLURALITY])
    assert row(smaller, exact, 2)["uplink_bytes"] != row(labels, exact, 2)["uplink_bytes"]


def test_a_prompt_without_a_label_is_counted_and_is_not_wrong() -> None:
    labels = label_table([RUN], [replace(PLURALITY, threshold=0.4)], [1])
    found = row(labels, "plurality {min_cosine: 1.0}", 1)
    assert found["abstained"] == pytest.approx(1 / 3)  # where no two agree
    assert found["value"] == 1
    assert found["num_items"] == 2
    # A random client's at the same two prompts: 2/3 and 2/3.
    assert found["difference"] == pytest.approx(1 / 3)


def test_clients_that_err_together() -> None:
    pairs = joint_errors(1, [RUN]).set_index(["client_a", "client_b"])
    # Wrong of three: client 0 at x; client 1 at x, y; client 2 at y, z.
    assert pairs.loc[(0, 1), "both_wrong"] == pytest.approx(1 / 3)
    assert pairs.loc[(1, 2), "if_independent"] == pytest.approx(4 / 9)
    assert pairs["same_wrong"].sum() == 0
    same = replace(RUN, samples={1: {0: [["q", "q", "c", "d"]], 1: [["q", "Q!", "q", ""]]}})
    assert joint_errors(1, [same]).loc[0, "same_wrong"] == pytest.approx(2 / 3)
    both = joint_errors(1, [same, same])
    pd.testing.assert_frame_equal(both, joint_errors(1, [same]))


def test_runs_are_means_with_intervals_over_runs_paired_by_prompt() -> None:
    other = replace(RUN, samples={1: {0: [["x", "x", "x", "x"]], 1: [["a", "b", "c", "d"]], 2: [["a", "b", "c", "d"]]}})
    labels = label_table([RUN, other], [PLURALITY], [1])
    found = row(labels, "plurality {min_cosine: 1.0}", 1)
    assert found["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["difference"] == pytest.approx(((2 / 3 - 4 / 9) + (1 - 2 / 3)) / 2)
    assert found["value_half_width"] == pytest.approx(12.706 * (1 / 3) / 2, rel=1e-4)  # t of one degree of freedom
    assert (found["num_items"], found["num_runs"]) == (3, 2)


def test_a_round_of_one_run_alone_and_a_client_that_did_not_answer() -> None:
    silent = replace(RUN, samples=dict(RUN.samples) | {2: {0: [["a", "b", "c", "d"]], 2: [["", "", "", ""]]}})
    labels = label_table([RUN, silent], [PLURALITY], [1])
    assert labels.table.groupby("round")["num_runs"].first().tolist() == [2, 1]
    assert set(silent.messages(2, 1)) == {0}
    assert elect(silent, replace(PLURALITY, min_votes=1), 1)[2] == ["a", "b", "c", "d"]
    assert elect(silent, PLURALITY, 1)[2] == [None] * 4
    assert "Round" in str(labels)
    assert "2 prompts are left out" in str(labels)


def trusts_once(evidence: Evidence) -> Ruling:
    """Defence: votes count by trust, and afterwards nobody is trusted any more."""
    return Ruling(evidence.trust[evidence.voters].expand_as(evidence.shares), torch.zeros_like(evidence.trust))


def test_elections_are_those_of_the_runs_server_by_its_seed_and_with_trust_kept() -> None:
    tied = replace(RUN, samples={1: {0: [["a"] * 4], 1: [["b"] * 4]}})
    by_seed = [elect(replace(tied, seed=seed), PLURALITY, 1)[1] for seed in range(5)]
    assert {label for labels in by_seed for label in labels} == {"a", "b"}
    assert len({tuple(map(str, labels)) for labels in by_seed}) > 1
    assert by_seed[3] == elect(replace(tied, seed=3), PLURALITY, 1)[1]
    twice = replace(RUN, samples={1: RUN.samples[1], 2: RUN.samples[1]})
    elected = elect(twice, replace(PLURALITY, defence=f"{__name__}:trusts_once"), 2)
    assert elected[1][:3] == ["a", "b", "c"]
    assert elected[2] == [None] * 4


def test_more_samples_than_were_drawn_are_refused() -> None:
    with pytest.raises(UserError, match=r"--samples 3: clients have drawn 2 at most \(generation.num_samples\)"):
        label_table([RUN], [PLURALITY], [1, 3])


def test_a_part_is_written_with_its_options() -> None:
    assert parse_part("medoid") == ("medoid", {})
    assert parse_part("plurality {min_cosine: 0.95}") == ("plurality", {"min_cosine": 0.95})
    with pytest.raises(ConfigError, match=r"cannot read the options of 'plurality \{min_cosine'"):
        parse_part("plurality {min_cosine")


def test_the_table_is_written_as_csv(tmp_path: Path) -> None:
    labels = label_table([RUN], [PLURALITY])
    labels.write(tmp_path / "labels.csv")
    assert list(pd.read_csv(tmp_path / "labels.csv")) == list(labels.table)


@pytest.fixture(scope="module")
def run(tiny_config: Callable[..., sr.ExperimentConfig], tmp_path_factory: pytest.TempPathFactory) -> sr.Run:
    algorithm = {"first_exchange": 1, "rule": "plurality", "plurality_similarity": 0.9, "competence": "expertise",
                 "agreement_threshold": 0.1, "compression": "zstd"}  # fmt: skip
    config = tiny_config(num_rounds=3, seed=1, algorithm=algorithm, generation={"num_samples": 2})
    return sr.run(config, out=tmp_path_factory.mktemp("runs") / "labels")


@pytest.mark.real
def test_elected_as_in_the_run_labels_are_those_of_the_run_and_bytes_too(run: sr.Run) -> None:
    labels = sr.labels(run.path, rules=["plurality {min_cosine: 0.9}"], competences=["expertise"], num_samples=[2])
    algorithm = run.config.algorithm
    election = Election("plurality", {"min_cosine": 0.9}, algorithm.agreement_threshold, competence="expertise")
    elected = elect(read_answered(run.path), election, 2)
    assert set(elected) == {1, 2}
    for round, of_round in elected.items():
        own = run.labels(round).set_index("prompt_id")["label"]
        assert {prompt: label for prompt, label in enumerate(of_round) if label} == own.to_dict()
        told = labels.table[(labels.table["round"] == round) & (labels.table["competence"] == "expertise")].iloc[0]
        assert told["uplink_bytes"] == run.ledger.loc[run.ledger["round"] == round, "uplink_bytes"].sum()
        assert told["abstained"] == pytest.approx(1 - len(own) / 6)


@pytest.mark.real
def test_a_choice_is_as_many_draws_as_it_stands_for(
    tiny_config: Callable[..., sr.ExperimentConfig], tmp_path: Path
) -> None:
    generation = {"max_new_tokens": 1, "top_k": 2, "num_samples": 4, "send_draws": "choice"}
    config = tiny_config(num_rounds=2, algorithm={"first_exchange": 1}, generation=generation)
    run = sr.run(config, out=tmp_path / "run")
    of_clients = read_answered(run.path).samples[1]
    for (client, prompt), row in run.answers(1).set_index(["client_id", "prompt_id"]).iterrows():
        draws = [sample[prompt] for sample in of_clients[client]]
        assert draws == [row["answer"]] * row["draws"] + [""] * (4 - row["draws"])


@pytest.mark.real
def test_the_command_prints_the_table_and_names_what_is_missing(
    run: sr.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "labels.csv"
    assert main(["labels", str(run.path), "--rules", "medoid", "--samples", "1", "--csv", str(csv)]) == 0
    printed = capsys.readouterr().out
    assert "random_client" in printed
    assert f"table: {csv}" in printed
    assert pd.read_csv(csv)["competence"].dropna().unique().tolist() == ["equal", "expertise"]
    bare = tmp_path / "bare"
    shutil.copytree(run.path, bare)
    shutil.rmtree(bare / "consensus")
    assert main(["labels", str(bare)]) == 2
    assert capsys.readouterr().err == f"semcons: {bare} has no answers to public prompts to elect labels from\n"
    assert main(["labels", str(run.path), "--rules", "medoids"]) == 2
    assert "medoid" in capsys.readouterr().err
