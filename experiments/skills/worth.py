"""What labels are worth to those who learn them: the clients of finished runs go on for one round with labels that came
about in different ways, all else being equal, and answer test questions of all skills. The table of README.md.

    semcons run experiments/attack/labels.yaml --seed 0 --out runs/labels-0     # and seeds 1 to 4
    python experiments/skills/worth.py runs/labels-? --out runs/worth
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from semcons_ray.consensus import Election
from semcons_ray.data.split import read_split, write_split
from semcons_ray.federation.algorithms.semantic_consensus import SemanticConsensus
from semcons_ray.federation.opinions import choices, opinion_of
from semcons_ray.federation.server import ServerState
from semcons_ray.messages import PseudoLabels
from semcons_ray.reporting.intervals import mean_and_half_width
from semcons_ray.runs.assembly import unused_examples
from semcons_ray.runs.experiment import resume_experiment
from semcons_ray.runs.run_folder import RunFolder
from semcons_ray.studies.labels import Answered, elect, read_answered
from semcons_ray.studies.learning import one_round_more

NUM_TEST, LOCAL_EPOCHS = 250, 2
ELECTED, RANDOM, OWN, REFERENCE, NONE = "elected", "random client", "own answers", "reference", "no labels"
CONFIRMED = "own answers that were elected"
WAYS = (RANDOM, ELECTED, OWN, CONFIRMED, REFERENCE, NONE)
ELECTION = Election("plurality", {"min_cosine": 1.0}, competence="expertise", defence="independent")


@dataclass(frozen=True)
class Confirmed(SemanticConsensus):
    """Each client learns labels of its own, which are by client in the server's state: those of the elected ones that
    the client itself gave most often, so that one bit a prompt would tell it which."""

    def downlinks(self, round: int, state: bytes, client_ids: Sequence[int]) -> Mapping[int, bytes]:
        """The client's labels."""
        of_clients = msgspec.msgpack.decode(state, type=dict[int, bytes])
        return {client: of_clients[client] for client in client_ids}


def confirmed(run: Answered, compression: str) -> bytes:
    """The state of `Confirmed`."""
    last = max(run.samples)
    elected = labels(run, ELECTED)
    sent = {}
    for client, draws in run.samples[last].items():
        own, _ = choices(draws)
        same = [label and opinion_of(label) == opinion_of(text) for label, text in zip(elected, own, strict=True)]
        mine = [label if is_own else None for label, is_own in zip(elected, same, strict=True)]
        sent[client] = PseudoLabels.of(last, mine).encode(compression)
    return msgspec.msgpack.encode(sent)


def labels(run: Answered, way: str) -> Sequence[str | None]:
    """The labels of the run's last exchange, (P,), if they come about in this way."""
    if way == ELECTED:
        return elect(run, ELECTION, run.most_samples(max(run.samples)))[max(run.samples)]
    if way == RANDOM:  # a client of its own for each prompt, and its first draw
        return elect(run, Election("random_client"), 1)[max(run.samples)]
    return run.references if way == REFERENCE else [None] * len(run.prompts)


def go_on(folder: Path, run: Answered, way: str, out: Path) -> None:
    """Let the run's clients learn for one more round, in a folder of its own, and answer `NUM_TEST` test prompts: those
    of the run, and further ones that no client has seen."""
    base = RunFolder(folder)
    last = base.stored_config().num_rounds
    config = one_round_more(base.stored_config(), NUM_TEST)
    algorithm = {
        OWN: {"rule": "own_answer", "plurality_similarity": 0.8},
        CONFIRMED: {"name": f"worth:{Confirmed.__name__}"},
    }.get(way, {})
    config = config.model_copy(
        update={
            "algorithm": config.algorithm.model_copy(update=algorithm),
            "data": config.data.model_copy(update={"num_test": NUM_TEST}),
            "training": config.training.model_copy(update={"local_epochs": LOCAL_EPOCHS}),
            "generation": config.generation.model_copy(update={"batch_size": 64, "num_samples": 1}),
            "evaluation": config.evaluation.model_copy(update={"metrics": ("exact_match",)}),
        }
    )
    compression = config.algorithm.compression
    message = ServerState(PseudoLabels.of(last, labels(run, way)).encode(compression)).encode()
    branch = base.branch(out, config, confirmed(run, compression) if way == CONFIRMED else message)
    split = read_split(branch.data)
    unseen = unused_examples(config, split)
    order = np.random.default_rng(config.seed).permutation(len(unseen))[: NUM_TEST - len(split.test)]
    write_split(dataclasses.replace(split, test=(*split.test, *(unseen[place] for place in order))), branch.data)


def scores(folder: Path) -> pd.DataFrame:
    """By client, its model and its skill, exact match in all test prompts, in those of its own skill and in the others,
    and how many there are."""
    branch = RunFolder(folder)
    split, config = read_split(branch.data), branch.stored_config()
    items = pd.read_parquet(folder / "items" / f"round_{config.num_rounds:03d}.parquet")
    rows = []
    for client, mine in items.groupby("client_id"):
        skill = split.private[client][0].category
        is_own, right = np.array([split.test[item].category == skill for item in mine["item"]]), mine["exact_match"]
        means = {"all_skills": right.mean(), "own_skill": right[is_own].mean(), "other_skills": right[~is_own].mean()}
        model = config.model_of(client).removeprefix("packaged:")
        rows.append({"client": client, "model": model, "skill": skill, **means, "num_items": mine["item"].nunique()})
    return pd.DataFrame(rows)


def by_client(table: pd.DataFrame) -> pd.DataFrame:
    """For each client, what elected labels give it over none, seed by seed, with half of the 95% t-interval."""
    rows = []
    for (client, model, skill), seeds in table.groupby(["client", "model", "skill"]):
        row: dict[str, object] = {"client": client, "model": model, "skill": skill, "seeds": seeds["seed"].nunique()}
        for measure in ("all_skills", "own_skill", "other_skills"):
            ways = seeds.pivot(index="seed", columns="labels", values=measure)
            gain, half = mean_and_half_width((ways[ELECTED] - ways[NONE]).to_numpy(float))
            row |= {f"{measure}, none": ways[NONE].mean(), f"{measure}, gain": gain, f"{measure}, half width": half}
        rows.append(row)
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """By way, means over seeds, and differences to a random client's labels and to none, seed by seed, with half of
    their 95% t-intervals."""
    rows = []
    for way, seeds in table.groupby("labels", sort=False):
        row: dict[str, object] = {"labels": way, "seeds": len(seeds)}
        row |= {name: seeds[name].mean() for name in ("labels_right", "own_skill", "other_skills")}
        for against in (way for way in (RANDOM, NONE, OWN) if way in set(table["labels"])):
            paired = seeds.set_index("seed").join(
                table[table["labels"] == against].set_index("seed"), rsuffix="_there", how="inner"
            )
            for skill in ("own_skill", "other_skills"):
                gain, half = mean_and_half_width((paired[skill] - paired[f"{skill}_there"]).to_numpy(float))
                row |= {f"{skill} against {against}": gain, f"{skill} against {against}, half width": half}
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs whose clients answered last")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="how labels come about")
    parser.add_argument("--out", type=Path, required=True, help="folder in which clients learn")
    parser.add_argument("--table", type=Path, help="folder for what is found; none: only learn")
    args = parser.parse_args()
    places: Mapping[tuple[Path, str], Path] = {
        (folder, way): args.out / folder.name / way.replace(" ", "_") for folder in args.runs for way in args.ways
    }
    rows, clients = [], []
    for (folder, way), place in places.items():
        run = read_answered(folder)
        if not place.exists():
            go_on(folder, run, way, place)
        resume_experiment(place)
        right = float(np.nanmean(run.is_right(labels(run, way)))) if way in (RANDOM, ELECTED, REFERENCE) else np.nan
        found = scores(place)
        clients.append(found.assign(seed=run.seed, labels=way))
        means = {key: found[key].mean() for key in ("own_skill", "other_skills", "num_items")}
        rows.append({"seed": run.seed, "labels": way, "labels_right": right, **means})
        print(rows[-1], flush=True)
    if args.table:
        table = pd.DataFrame(rows)
        table.to_csv(args.table / "worth.csv", index=False, float_format="%.4f")
        summary(table).to_csv(args.table / "worth_summary.csv", index=False, float_format="%.4f")
        print(summary(table).round(3).to_string(index=False))
        if {ELECTED, NONE} <= {*args.ways}:
            gains = by_client(pd.concat(clients))
            gains.to_csv(args.table / "worth_clients.csv", index=False, float_format="%.4f")
            print(gains.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
