"""Attacks on the consensus, tried on the stored answers of runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd

from semcons_ray.api.places import local_folder
from semcons_ray.api.results import Run
from semcons_ray.config import ExperimentConfig
from semcons_ray.consensus import Election
from semcons_ray.errors import ConfigError, UserError
from semcons_ray.federation.server import build_embedder
from semcons_ray.parts import build, names
from semcons_ray.reporting.attacks import render_attacks, summarize_attacks, write_attack_figure
from semcons_ray.security.attacks import Draws
from semcons_ray.security.rehearsal import Rehearsal

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


class Attacks:
    """What attackers got; `attack` returns one.

    Args:
        path: The folder with attack.csv and the figure.
        table: See the attribute.

    Attributes:
        path: The folder.
        table: A row for each run, rule, defence, attack and share of attackers. Columns: run (its folder), seed, rule,
            defence, attack ("none" at share 0), share, num_attackers, captured (share of the labels that are the
            attackers' answers, wrong, and would not be there without them), accuracy (share of the labels that are
            right) and lost (accuracy of the same rule and defence without attackers less that).
    """

    def __init__(self, path: Path, table: pd.DataFrame) -> None:
        self.path, self.table = path, table

    def __str__(self) -> str:
        """The summary as text, as wide as the terminal."""
        return render_attacks(self.summary, self.table["run"].nunique()).rstrip("\n")

    @cached_property
    def summary(self) -> pd.DataFrame:
        """Means over runs, and half widths of their 95% t-intervals; see `table`."""
        return summarize_attacks(self.table)

    @property
    def figure(self) -> Path:
        """The figure of labels captured against the share of attackers, attack.svg; beside it is attack.png."""
        return self.path / "attack.svg"


def attack(
    *runs: Run,
    out: str | Path,
    rules: Sequence[str] = (),
    defences: Sequence[str] = ("none", "independent"),
    attacks: Sequence[str] = (),
    shares: Sequence[float] = SHARES,
    say: Callable[[str], None] | None = None,
) -> Attacks:
    """Add malicious clients to the stored answers of runs, and see how many labels they capture. Nothing is trained.

    Args:
        runs: Runs that formed a consensus. Settings of the election that are not varied are those of each run.
        out: Folder for attack.csv and the figure.
        rules: Names of rules; none: the rule of each run.
        defences: Names of defences.
        attacks: Names of attacks; none: all that have a name.
        shares: Which shares of all clients are malicious, each above 0 and under 1. Honest clients are those of the
            run, and attackers come in addition; their number is rounded.
        say: Called with a line for each rule and defence of a run that is done.

    Raises:
        UserError: A run has no answers, a name is unknown, or a share is out of range.
    """
    if wrong := [share for share in shares if not 0 < share < 1]:
        raise ConfigError(f"shares must be above 0 and under 1, not {wrong[0]:g}")
    made = {name: build("attack", name, setting="attacks") for name in attacks or names("attack")}
    rows = []
    for run in runs:
        rehearsal, config = _rehearsal(run), run.config
        of_run = {"run": str(run.path), "seed": config.seed}
        for election in _elections(config, rules, defences):
            alone = rehearsal.play(election, lambda scene: (), 0)
            this = of_run | {"rule": election.rule, "defence": election.defence}
            rows.append(this | {"attack": "none", "share": 0.0, **dataclasses.asdict(alone), "lost": 0.0})
            for name, attacker in made.items():
                for share in shares:
                    outcome = rehearsal.play(election, attacker, share)
                    lost = alone.accuracy - outcome.accuracy
                    rows.append(this | {"attack": name, "share": share, **dataclasses.asdict(outcome), "lost": lost})
            if say:
                say(f"{run.path}: {election.rule} with defence {election.defence}")
    folder = local_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    done = Attacks(folder, pd.DataFrame(rows))
    done.table.to_csv(folder / "attack.csv", index=False)
    write_attack_figure(done.summary, folder)
    return done


def _elections(config: ExperimentConfig, rules: Sequence[str], defences: Sequence[str]) -> list[Election]:
    """Every rule with every defence; each has the options that the run gives it."""
    algorithm = config.algorithm
    usual = Election(
        algorithm.rule,
        algorithm.options_of_rule,
        algorithm.agreement_threshold,
        algorithm.min_votes,
        competence=algorithm.competence,
        competence_options=algorithm.competence_options,
        defence=algorithm.defence,
        defence_options=algorithm.defence_options,
    )
    return [
        dataclasses.replace(
            usual,
            rule=rule,
            options=usual.options if rule == usual.rule else {},
            defence=defence,
            defence_options=usual.defence_options if defence == usual.defence else {},
        )
        for rule in rules or [usual.rule]
        for defence in defences
    ]


def _rehearsal(run: Run) -> Rehearsal:
    """The run's prompts and answers, and the embedder that it has."""
    config, public = run.config, run.public
    rounds = [_draws(run.answers(number)) for number in run.exchanges]
    if not rounds:
        raise UserError(f"{run.path}: no consensus was formed, so there are no answers to attack")
    options = config.server.options_of_embedder
    if config.server.model:
        options["name"] = config.server.model
    return Rehearsal(
        embedder=build_embedder(config.server.embedder, options, "cpu"),
        prompts=tuple(public["prompt"]),
        categories=tuple(public["category"].fillna("")),
        references=tuple(public["response"]),
        rounds=rounds,
        embeds_both=config.server.embed == "prompt_and_answer",
        seed=config.seed,
    )


def _draws(answers: pd.DataFrame) -> tuple[Draws, ...]:
    """What each client that answered sent, in the order of the prompts."""
    ordered = answers.sort_values("prompt_id")
    return tuple(
        tuple(tuple(draw["answer"]) for _, draw in of_client.groupby("sample"))
        for _, of_client in ordered.groupby("client_id")
        if of_client["answer"].ne("").any()
    )
