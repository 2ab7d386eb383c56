"""Attacks on the consensus, tried on the answers that runs have stored: clients are added that send what an attack
says, and the labels are elected anew. If it is asked for, the runs' clients learn them.

Legend: C honest clients, K attackers, P public prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from semcons_ray.config import ExperimentConfig
from semcons_ray.consensus import Election
from semcons_ray.errors import ConfigError
from semcons_ray.evaluation.scores import exact_match
from semcons_ray.federation.opinions import opinion_of, opinions_of
from semcons_ray.parts import build, names
from semcons_ray.reporting.attacks import draw_attacks, render_attacks, summarize_attacks
from semcons_ray.runs.run_folder import write_file
from semcons_ray.security.attacks import Attack, Draws, HasGoal, Scene
from semcons_ray.studies import learning
from semcons_ray.studies.labels import Answered, elect, elections, names_of, parse_part

Labels = Sequence[str | None]
Learn = Callable[[int, Labels], pd.DataFrame]
"""Has the clients of the run of a number, from 0, learn labels, (P,); see `learning.learn`."""


@dataclass(frozen=True)
class Outcome:
    """What attackers got.

    Attributes:
        num_attackers: Number K of attackers.
        captured: Share of the prompts whose label is an answer of the attackers', wrong, and not what would be elected
            without them; of prompts whose right answer is known, and mean over the rounds in which they do harm.
        accuracy: Share of the same prompts whose label is right, in the same rounds.
        labels: The labels of the last round, (P,).
        usual: Those without attackers.
    """

    num_attackers: int
    captured: float
    accuracy: float
    labels: Labels
    usual: Labels


@dataclass(frozen=True, eq=False)
class Attacks:
    """What attackers got; `semcons_ray.attack` returns it.

    Attributes:
        table: A row for each run, way of electing, attack and share of attackers; see `attack_table`.
    """

    table: pd.DataFrame

    def __str__(self) -> str:
        """The summary as text, as wide as the terminal."""
        return render_attacks(self.summary, self.table["seed"].nunique())

    @cached_property
    def summary(self) -> pd.DataFrame:
        """Means over runs, and half widths of their 95% t-intervals in columns that end in _half_width."""
        return summarize_attacks(self.table)

    def write(self, folder: Path) -> None:
        """Write attack.csv, the table, and attack.svg and attack.png, labels captured against the share of attackers.

        Raises:
            StorageError: The disk is full, or cannot be written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "attack.csv", self.table.to_csv(index=False))
        draw_attacks(self.summary, folder)


def attack_table(
    runs: Sequence[Answered],
    ways: Sequence[Election],
    attacks: Mapping[str, Attack],
    shares: Sequence[float],
    say: Callable[[str], None],
    learn: Learn | None = None,
) -> Attacks:
    """Try every attack on every way of electing.

    Args:
        runs: Runs with different seeds, at least one.
        ways: Rules, competences and defences.
        attacks: The attacks by name.
        shares: Which shares of all clients are malicious. Honest clients are those of a run, and attackers come in
            addition; their number is rounded.
        say: Called with a line for each way of electing that is done with a run.
        learn: Has clients learn labels that an attack with a goal led to (`HasGoal`), and those without it.

    Returns:
        In `table` the columns seed, rule, competence, defence, attack ("none" where share is 0), share, num_attackers,
        captured and accuracy (see `Outcome`), and lost, the accuracy of the same election without attackers less that.
        With `learn` also success, the share of the test prompts for which the attack has a goal that honest clients'
        models answer as it wants, mean over clients; test_accuracy, the share of all test prompts that they answer
        right; and usual_success and usual_test_accuracy, the same of models that learnt the labels without attackers.
        NaN where an attack has no goal.

    Raises:
        ConfigError: A share is out of range, or an attack gives no answers of so many clients.
    """
    fewest = min(map(_num_clients, runs))
    check_shares(shares, fewest)
    if nobody := [share for share in shares if not num_attackers(fewest, share)]:
        say(f"at {', '.join(f'{share:g}' for share in nobody)} of so few clients none is malicious: left out")
    shares = [share for share in shares if share not in nobody]
    num_rounds = 1 + max((_honest_rounds(attack) for attack in attacks.values()), default=0)
    rows = []
    for number, run in enumerate(runs):
        for election in ways:
            usual = elect(_lengthened(run, num_rounds), election, _most_samples(run))
            keys = {"seed": run.seed, **dict(zip(("rule", "competence", "defence"), names_of(election), strict=True))}

            def row(name: str, attack: Attack, share: float) -> dict[str, Any]:
                outcome = play(run, election, attack, share, usual)  # noqa: B023
                learnt = _learnt(run, attack, outcome, partial(learn, number)) if learn and share else {}  # noqa: B023
                got = {name: getattr(outcome, name) for name in ("num_attackers", "captured", "accuracy")}
                return {**keys, "attack": name, "share": share, **got, **learnt}  # noqa: B023

            unharmed = row("none", lambda scene: (), 0.0)
            tried = [row(name, attack, share) for name, attack in attacks.items() for share in shares]
            rows += [one | {"lost": unharmed["accuracy"] - one["accuracy"]} for one in (unharmed, *tried)]
            say(f"seed {run.seed}: {keys['rule']} with competence {keys['competence']}, defence {keys['defence']}")
    return Attacks(pd.DataFrame(rows))


def ways_to_elect(config: ExperimentConfig, rules: Sequence[str], defences: Sequence[str]) -> list[Election]:
    """Every rule with every defence; what else an election needs is set as in a run.

    Args:
        config: The run's settings.
        rules: See `studies.labels.elections`; none: the run's rule.
        defences: The same for defences.

    Raises:
        ConfigError: There is no such part, or it refuses its options.
    """
    algorithm = config.algorithm
    rule, competence, _ = names_of(
        Election(
            algorithm.rule,
            algorithm.options_of_rule,
            competence=algorithm.competence,
            competence_options=algorithm.competence_options,
        )
    )
    return elections(config, rules or [rule], [competence], defences)


def check_shares(shares: Sequence[float], num_clients: int) -> None:
    """Check shares of malicious clients, beside so many honest ones.

    Raises:
        ConfigError: One is out of range, or none is large enough for one attacker.
    """
    if wrong := [share for share in shares if not 0 < share < 1]:
        raise ConfigError(f"--shares must be above 0 and under 1, not {wrong[0]:g}")
    if not any(num_attackers(num_clients, share) for share in shares):
        raise ConfigError(f"--shares: beside {num_clients} honest clients not one is malicious; raise them")


def num_attackers(num_clients: int, share: float) -> int:
    """How many attackers beside so many honest clients are nearest to a share of all."""
    return round(share / (1 - share) * num_clients)


def check_goals(attacks: Iterable[Attack]) -> None:
    """Check that there is something to learn from attacks.

    Raises:
        ConfigError: None of them has a goal.
    """
    if not any(isinstance(attack, HasGoal) for attack in attacks):
        raise ConfigError("--learn needs an attack that wants something of models, such as backdoor")


def make_attacks(wanted: Sequence[str]) -> dict[str, Attack]:
    """Attacks by their names, perhaps with options: "backdoor {trigger: gcd}"; none: all that have a name.

    Raises:
        ConfigError: There is no such attack, or it refuses its options.
    """
    return {words: build("attack", *parse_part(words), setting="--attacks") for words in wanted or names("attack")}


def play(
    run: Answered, election: Election, attack: Attack, share: float, usual: Mapping[int, Sequence[str | None]]
) -> Outcome:
    """Let attackers take part in every round.

    Where an attack takes more rounds than there are, honest clients say in further ones what they said in the last.

    Args:
        run: Answers of the honest clients.
        election: Rule, competence and defence.
        attack: What attackers send.
        share: Which share of all clients they are, to the nearest whole number of them.
        usual: The labels without attackers, by round, of as many rounds.

    Raises:
        ConfigError: The attack gives no answers of so many clients.
    """
    honest_rounds = _honest_rounds(attack)
    run = _lengthened(run, honest_rounds + 1)
    count = num_attackers(_num_clients(run), share)
    first = 1 + max(max(clients) for clients in run.samples.values())
    sent = {number: _sent(run, place, attack, count) for place, number in enumerate(sorted(run.samples), 1)}
    attacked = dataclasses.replace(
        run,
        samples={number: {**run.samples[number], **dict(enumerate(theirs, first))} for number, theirs in sent.items()},
        num_examples={**run.num_examples, **dict.fromkeys(range(first, first + count), 1)},
    )
    labels = elect(attacked, election, _most_samples(run))
    harmed = sorted(labels)[honest_rounds:]
    known = [bool(text) for text in run.references]
    right = np.array([run.is_right(labels[number]) == 1 for number in harmed])[:, known]
    theirs = np.array([_are_theirs(labels[number], usual[number], sent[number]) for number in harmed])[:, known]
    last = max(labels)
    return Outcome(count, float((theirs & ~right).mean()), float(right.mean()), labels[last], usual[last])


def learner(folders: Sequence[Path], out: Path, say: Callable[[str], None]) -> Learn:
    """Has clients of runs learn labels, each time in a folder of its own within `out`, and the same labels once.

    Args:
        folders: The runs' folders.
        out: Where they learn.
        say: Called with a line before clients learn.

    Raises:
        UserError: A run cannot go on; see `check_learning`.
    """
    for folder in folders:
        learning.check_learning(folder)

    def learnt(number: int, labels: Labels) -> pd.DataFrame:
        digest = hashlib.sha256(repr([*labels]).encode()).hexdigest()[:12]
        place = out / f"{number}-{folders[number].resolve().name}" / digest
        say(f"{folders[number]}: clients learn labels, in {place}")
        return learning.learn(folders[number], labels, place)

    return learnt


def _learnt(
    run: Answered, attack: Attack, outcome: Outcome, learn: Callable[[Labels], pd.DataFrame]
) -> dict[str, float]:
    """The columns of `attack_table` on what models learnt."""
    if not isinstance(attack, HasGoal):
        return {}
    found: dict[str, float] = {}
    for prefix, labels in (("", outcome.labels), ("usual_", outcome.usual)):
        items = learn(labels)
        wanted = attack.wanted(items["prompt"].tolist(), run.prompts)
        success = [
            np.nan if goal is None else float(opinion_of(answer) == opinion_of(goal))
            for answer, goal in zip(items["answer"], wanted, strict=True)
        ]
        right = [exact_match(*pair) for pair in zip(items["answer"], items["response"], strict=True)]
        means = items.assign(success=success, right=right).groupby("client_id")[["success", "right"]].mean().mean()
        found |= {f"{prefix}success": float(means["success"]), f"{prefix}test_accuracy": float(means["right"])}
    return found


def _honest_rounds(attack: Attack) -> int:
    return getattr(attack, "honest_rounds", 0)


def _num_clients(run: Answered) -> int:
    return max(map(len, run.samples.values()))


def _most_samples(run: Answered) -> int:
    return max(map(run.most_samples, run.samples))


def _lengthened(run: Answered, num_rounds: int) -> Answered:
    """The run with at least so many rounds, the further ones like its last."""
    last = max(run.samples)
    further = range(last + 1, last + 1 + num_rounds - len(run.samples))
    return dataclasses.replace(run, samples={**run.samples, **dict.fromkeys(further, run.samples[last])})


def _sent(run: Answered, place: int, attack: Attack, count: int) -> tuple[Draws, ...]:
    """What attackers send in the round at a place, from 1."""
    answered = run.samples[sorted(run.samples)[place - 1]].values()
    scene = Scene(
        round=place,
        prompts=tuple(run.prompts),
        categories=tuple(run.categories),
        honest=tuple(tuple(map(tuple, samples)) for samples in answered if any(map(any, samples))),
        count=count,
        embed=run.embedder.embed,
        random=np.random.default_rng([run.seed, place]),
    )
    sent = tuple(attack(scene)) if count else ()
    if len(sent) != count or any([*map(len, draws)] != [len(run.prompts)] * scene.num_samples for draws in sent):
        name = getattr(attack, "__name__", type(attack).__name__)
        raise ConfigError(f"attack {name} must give {count} attackers {scene.num_samples} answers to each prompt")
    return sent


def _are_theirs(
    labels: Sequence[str | None], usual: Sequence[str | None], sent: Sequence[Draws]
) -> list[bool]:
    """Which labels are an answer of the attackers', and not the usual ones, (P,)."""
    texts = [[text or "" for text in row] for row in (labels, usual, *(draw for draws in sent for draw in draws))]
    return [
        bool(label) and one in theirs and one != other
        for label, (one, other, *theirs) in zip(labels, opinions_of(texts).tolist(), strict=True)
    ]
