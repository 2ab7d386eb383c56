"""Runs the rounds of an experiment, commits each, and resumes a run that was stopped or killed."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from semcons_ray.config import DEFAULT_METRICS, ExperimentConfig, named_parts
from semcons_ray.data.losses import Tally
from semcons_ray.data.split import DataSplit, pooled
from semcons_ray.distributed.engines import describe_engines
from semcons_ray.distributed.placement import Node, describe_plan
from semcons_ray.endpoints.judge import Judge
from semcons_ray.errors import ModelError
from semcons_ray.evaluation.metrics import OWN_METRICS, score_items, value
from semcons_ray.federation.fleet import Evaluation, Fleet, HandsOn, Reply, RoundOutcome, own_evaluations
from semcons_ray.federation.server import ServerProtocol, Verdict
from semcons_ray.federation.virtual_time import VirtualTime
from semcons_ray.messages import PseudoLabels
from semcons_ray.metering.energy import EnergyWindow, apportion, own_windows
from semcons_ray.metering.environment import describe_environment
from semcons_ray.metering.ledger import LedgerRow, idle_rows
from semcons_ray.parts import keep_code, use_code
from semcons_ray.runs.assembly import (
    CUT,
    Method,
    Placement,
    check_models,
    check_test_set,
    cluster,
    cohort_of,
    count_cut_texts,
    engines,
    find_models,
    harness_of,
    judge_of,
    kinds_of,
    make_method,
    model_sizes,
    parts,
    pin_revisions,
    place,
    prepare_data,
    resolve_max_length,
)
from semcons_ray.runs.observers import Logged, Observer, Observers
from semcons_ray.runs.own_process import as_found
from semcons_ray.runs.run_folder import Commit, MetricsRow, RoundRow, RunFolder
from semcons_ray.runs.trackers import Exported, check_trackers, trackers
from semcons_ray.runs.virtual_clock import check_federation, virtual_time
from semcons_ray.timeline.devices import Model
from semcons_ray.tracking.run_log import run_log


def run_experiment(config: ExperimentConfig, out: Path, *observers: Observer, alone: bool = True) -> RunFolder:
    """Run an experiment from its beginning, into a new folder.

    Args:
        config: What to run.
        out: The folder, which must not exist or be empty.
        observers: Are told of the progress, besides those that `config.tracking` asks for.
        alone: Whether no other run shares its machines. If others do, energy is measured only for GPUs that it has to
            itself, and estimated for the rest, since a counter cannot tell runs apart.

    Raises:
        UserError: Something in the config, the data, the models, the cluster or the folder must be changed.
        QuorumError: Too few clients answered; `resume_experiment` goes on from the last round.
    """
    check_trackers(config)
    folder = RunFolder.create(out, config)
    with as_found(), folder.locked(), run_log(folder.log, "driver"):
        _execute(folder, config, Observers([Logged(), *observers]), alone)
    return folder


def resume_experiment(out: Path, *observers: Observer, alone: bool = True) -> RunFolder:
    """Continue a run from its last committed round; if it is finished, only its tables are written again, and trackers
    are sent what they lack.

    Args:
        out: The run's folder.
        observers: See `run_experiment`.
        alone: See `run_experiment`.

    Raises:
        RunFolderError: `out` is no run folder, is damaged, or is in use; or settings in its config.yaml were changed
            that decide the run's numbers (see `DECIDE_NO_NUMBER`).
        UserError: See `run_experiment`.
        QuorumError: See `run_experiment`.
    """
    folder = RunFolder(out)
    use_code(folder.code, first=False)
    config = folder.settings_to_resume(folder.read_config())
    check_trackers(config)
    with as_found(), folder.locked(), run_log(folder.log, "driver"):
        _execute(folder, config, Observers([Logged(), *observers]), alone)
    return folder


def _execute(folder: RunFolder, config: ExperimentConfig, observer: Observer, alone: bool) -> None:
    commits = folder.commits()
    folder.write_tables(commits)  # of a driver that was killed, the last round may not be in them
    if folder.is_finished(config.num_rounds):
        with Observers(trackers(config, folder)).during(commits):
            return
    keep_code(folder.code, named_parts(config))
    method = make_method(config)
    config, split, models, revisions = _prepare(folder, config, observer)
    sizes = model_sizes(models)
    with cluster(config) as nodes:
        placement = place(config, nodes, models, revisions)
        config = placement.config
        folder.write_config(config)
        observer.planned(_describe(placement))
        observer.stage("loading models")
        began = time.time()
        exported = Exported(folder.path.resolve().name, config)
        observers = Observers([exported, *trackers(config, folder), observer])
        with (
            engines(placement) as started,
            parts(placement, split, method, folder, started) as (fleet, server),
            observers.during(commits),
        ):
            _write_placement(folder, placement, sizes, fleet, alone)
            folder.drop_adapters()
            judge = judge_of(config, folder.state)
            virtual = None
            if config.federation.devices:
                virtual = virtual_time(config, sizes, split)
                virtual.begin([commit.ledger for commit in commits[1:]], fleet)
            rounds = Rounds(folder, placement, split, method, fleet, server, observers, alone, judge, virtual)
            first = len(commits)
            del commits  # the driver's memory does not grow with the rounds
            for round in range(first, config.num_rounds + 1):
                commit, state = rounds.run(round, began)
                folder.commit(commit, state)
                observers.round_ends(commit)
            others = ", ".join(config.other_models)
            without = f"; clients of {others} have none" if others else ""
            observers.stage(f"writing adapters{without}")
            last = config.num_rounds + 1
            open_clients = [config.clients_with()[name] for name in config.open_models]
            trained = [
                client
                for client in method.cohort.members
                if rounds.num_private[client] and any(client in clients for clients in open_clients)
            ]
            downlinks = method.algorithm.downlinks(last, folder.server_state(config.num_rounds), trained)
            with folder.writing_adapters() as adapters:
                fleet.export_adapters(last, downlinks, adapters)
            if started:
                peaks = {name: engine.host_bytes() for name, engine in started.items()}
                folder.write_json("engines.json", {"peak_host_bytes": peaks})


def _prepare(
    folder: RunFolder, config: ExperimentConfig, observer: Observer
) -> tuple[ExperimentConfig, DataSplit, dict[str, Path], dict[str, str]]:
    """Divide the data, and find and check the models.

    Returns:
        The settings with `model.max_length` resolved, the split, and folders and commits of models by name.
    """
    judge_of(config, folder.state)  # which needs a key
    kinds_of(config, folder.state)  # refuses what cannot be made
    observer.stage("reading data")
    revisions = pin_revisions(config, folder.revisions())
    folder.write_json("environment.json", describe_environment() | {"revisions": revisions})
    split = prepare_data(config, folder, revisions)
    check_test_set(config.evaluation, split.test)
    harness_of(config).check("evaluation.lm_eval.tasks")
    of_data = tuple(tally for tally in folder.tallies() if not tally.what.startswith(CUT))
    _tell_losses(of_data, observer)
    if config.algorithm.name == "centralized":
        split = pooled(split)
    if config.evaluation.lm_eval.tasks and config.other_models:
        observer.planned(f"evaluation.lm_eval.tasks leave out {', '.join(config.other_models)}, which is not here")
    observer.stage("finding models")
    models = find_models(config, revisions)
    config = resolve_max_length(config, models)
    check_models(config, models, split)
    if config.federation.devices:
        check_federation(config, model_sizes(models), split, cohort_of(config))
    cut = count_cut_texts(config, models, split)
    folder.write_tallies((*of_data, *cut))
    _tell_losses(cut, observer)
    return config, split, models, revisions


def _describe(placement: Placement) -> str:
    plan = describe_plan(placement.workers, placement.config.resources.device, placement.demands)
    return "\n".join([plan + describe_engines(placement.engines), *placement.notes])


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        placement: Where everything would run, with the settings resolved.
        described: The same as text.
        split: Who holds which examples.
        models: Folder of each client model by name.
        tallies: What part of the data is not used, and why.
    """

    placement: Placement
    described: str
    split: DataSplit
    models: Mapping[str, Path]
    tallies: tuple[Tally, ...]


def plan_experiment(config: ExperimentConfig, observer: Observer, nodes: Sequence[Node] = ()) -> Plan:
    """Do all that a run does before it loads models, and keep nothing but downloads; what it refuses is refused here.

    Args:
        config: What would be run.
        observer: Is told of the progress.
        nodes: The nodes; empty: those of the cluster that the settings name, which is joined or started for a moment.

    Raises:
        UserError: Something in the config, the data, the models or the cluster must be changed.
    """
    check_trackers(config)
    make_method(config)
    with as_found(), tempfile.TemporaryDirectory(prefix="semcons-") as made:
        folder = RunFolder.create(Path(made) / "run", config)
        config, split, models, revisions = _prepare(folder, config, observer)
        with contextlib.nullcontext(tuple(nodes)) if nodes else cluster(config) as found:
            placement = place(config, found, models, revisions)
        return Plan(placement, _describe(placement), split, models, folder.tallies())


def _tell_losses(tallies: Sequence[Tally], observer: Observer) -> None:
    """Report what part of the data is not used, and refuse to go on if it is over half."""
    for tally in tallies:
        observer.planned(f"warning: {tally}" if tally.is_warning else str(tally))
        tally.check()


@dataclass(frozen=True)
class Rounds:
    """Runs rounds, and turns the outcome of each into a commit."""

    folder: RunFolder
    placement: Placement
    split: DataSplit
    method: Method
    fleet: Fleet
    server: ServerProtocol
    observer: Observer
    alone: bool
    judge: Judge | None = None
    virtual: VirtualTime | None = None

    @cached_property
    def num_private(self) -> Sequence[int]:
        """Number of private examples of each client."""
        return self.split.num_private

    def run(self, round: int, began: float) -> tuple[Commit, bytes]:
        """Run a round; returns its commit, and the server's state for the next round.

        Round 0 measures the base models. Its duration counts from `began` (unix seconds), when models began to load.
        """
        config = self.placement.config
        started_at = time.time() if round else began
        visitor = _Watched(self.fleet, self.observer, config.num_rounds)
        state = self.folder.server_state(round - 1) if round else self.method.algorithm.first_state()
        if round == 0:
            outcome = self._measure_base(visitor, state)
        else:
            evaluate = round in config.evaluation.rounds(config.num_rounds)
            through = self.virtual.over(visitor) if self.virtual else visitor
            outcome = self.method.algorithm.run_round(round, state, through, self.server, evaluate=evaluate)
            if self.virtual:
                outcome = self._with_unheard(round, outcome, self.virtual.unheard, evaluate=evaluate)
        own, own_rows = self._measure_own(round, outcome)
        verdict = outcome.verdict
        if verdict:
            self.folder.write_table(f"consensus/round_{round:03d}.parquet", _consensus_table(verdict))
        ended_at = time.time()
        metrics = tuple(self._metrics(round, outcome, own))  # which the judge and the server work for
        ledger = self._ledger(round, outcome, own_rows, started_at, ended_at)
        if self.virtual and round:
            self.virtual.ends(ledger)
        num_heard = self.virtual.num_heard if self.virtual and round else len(visitor.asked) - len(visitor.lost)
        commit = Commit(
            summary=RoundRow(
                round=round,
                started_at=started_at,
                duration_seconds=ended_at - started_at,
                num_participants=len(visitor.asked),
                num_answered=num_heard,
                lost=", ".join(map(str, sorted(visitor.lost))),
                failures="; ".join(reason for _, reason in sorted(visitor.lost.items())),
                num_labels=len(verdict.labels.prompt_ids) if verdict else 0,
                mean_agreement=_mean(verdict.agreement) if verdict else math.nan,
                label_churn=label_churn(self._labels_before(round, state), verdict.labels, len(self.split.public))
                if verdict
                else math.nan,
                distrusted=", ".join(map(str, verdict.distrusted)) if verdict else "",
                virtual_seconds=self.virtual.seconds if self.virtual else math.nan,
            ),
            metrics=metrics,
            ledger=tuple(ledger),
        )
        return commit, outcome.next_state

    def _measure_base(self, visitor: _Watched, state: bytes) -> RoundOutcome:
        # Before training, all clients of one architecture have the same model, so it is measured once. No client is
        # visited for it, so that the client that was measured begins round 1 as the others do.
        config = self.placement.config
        first = [clients[0] for clients in config.clients_with().values()]
        replies = tuple(visitor.measure(0, dict.fromkeys(first, b"")))
        measured = {config.model_of(reply.client_id): reply.evaluation for reply in replies}
        for model, evaluation in measured.items():
            if evaluation and not math.isfinite(evaluation.nll_sum):
                raise ModelError(
                    f"the base model {model} has a test NLL of {evaluation.nll_sum} in "
                    f"{config.model.dtype}: set model.dtype to bfloat16 or float32"
                )
        evaluations = {client: measured.get(config.model_of(client)) for client in self.method.cohort.members}
        return RoundOutcome(replies=replies, next_state=state, evaluations=evaluations)

    def _with_unheard(
        self, round: int, outcome: RoundOutcome, unheard: Sequence[Reply], *, evaluate: bool
    ) -> RoundOutcome:
        """The outcome with the visits of clients that are not heard in the round: they have learnt, too. Where clients
        are heard late, few are asked in a round, so that all the others are measured as well; one that is still at work
        in virtual time is measured as it will be when it is done."""
        evaluations, rows = {**outcome.evaluations}, outcome.rows
        if self.placement.config.algorithm.keeps_models:
            evaluations |= own_evaluations(unheard)
            others = [client for client in self.method.cohort.awaited(round) if evaluations.get(client) is None]
            if evaluate and self.method.cohort.hears_late and others:
                downlinks = self.method.algorithm.downlinks(round + 1, outcome.next_state, others)
                for reply in self.fleet.measure(round, downlinks):
                    evaluations[reply.client_id] = reply.evaluation
                    rows += reply.rows
        return replace(outcome, replies=(*outcome.replies, *unheard), evaluations=evaluations, rows=rows)

    def _measure_own(self, round: int, outcome: RoundOutcome) -> tuple[dict[int, dict[str, float]], list[LedgerRow]]:
        """Measure the clients that were measured on test sets of their own as well, where they have some and tell how
        likely they find a text.

        Returns:
            Further metrics by client, and the ledger's rows of that work.
        """
        tests = self.split.client_test
        alone = self.placement.config.algorithm.name == "centralized"  # client 0 has the model of all
        asked: dict[int, list[int]] = {}
        for client in sorted(outcome.evaluations):
            measured = outcome.evaluations[client]
            if measured and measured.nll and tests and tests[client]:
                asked.setdefault(0 if alone else client, []).append(client)
        own: dict[int, dict[str, float]] = {}
        rows: list[LedgerRow] = []
        if asked:
            examples = {who: [one for client in clients for one in tests[client]] for who, clients in asked.items()}
            downlinks: Mapping[int, bytes] = dict.fromkeys(asked, b"")
            if round:
                downlinks = self.method.algorithm.downlinks(round + 1, outcome.next_state, [*asked])
            for reply in self.fleet.measure(round, downlinks, examples):
                rows += reply.rows
                if scored := reply.evaluation:
                    items = pd.DataFrame(
                        {"nats": scored.nll, "num_tokens": scored.num_tokens, "num_bytes": scored.num_bytes}
                    )
                    clients = asked[reply.client_id]
                    whose = np.repeat(clients, [len(tests[client]) for client in clients])
                    for client in clients:
                        mine = items[whose == client]
                        own[client] = {column: value(mine, key) for column, key in OWN_METRICS.items()}
        return own, rows

    def _labels_before(self, round: int, state: bytes) -> PseudoLabels:
        """The pseudo-labels that clients had to learn in the round."""
        (downlink,) = self.method.algorithm.downlinks(round, state, [0]).values()
        return PseudoLabels.decode(downlink)

    def _metrics(
        self, round: int, outcome: RoundOutcome, own: Mapping[int, Mapping[str, float]]
    ) -> Iterator[MetricsRow]:
        """A row for each client that was measured; what each test item gave is written to the run's folder.

        Args:
            round: The round.
            outcome: Its outcome.
            own: Metrics on clients' own test sets.
        """
        config = self.placement.config
        replies = {reply.client_id: reply for reply in outcome.replies}
        measured = {client: one for client, one in sorted(outcome.evaluations.items()) if one is not None}
        alike = {id(one): one for one in measured.values()}  # clients may share one evaluation
        similarity = self._similarity(round, [*alike.values()])
        tables = {
            key: self._items(round, one, near) for (key, one), near in zip(alike.items(), similarity, strict=True)
        }
        items = {client: tables[id(one)] for client, one in measured.items()}
        if items:
            whole = pd.concat([table.assign(client_id=client) for client, table in items.items()], ignore_index=True)
            self.folder.write_table(f"items/round_{round:03d}.parquet", whole)
        tasks = {client: one.tasks for client, one in outcome.evaluations.items() if one and one.tasks}
        self.folder.add_scores(round, tasks)
        for client_id, table in items.items():
            reply = replies.get(client_id)
            others = {key: value(table, key) for key in self.method.metrics}
            columns = {key: others.pop(key, math.nan) for key in DEFAULT_METRICS}
            yield MetricsRow(
                round=round,
                client_id=client_id,
                model=config.model_of(client_id),
                **columns,
                perplexity=math.exp(min(columns["nll"], 700.0)),
                train_loss=reply.train_loss if reply else math.nan,
                num_private=self.num_private[client_id],
                num_pseudo_labels=reply.num_pseudo_labels if reply else 0,
                others={**others, **own.get(client_id, {})},
            )

    def _similarity(self, round: int, measured: Sequence[Evaluation]) -> list[Sequence[float]]:
        """Cosines of the answers of each evaluation to the references, asked of the server at once; empty if they are
        not wanted."""
        if "similarity" not in self.placement.config.evaluation.metrics:
            return [()] * len(measured)
        answers = [answer for one in measured for answer in one.answers]
        references = [self.split.test[place].response for one in measured for place in range(len(one.answers))]
        cosines = iter(self.server.similarity(round, answers, references) if answers else ())
        return [[*islice(cosines, len(one.answers))] for one in measured]

    def _items(self, round: int, measured: Evaluation, similarity: Sequence[float]) -> pd.DataFrame:
        """A row for each test item; see `score_items`."""
        test = self.split.test
        references = [example.response for example in test]
        answered = references[: len(measured.answers)]
        prompts = [example.prompt for example in test[: len(measured.answers)]]
        return score_items(
            self.method.metrics,
            nll=measured.nll,
            num_tokens=measured.num_tokens,
            num_bytes=measured.num_bytes,
            answers=measured.answers,
            references=references,
            similarity=similarity,
            opinions=self.judge.compare(round, prompts, measured.answers, answered) if self.judge else (),
            options=[example.options for example in test],
            option_nll=measured.option_nll,
        )

    def _ledger(
        self, round: int, outcome: RoundOutcome, own_rows: Sequence[LedgerRow], started_at: float, ended_at: float
    ) -> list[LedgerRow]:
        rows = [row for reply in outcome.replies for row in reply.rows]
        rows += [*outcome.rows, *own_rows, *(outcome.verdict.rows if outcome.verdict else ())]
        rows += [*self.server.take_rows(), *(self.judge.take_rows() if self.judge else ())]
        rows += idle_rows(rows, round, started_at, ended_at, self.fleet.workers)
        return apportion(rows, self._windows(), self.placement.draws)

    def _windows(self) -> list[EnergyWindow]:
        """Windows of the energy counters that no other run shares."""
        windows = self.fleet.laps()
        if self.alone:
            return windows
        places = self.fleet.workers
        return own_windows(windows, [places[worker.name] for worker in self.placement.workers if worker.gpus == 1])


class _Watched(HandsOn):
    """A fleet that reports every reply to the observer, and remembers which clients were asked."""

    def __init__(self, fleet: Fleet, observer: Observer, num_rounds: int) -> None:
        super().__init__(fleet)
        self._fleet = fleet
        self._observer = observer
        self._num_rounds = num_rounds
        self.asked: tuple[int, ...] = ()
        self.lost: dict[int, str] = {}

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        return self._watch(round, downlinks, super().visit(round, downlinks, evaluate=evaluate))

    def measure(self, round: int, downlinks: Mapping[int, bytes]) -> Iterator[Reply]:
        replies = super().measure(round, downlinks)
        # A measurement after a round is part of that round, and not reported as one; round 0 is only a measurement.
        return replies if round else self._watch(round, downlinks, replies)

    def _watch(self, round: int, downlinks: Mapping[int, bytes], replies: Iterator[Reply]) -> Iterator[Reply]:
        self.asked = tuple(downlinks)
        self._observer.round_begins(round, self._num_rounds, len(downlinks))
        for reply in replies:
            self._observer.client_done(reply)
            yield reply
        self.lost = dict(self._fleet.lost)

    def leave_out(self, round: int, reasons: Mapping[int, str]) -> None:
        super().leave_out(round, reasons)
        self.lost = dict(self._fleet.lost)


def label_churn(before: PseudoLabels, after: PseudoLabels, num_prompts: int) -> float:
    """Share of the public prompts whose pseudo-label changed, 0 to 1; NaN if there were no labels before.

    A prompt that has a pseudo-label in only one of the two counts as changed.
    """
    if before.round_number == 0:
        return math.nan
    old = dict(zip(before.prompt_ids, before.responses, strict=True))
    new = dict(zip(after.prompt_ids, after.responses, strict=True))
    return sum(old.get(prompt) != new.get(prompt) for prompt in range(num_prompts)) / num_prompts


def _mean(agreement: npt.NDArray[np.float32]) -> float:
    """Mean over the prompts that two or more clients answered; NaN if there are none."""
    answered = agreement[~np.isnan(agreement)]
    return float(answered.mean()) if answered.size else math.nan


def _consensus_table(verdict: Verdict) -> pd.DataFrame:
    """A row for each ballot to each prompt; column by column, since clients times prompts may be many."""
    num_prompts, num_ballots = len(verdict.winner), len(verdict.client_ids)
    clients, samples = np.array(verdict.client_ids, dtype=int), np.array(verdict.samples, dtype=int)
    elected = (verdict.winner[:, None] == clients) & (verdict.winning_sample[:, None] == samples)

    def by_prompt(rows: Sequence[Sequence[Any]]) -> list[Any]:
        return list(chain.from_iterable(zip(*rows, strict=True)))

    return pd.DataFrame(
        {
            "prompt_id": np.repeat(np.arange(num_prompts), num_ballots),
            "client_id": np.tile(clients, num_prompts),
            "sample": np.tile(samples, num_prompts),
            "answer": by_prompt(verdict.answers),
            "draws": by_prompt(verdict.draws),
            "confidence": by_prompt(verdict.confidence),
            "similarity": verdict.similarity.reshape(-1),
            "chosen": (elected & ~verdict.abstained[:, None]).reshape(-1),
            "agreement": verdict.agreement.repeat(num_ballots),
            "abstained": verdict.abstained.repeat(num_ballots),
        }
    )


def _write_placement(
    folder: RunFolder, placement: Placement, sizes: Mapping[str, Model], fleet: Fleet, alone: bool
) -> None:
    folder.write_json(
        "placement.json",
        {
            "device": placement.config.resources.device,
            "workers": [asdict(worker) | {"clients": [*worker.clients]} for worker in placement.workers],
            "engines": [asdict(engine) for engine in placement.engines],
            "models": {name: asdict(size) for name, size in sizes.items()},
            "nodes": [asdict(node) for node in placement.nodes],
            "energy_meters": dict(fleet.meters),
            "alone": alone,
        },
    )
