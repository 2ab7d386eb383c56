"""Label tables: how many labels each way of electing them would have got right, from answers that a run has stored.

Nothing is trained. The stored answers go through the same messages and the same server as in the run, once for each
rule, competence, defence and number of samples, and what is elected is compared with the public prompts' own responses,
which no client and no election ever sees.

Legend: P public prompts, C clients.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from semcons_ray.config import ExperimentConfig, GenerationConfig, dump_yaml, parse_yaml
from semcons_ray.consensus import Election
from semcons_ray.data.split import read_split
from semcons_ray.errors import ConfigError, UserError
from semcons_ray.evaluation.scores import exact_match
from semcons_ray.federation.server import Server, TextEmbedder, build_embedder
from semcons_ray.messages import Answers, text_of
from semcons_ray.metering.gpus import this_place
from semcons_ray.metering.ledger import Ledger
from semcons_ray.parts import BUILT_IN
from semcons_ray.reporting.intervals import arm_intervals
from semcons_ray.reporting.labels import CATEGORY, render_labels
from semcons_ray.reporting.tables import read_frame
from semcons_ray.runs.assembly import embedder_of, known_answers
from semcons_ray.runs.run_folder import RunFolder, differences, write_file

FloatArray = NDArray[np.float64]

RANDOM, OWN, REFERENCE = "random_client", "own_answer", "reference"
ANY_CLIENT, ANY_DRAW = "any client", "any draw"
BESIDE = (RANDOM, OWN, REFERENCE, ANY_CLIENT, ANY_DRAW)
"""Rules of rows that no election gives: controls, and what an election that knew the right answers would reach."""


@dataclass(frozen=True)
class Answered:
    """The answers of a run's clients to its public prompts, and which are right.

    Attributes:
        samples: By round and client id, the client's samples, each P answers; an empty text is a missing one.
        prompts: The public prompts, (P,).
        references: The answers that are right, (P,); an empty text where none is known, or where the server knows it,
            so that there is nothing to elect.
        categories: Category of each prompt, (P,); may be empty texts.
        embedder: Makes vectors of answers.
        num_examples: Private examples by client id, which a message of answers tells.
        known: Answers that the server knows, by prompt.
        seed: The run's seed, by which ties are decided.
        embeds_both: Whether answers are embedded together with their prompts.
        compression: Of messages.
    """

    samples: Mapping[int, Mapping[int, Sequence[Sequence[str]]]]
    prompts: Sequence[str]
    references: Sequence[str]
    categories: Sequence[str]
    embedder: TextEmbedder
    num_examples: Mapping[int, int]
    known: Mapping[int, str] = field(default_factory=dict)
    seed: int = 0
    embeds_both: bool = False
    compression: str = "none"

    def most_samples(self, round: int) -> int:
        """The most answers that a client gave to a prompt in a round."""
        return max(map(len, self.samples[round].values()))

    def messages(self, round: int, num_samples: int) -> dict[int, bytes]:
        """What clients would have sent in a round if they had drawn that many samples, by client id; a client that
        did not answer sent nothing."""
        return {
            client: Answers(
                round_number=round,
                client_id=client,
                num_examples=self.num_examples[client],
                answers=tuple(samples[0]),
                further=tuple(map(tuple, samples[1:num_samples])),
            ).encode(self.compression)
            for client, samples in self.samples[round].items()
            if any(map(any, samples))
        }

    def generation(self, num_samples: int) -> list[GenerationConfig]:
        """How clients would have answered, by id, if they had drawn at most that many samples."""
        have = [1] * (max(max(clients) for clients in self.samples.values()) + 1)
        for clients in self.samples.values():
            for client, samples in clients.items():
                have[client] = min(num_samples, len(samples))
        return [GenerationConfig(num_samples=count) for count in have]

    def uplink_bytes(self, round: int, num_samples: int) -> int:
        """Length of all of `messages`."""
        return sum(map(len, self.messages(round, num_samples).values()))

    def is_right(self, answers: Sequence[str | None]) -> FloatArray:
        """Whether each of P answers is right, 1 or 0; NaN where there is none, or nothing to compare it with."""
        pairs = zip(answers, self.references, strict=True)
        return np.array([exact_match(one, other) if one and other else np.nan for one, other in pairs])


@dataclass(frozen=True, eq=False)
class Labels:
    """How many labels are right, by how they are elected; `semcons_ray.labels` returns it.

    Attributes:
        table: A row for each round and way of electing; see `label_table`.
        pairs: A row for each round and pair of clients; see `joint_errors`.
        left_out: How many prompts of all runs were left out, since no right answer to them is known.
    """

    table: pd.DataFrame
    pairs: pd.DataFrame
    left_out: int

    def __str__(self) -> str:
        """The labels of the last exchange as text, as wide as the terminal."""
        return render_labels(self.table, self.pairs, self.left_out)

    def write(self, path: Path) -> None:
        """Write the table as CSV.

        Raises:
            StorageError: The disk is full, or cannot be written to.
        """
        write_file(path, self.table.to_csv(index=False))


def label_table(runs: Sequence[Answered], elections: Iterable[Election], num_samples: Iterable[int] = ()) -> Labels:
    """Elect labels from stored answers in every way that is asked for, and count which are right.

    Args:
        runs: Runs with different seeds, at least one.
        elections: Rules, competences and defences.
        num_samples: How many of a client's samples to use, the first ones; none: 1, 2, 4 and so on, and all.

    Returns:
        In `table` the columns round, rule, competence, defence, samples (at most, of a client) and num_runs; num_items,
        prompts with a label; value, the share of labels that are right, by exact match; difference, that share less a
        random client's at the same prompts; both with the ends _low and _high of their 95% intervals over prompts, by
        the bootstrap, and _half_width, that of the t-interval over runs; abstained, the share of prompts without a
        label; uplink_bytes of all clients in the round, encoded with every sample; and for each category of prompts a
        column such as "category: gcd", the share of its labels that are right.

        Beside the elections stand rows with the rules in `BESIDE`. random_client is the mean over clients and their
        first samples, which is what drawing a client gives on average, and so is own_answer, where each client learns
        its own. reference are the data's own answers, by which the others are judged. any client: whether any first
        sample is right; any draw: whether any sample is.

    Raises:
        UserError: No client of the runs has as many samples as are asked for.
    """
    rounds = sorted({round for run in runs for round in run.samples})
    most = max(run.most_samples(round) for run in runs for round in run.samples)
    counts = [*num_samples] or [*(2**power for power in range(most.bit_length()) if 2**power < most), most]
    if (asked := max(counts)) > most:
        raise UserError(f"--samples {asked}: clients have drawn {most} at most (generation.num_samples)")
    elected = [
        (election, count, [elect(run, election, count) for run in runs])
        for election, count in itertools.product(elections, counts)
    ]
    numbers: dict[str, int] = {}
    questions = [np.array([numbers.setdefault(prompt, len(numbers)) for prompt in run.prompts]) for run in runs]
    tables = []
    for round in rounds:
        there = [place for place, run in enumerate(runs) if round in run.samples]
        have = [runs[place] for place in there]
        arms = _beside(round, have, counts)
        for election, count, labels in elected:
            right = [run.is_right(labels[place][round])[:, None] for place, run in zip(there, have, strict=True)]
            arms.append(_Arm(*names_of(election), count, right, [run.uplink_bytes(round, count) for run in have]))
        tables.append(_table(round, arms, have, [questions[place] for place in there]))
    pairs = [joint_errors(round, [run for run in runs if round in run.samples]) for round in rounds]
    left_out = sum(not reference for run in runs for reference in run.references)
    return Labels(pd.concat(tables, ignore_index=True), pd.concat(pairs, ignore_index=True), left_out)


def elect(run: Answered, election: Election, num_samples: int) -> dict[int, list[str | None]]:
    """The labels of each round, (P,), None where there is none: elected as the run's own server would have, which keeps
    its trust from round to round."""
    place = this_place(uses_gpu=False)
    server = Server(
        run.embedder,
        num_prompts=len(run.prompts),
        election=election,
        generation=run.generation(num_samples),
        prompts=run.prompts,
        embeds_both=run.embeds_both,
        known=run.known,
        seed=run.seed,
        ledger=Ledger("server", place.node),
    )
    labels, kept = {}, b""
    for round in sorted(run.samples):
        server.begin(round, sorted(run.samples[round]), kept)
        for client, message in run.messages(round, num_samples).items():
            server.collect(client, message)
        verdict = server.conclude()
        kept = verdict.kept
        given = dict(zip(verdict.labels.prompt_ids, verdict.labels.responses, strict=True))
        labels[round] = [given.get(prompt) for prompt in range(len(run.prompts))]
    return labels


def joint_errors(round: int, runs: Sequence[Answered]) -> pd.DataFrame:
    """How often two clients err together in a round, by their first samples.

    Returns:
        A row for each pair, means over runs: columns round, client_a and client_b; both_wrong, the share of prompts at
        which both are wrong; if_independent, what that would be if the errors of one said nothing of the other's; and
        same_wrong, the share at which both give the same wrong answer.
    """
    rows = []
    for run in runs:
        firsts = {client: samples[0] for client, samples in run.samples[round].items()}
        wrong = {client: 1 - run.is_right(answers) for client, answers in firsts.items()}
        for one, other in itertools.combinations(sorted(firsts), 2):
            both = wrong[one] * wrong[other]
            told = ~np.isnan(both)
            if told.any():
                same = np.array([exact_match(*pair) for pair in zip(firsts[one], firsts[other], strict=True)])
                alone = wrong[one][told].mean() * wrong[other][told].mean()
                rows.append((round, one, other, both[told].mean(), alone, (both * same)[told].mean()))
    columns = ["round", "client_a", "client_b", "both_wrong", "if_independent", "same_wrong"]
    return pd.DataFrame(rows, columns=columns).groupby(columns[:3], as_index=False).mean()


def check_seeds(folders: Sequence[Path]) -> ExperimentConfig:
    """Check that runs differ in their seeds only, so that their spread is what chance does, and return the settings of
    the first.

    They may also have different numbers of rounds and test sets, and data in another folder.

    Raises:
        RunFolderError: One is no run folder.
        UserError: Two have the same seed, or another setting is different.
    """
    configs = {folder: RunFolder(folder).stored_config() for folder in dict.fromkeys(folders)}
    first, *_ = configs
    of_seed: dict[int, Path] = {}
    for folder in folders:
        if folder in of_seed.values():
            raise UserError(f"{folder} is given twice")
        seed = configs[folder].seed
        if seed in of_seed:
            raise UserError(f"{of_seed[seed]} and {folder} both have seed {seed}; give one of them")
        of_seed[seed] = folder
        for key, one, other in differences(configs[first], configs[folder]):
            if key in ("seed", "num_rounds", "data.num_test") or key.startswith("evaluation."):
                continue
            if all(isinstance(value, str) and Path(value).is_absolute() for value in (one, other)):
                one, other = Path(one).name, Path(other).name
            if one != other:
                raise UserError(f"{first} and {folder} differ not only in their seeds: {key} is {one!r} and {other!r}")
    return configs[first]


def read_answered(folder: Path) -> Answered:
    """The answers that a run has stored. Where clients sent numbers of equal draws, these are drawn here in an order at
    random; where they sent their choice alone, that is all there is of them.

    Raises:
        RunFolderError: A file is missing or damaged.
        UserError: Its clients answered no public prompts, or none of these has a response.
        ModelError: The run's embedder cannot be loaded.
    """
    opened = RunFolder(folder)
    config, split = opened.stored_config(), read_split(opened.data)
    files = sorted((folder / "consensus").glob("round_*.parquet"))
    if not files:
        raise UserError(f"{folder} has no answers to public prompts to elect labels from")
    if not any(example.response for example in split.public):
        raise UserError(f"{folder}: no public prompt has a response, so it is not known which answers are right")
    samples = {int(file.stem.removeprefix("round_")): _samples(read_frame(file), config) for file in files}
    embedder, options = embedder_of(config, opened.revisions())
    right = [example.response for example in split.public]
    # With the rule `reference` the server knew all, and there would be nothing to elect.
    known = known_answers(config, right) if config.prompts.sentinels else {}
    return Answered(
        samples=samples,
        prompts=[text_of(example.prompt) for example in split.public],
        references=["" if prompt in known else text for prompt, text in enumerate(right)],
        categories=[example.category for example in split.public],
        embedder=build_embedder(embedder, options, "cpu"),
        num_examples=dict(enumerate(split.num_private)),
        known=known,
        seed=config.seed,
        embeds_both=config.server.embed == "prompt_and_answer",
        compression=config.algorithm.compression,
    )


def elections(
    config: ExperimentConfig, rules: Sequence[str], competences: Sequence[str] | None, defences: Sequence[str]
) -> list[Election]:
    """Every rule with every competence and defence; what else an election needs is set as in a run.

    Args:
        config: The run's settings.
        rules: Names, perhaps with options: "plurality {min_cosine: 0.95}".
        competences: The same; None: all that are built in, but sentinels only where the run has some.
        defences: The same.

    Raises:
        ConfigError: There is no such part, or it refuses its options.
    """
    algorithm = config.algorithm
    able = [name for name in BUILT_IN["competence"] if name != "sentinels" or config.prompts.sentinels]
    ways = itertools.product(rules, able if competences is None else competences, defences)
    made = []
    for way in ways:
        (rule, options), (competence, of_competence), (defence, of_defence) = map(parse_part, way)
        made.append(
            Election(
                rule,
                options,
                algorithm.agreement_threshold,
                algorithm.min_votes,
                competence=competence,
                competence_options=of_competence,
                defence=defence,
                defence_options=of_defence,
            )
        )
    return made


def parse_part(words: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a part that is written as by `names_of`.

    Raises:
        ConfigError: The options are no mapping.
    """
    name, brace, inside = words.partition("{")
    try:
        options = parse_yaml(brace + inside) if brace else {}
    except ValueError as error:
        raise ConfigError(f"cannot read the options of {words!r}; an example: 'trimmed {{trim: 0.3}}'") from error
    return name.strip(), options


def _samples(answers: pd.DataFrame, config: ExperimentConfig) -> dict[int, list[list[str]]]:
    """A round's samples by client, each P answers: an answer that stands for several draws is there as often, and a
    draw that was not sent is an empty text."""
    if "draws" not in answers:  # of a run of a time when every draw was sent
        answers["draws"] = 1
    samples = {}
    generation = config.client_generation()
    for client in sorted(answers["client_id"].unique().tolist()):
        of_client = answers[answers["client_id"] == client].sort_values(["prompt_id", "sample"])
        drawn = []
        for _, to_prompt in of_client.groupby("prompt_id"):
            texts = to_prompt["answer"].repeat(to_prompt["draws"].tolist()).tolist()
            drawn.append(texts + [""] * (generation[client].num_samples - len(texts)))
        samples[client] = [*map(list, zip(*drawn, strict=True))]
    return samples


@dataclass(frozen=True)
class _Arm:
    """Labels of one round that come about in one way.

    Attributes:
        right: For each run, which labels are right, (P, K), NaN where there is none: K is 1, or the number of clients
            of which each has labels of its own.
        uplink_bytes: For each run.
    """

    rule: str
    competence: str
    defence: str
    samples: int
    right: Sequence[FloatArray]
    uplink_bytes: Sequence[int]


def _beside(round: int, runs: Sequence[Answered], counts: Sequence[int]) -> list[_Arm]:
    """The rows that no election gives."""
    drawn = [
        [np.stack([run.is_right(sample) for sample in samples], axis=1) for samples in run.samples[round].values()]
        for run in runs
    ]
    firsts = [np.stack([of_client[:, 0] for of_client in of_run], axis=1) for of_run in drawn]
    once, nothing = [run.uplink_bytes(round, 1) for run in runs], [0] * len(runs)
    known = [run.is_right(run.references)[:, None] for run in runs]
    arms = [
        _Arm(RANDOM, "", "", 1, firsts, once),
        _Arm(OWN, "", "", 1, firsts, nothing),
        _Arm(REFERENCE, "", "", 0, known, nothing),
        _Arm(ANY_CLIENT, "", "", 1, [_any(right) for right in firsts], once),
    ]
    for count in (count for count in counts if count > 1):
        right = [_any(np.concatenate([one[:, :count] for one in of_run], axis=1)) for of_run in drawn]
        arms.append(_Arm(ANY_DRAW, "", "", count, right, [run.uplink_bytes(round, count) for run in runs]))
    return arms


def _any(right: FloatArray) -> FloatArray:
    """Whether any of a prompt's answers is right, (P, 1); NaN where there is none."""
    best: FloatArray = np.fmax.reduce(right, axis=1, keepdims=True)
    return best


def _table(
    round: int, arms: Sequence[_Arm], runs: Sequence[Answered], questions: Sequence[NDArray[np.int64]]
) -> pd.DataFrame:
    items = {}
    for (place, arm), (run, asked) in itertools.product(enumerate(arms), enumerate(questions)):
        columns = arm.right[run].shape[1]
        items[str(place), run] = pd.DataFrame(
            {
                "client_id": np.tile(np.arange(columns), len(asked)),
                "question": np.repeat(asked, columns),
                "exact_match": arm.right[run].ravel(),
            }
        )
    told = arm_intervals(items, ["exact_match"], "0").set_index("arm").drop(columns=["metric", "label"])
    intervals = told.reindex([str(place) for place in range(len(arms))])  # one without labels is not told of
    intervals["num_items"] = intervals["num_items"].fillna(0).astype(int)
    categories = [category for run in runs for category in run.categories]
    compared = np.concatenate([[bool(text) for text in run.references] for run in runs])
    rows = []
    for place, arm in enumerate(arms):
        right = np.concatenate([_mean(right) for right in arm.right])
        rows.append(
            {"round": round, "rule": arm.rule, "competence": arm.competence, "defence": arm.defence}
            | {"samples": arm.samples, "num_runs": len(runs)}
            | {str(name): intervals[name].iloc[place] for name in intervals}
            | {"abstained": np.isnan(right[compared]).mean(), "uplink_bytes": np.mean(arm.uplink_bytes)}
            | pd.Series(right).groupby(categories).mean().add_prefix(CATEGORY).to_dict()
        )
    return pd.DataFrame(rows)


def _mean(right: FloatArray) -> FloatArray:
    """Mean over columns, (P,), of those that are known; NaN where none is."""
    known = ~np.isnan(right)
    with np.errstate(invalid="ignore"):
        means: FloatArray = np.where(known, right, 0).sum(axis=1) / known.sum(axis=1)
    return means


def names_of(election: Election) -> tuple[str, str, str]:
    """Rule, competence and defence with their options, as they are written on the command line."""
    parts = (
        (election.rule, election.options),
        (election.competence, election.competence_options),
        (election.defence, election.defence_options),
    )
    rule, competence, defence = (
        f"{name} {dump_yaml(dict(options), in_a_line=True).strip()}" if options else name for name, options in parts
    )
    return rule, competence, defence
