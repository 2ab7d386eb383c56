"""What runs and studies leave behind: their folders, read as data frames.

Everything is read when it is first asked for, and kept: an object shows a folder as it was then. What is not there yet,
or is damaged, is a `RunFolderError` that names the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from semcons_ray.config import ExperimentConfig
from semcons_ray.errors import RunFolderError, UserError
from semcons_ray.reporting import Run as Contents
from semcons_ray.reporting import read_run, render_result, write_report
from semcons_ray.reporting import tables as made
from semcons_ray.reporting.comparison import Comparison as Compared
from semcons_ray.reporting.summary import render_summary
from semcons_ray.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from semcons_ray.reporting.sweep import SweepResult
    from semcons_ray.runs.remote_folder import RemoteFolder
    from semcons_ray.studies.comparison import ComparisonConfig
    from semcons_ray.studies.search_space import SweepConfig


class Run:
    """A run by its folder; `load` and `run` return one. It may still be going on, or have stopped before its end.

    Args:
        path: The folder. Of a run at a URL it is the copy on this machine.
        remote: Where else the run is kept; None: nowhere.

    Attributes:
        path: The run's folder.

    Raises:
        RunFolderError: `path` is no run folder.
    """

    def __init__(self, path: Path, remote: RemoteFolder | None = None) -> None:
        self.path = path
        self._folder = RunFolder(path)
        self._remote = remote

    def __repr__(self) -> str:
        """The folder, and how far the run is, in one line."""
        done = max(sum(1 for _ in self._folder.state.glob("round_*.msgpack")) - 1, 0)  # one is of round 0
        state = "finished" if self.finished else f"{done} of {self.config.num_rounds} rounds"
        return f"<semcons_ray.Run {str(self.path)!r}: {state}>"

    def __str__(self) -> str:
        """The result table as text, as wide as the terminal."""
        return render_result(self._contents).rstrip("\n")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from semcons_ray.reporting.notebook import run_cell

        return run_cell(self._contents)

    @cached_property
    def _contents(self) -> Contents:
        return read_run(self.path)

    @cached_property
    def config(self) -> ExperimentConfig:
        """The settings, with every default."""
        return self._folder.stored_config()

    @property
    def finished(self) -> bool:
        """Whether all rounds are done and adapters written."""
        return self._folder.is_finished(self.config.num_rounds)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Clients' models on the test set, a row for each client and evaluated round; round 0 is the base model.

        Columns: round, client_id, model, nll and train_loss (nats a token), perplexity, bits_per_byte (bits a byte of
        the reference answers), rouge_l (0 to 1), similarity (cosine), num_private and num_pseudo_labels (examples), and
        one for each further metric.
        """
        return made.read_metrics(self.path)

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """A row for each round that is done; round 0 is set-up.

        Columns: round, started_at (unix seconds), duration_seconds, num_participants and num_answered (clients), lost
        (their ids, separated by commas), failures (why), num_labels (pseudo-labels), mean_agreement (cosine),
        label_churn (0 to 1), distrusted (ids of clients whose votes count less by the defence), and virtual_seconds
        (when the round ended in the virtual time of federation.devices; NaN without them).
        """
        return made.read_rounds(self.path)

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """A row for each piece of work.

        Columns: round, client_id (-1: of no client), worker, node, stage, started_at (unix seconds), duration_seconds,
        tokens, uplink_bytes and downlink_bytes (encoded), energy_joules (NaN while unavailable), energy_source, gpus
        (UUIDs, separated by commas), cost_usd (what was paid for it, US dollars) and note.
        """
        return made.read_ledger(self.path)

    @property
    def scores(self) -> pd.DataFrame:
        """Means over clients of scores in tasks of lm-eval; no rows if there are none.

        Index: TASK/METRIC. Columns: base, last, change, base_error and last_error (1.96 standard errors), in the unit
        of the task's metric, mostly 0 to 1.
        """
        return made.task_table(self.metrics)

    def items(self, round: int) -> pd.DataFrame:
        """What each test item gave for each client that was measured in a round: columns client_id, item (its number in
        the test set), nats, num_tokens and num_bytes (of the reference answer), answer (empty: none was asked for), and
        one for each metric of answers.

        Raises:
            UserError: No client was measured in the round.
        """
        return self._table("items", round, "no client was measured")

    def answers(self, round: int) -> pd.DataFrame:
        """All answers to the public prompts in a round.

        Columns: prompt_id and prompt, client_id, sample (the number of the client's answer, from 0), answer (empty:
        none), draws (how many of the client's draws it stands for), confidence (mean log-likelihood of its tokens in
        nats; NaN: the client does not say), similarity (mean cosine to other clients' answers),
        chosen (whether it was elected), agreement (of the prompt's answers, cosine) and abstained (whether the prompt
        gave no pseudo-label).

        Raises:
            UserError: No consensus was formed in the round.
        """
        answers = self._table("consensus", round, "no consensus was formed")
        answers.insert(1, "prompt", answers["prompt_id"].map(self._public["prompt"]))
        return answers

    def labels(self, round: int) -> pd.DataFrame:
        """The pseudo-labels of a round, which clients learn in the next: columns prompt_id, prompt, client_id (whose
        answer it is; -1: the data's own), label and agreement.

        Raises:
            UserError: No consensus was formed in the round.
        """
        answers = self.answers(round)
        first = answers.drop_duplicates("prompt_id")
        elected = answers[answers["chosen"]]
        known = first[~first["abstained"] & ~first["prompt_id"].isin(elected["prompt_id"])].assign(client_id=-1)
        known["answer"] = known["prompt_id"].map(self._public["response"])
        labels = pd.concat([elected, known]).sort_values("prompt_id")
        columns = ["prompt_id", "prompt", "client_id", "answer", "agreement"]
        return labels[columns].rename(columns={"answer": "label"}).reset_index(drop=True)

    def adapter(self, client_id: int) -> Path:
        """The folder with a client's adapter after the last round, in PEFT's format.

        Raises:
            UserError: The run is not finished, or the client has none.
        """
        from semcons_ray.federation.fleet import client_folder

        folder = self._folder.adapters / client_folder(client_id)
        if folder.is_dir():
            return folder
        if not self.finished:
            raise UserError(f"{self.path} is not finished, so it has no adapters; semcons_ray.resume goes on with it")
        have = ", ".join(path.name for path in sorted(self._folder.adapters.iterdir())) or "none"
        raise UserError(f"{self.path} has no adapter of client {client_id}; there are {have}")

    def report(self) -> dict[str, pd.DataFrame]:
        """The tables of the report.

        Returns:
            By name: clients (index client_id; model, last_round, and base_M, last_M and change_M of each metric M),
            metrics (index metric; label, num_items, and base, last and change with the ends _low and _high of their 95%
            intervals, and smallest, the least change that is seen), tasks (see `scores`), stages (index stage; seconds
            over all workers, share, tokens, usd, joules and energy_source), bytes (index round; uplink_bytes,
            downlink_bytes and total_bytes, encoded), and agreement (index round; mean, abstained and quantiles q10 to
            q90, cosine).
        """
        run = self._contents
        return {
            "clients": made.quality(run.metrics),
            "metrics": made.metric_table(run),
            "tasks": made.task_table(run.metrics),
            "stages": made.work_by_stage(run.ledger),
            "bytes": made.bytes_by_round(run.ledger),
            "agreement": made.agreement(run.consensus),
        }

    @property
    def report_html(self) -> Path:
        """The file with the report, one page that opens offline."""
        return self.path / "report.html"

    def write_report(self) -> Path:
        """Write report.html anew, of a run at a URL there as well; returns its path.

        Raises:
            RunFolderError: A file is missing, damaged or cannot be written.
        """
        path = write_report(self.path)
        if self._remote:
            self._remote.copy()
        return path

    @property
    def _public(self) -> pd.DataFrame:
        """The public prompts by prompt id."""
        data = self._contents.data
        return data[data["role"] == "public"].reset_index(drop=True)

    def _table(self, kind: str, round: int, why: str) -> pd.DataFrame:
        """A round's table of a kind; there is none for the reason given."""
        path = self.path / kind / f"round_{round:03d}.parquet"
        if not path.is_file():
            there = sorted(int(file.stem.removeprefix("round_")) for file in path.parent.glob("round_*.parquet"))
            others = f", but in rounds {', '.join(map(str, there))}" if there else ""
            raise UserError(f"{self.path}: {why} in round {round}{others}")
        return made.read_frame(path)


class Comparison:
    """A comparison by its folder; `load` and `compare` return one.

    Args:
        path: The folder.
        failed: How many runs failed when it was last worked on.

    Attributes:
        path: The comparison's folder.
        failed: How many of its runs failed just now; those of an earlier try are not known.

    Raises:
        RunFolderError: `path` holds no comparison.
    """

    def __init__(self, path: Path, failed: int = 0) -> None:
        _check_kind(path, "comparison.yaml", "comparison")
        self.path, self.failed = path, failed

    def __repr__(self) -> str:
        """The folder, and how many runs are finished, in one line."""
        total = len(self.config.arms) * len(self.config.seeds)
        return f"<semcons_ray.Comparison {str(self.path)!r}: {len(self.runs)} of {total} runs>"

    def __str__(self) -> str:
        """The summary as text, as wide as the terminal."""
        config, done = self.config, self._contents
        reference, baseline = config.reference, config.baseline
        text = render_summary(
            done.summary, config.name, reference=reference, baseline=baseline, metrics=done.metrics
        )
        return text.rstrip("\n")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from semcons_ray.reporting.notebook import comparison_cell

        config = self.config
        return comparison_cell(
            self.table, config.name, self.figure, reference=config.reference, baseline=config.baseline
        )

    @cached_property
    def config(self) -> ComparisonConfig:
        """What is compared, with every default."""
        from semcons_ray.studies.comparison import load_comparison

        return load_comparison(self.path / "comparison.yaml")

    @cached_property
    def runs(self) -> Mapping[tuple[str, int], Run]:
        """The finished runs by arm and seed."""
        from semcons_ray.studies.comparison import finished_runs

        return {(run.arm, run.seed): Run(run.folder) for run in finished_runs(self.config, self.path)}

    @cached_property
    def _contents(self) -> Compared:
        from semcons_ray.studies.comparison import read_results

        done = read_results(self.config, self.path)
        if done is None:
            raise RunFolderError(f"{self.path}: no run of the comparison is finished")
        return done

    @property
    def table(self) -> pd.DataFrame:
        """A row for each arm, with means over seeds and half widths of 95% intervals over seeds.

        Index: arm. Columns: algorithm, seeds and failed (counts), loss (the name of what arms are compared by), nll and
        worst_nll (nats a token), bits_per_byte and worst_bits_per_byte, rouge_l, similarity, bytes, bytes_per_visit,
        bytes_ratio, seconds, joules, energy_source, gap_closed (0 to 1), difference (to the first arm) and
        at_equal_bytes; half widths are in columns that end in _half_width.
        """
        return self._contents.summary

    @property
    def rounds(self) -> pd.DataFrame:
        """A row for each arm, seed and evaluated round: columns arm, algorithm, seed, round, losses and scores as in
        `table`, and visits, failed, uplink_bytes, downlink_bytes, total_bytes, seconds and joules since the run began.
        """
        return self._contents.rounds

    @property
    def stages(self) -> pd.DataFrame:
        """Work by arm and stage: index arm and stage, columns seconds and joules, means over seeds."""
        return self._contents.stages

    @property
    def metrics(self) -> pd.DataFrame:
        """A row for each arm and metric, with 95% intervals over test questions and over seeds."""
        return self._contents.metrics

    @property
    def figure(self) -> Path:
        """The figure of quality against cost, pareto.svg; beside it is pareto.png."""
        return self.path / "pareto.svg"


class Sweep:
    """A sweep by its folder; `load` and `sweep` return one.

    Args:
        path: The folder.
        failed: How many trials failed when it was last worked on.

    Attributes:
        path: The sweep's folder.
        failed: How many of its trials failed just now; those of an earlier try are not known.

    Raises:
        RunFolderError: `path` holds no sweep.
    """

    def __init__(self, path: Path, failed: int = 0) -> None:
        _check_kind(path, "sweep.yaml", "sweep")
        self.path, self.failed = path, failed

    def __repr__(self) -> str:
        """The folder, and how many trials are finished, in one line."""
        return f"<semcons_ray.Sweep {str(self.path)!r}: {len(self._contents.finished)} trials finished>"

    def __str__(self) -> str:
        """The trials and the effect of each key as text, as wide as the terminal."""
        from semcons_ray.reporting.sweep import render_sweep

        return render_sweep(self._contents)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from semcons_ray.reporting.notebook import sweep_cell

        return sweep_cell(self._contents)

    @cached_property
    def config(self) -> SweepConfig:
        """What is tried, with every default."""
        from semcons_ray.studies.search_space import load_sweep

        return load_sweep(self.path / "sweep.yaml")

    @cached_property
    def _contents(self) -> SweepResult:
        from semcons_ray.studies.sweep import read_results

        done = read_results(self.config, self.path)
        if done is None:
            raise RunFolderError(f"{self.path}: no trial of the sweep has a result")
        return done

    @property
    def table(self) -> pd.DataFrame:
        """A row for each trial, the best first.

        Columns: trial (the name of its folder), one for each swept key, status (finished, stopped or unfinished),
        rounds, and after the last of these mean_nll and worst_nll (nats a token), bits_per_byte and
        worst_bits_per_byte, rouge_l, similarity, uplink_bytes, downlink_bytes, total_bytes, seconds, joules and
        energy_source.
        """
        return self._contents.trials

    @property
    def effects(self) -> pd.DataFrame:
        """The metric at each value of each key, over finished trials: columns key, value, number, trials, mean, std,
        lowest and highest."""
        return self._contents.effects()

    @property
    def fronts(self) -> Mapping[str, list[str]]:
        """By total_bytes, seconds and joules, the trials on the Pareto front, from the cheapest to the best."""
        return self._contents.fronts()

    @cached_property
    def runs(self) -> Mapping[str, Run]:
        """The trials that have results, by the names of their folders."""
        paths = [path.parent for path in sorted(self.path.glob("trials/[!.]*/config.yaml"))]
        return {path.name: Run(path) for path in paths if RunFolder(path).has_tables()}

    @property
    def figure(self) -> Path:
        """The report with all figures, one page that opens offline."""
        return self.path / "report.html"


class DryRun:
    """What a run, a comparison or a sweep would do and need; `plan` returns one.

    Attributes:
        table: What would be sent and computed: a row for each round, arm or trial, the last one for all. Columns:
            uplink_bytes, downlink_bytes, and tokens that are trained, generated and scored.
        operations: Floating-point operations in all.
        seconds: How long it would take on workers of this machine, one run after another; NaN if that is not known.
    """

    def __init__(self, table: pd.DataFrame, operations: float, seconds: float, text: Callable[[], str]) -> None:
        self.table, self.operations, self.seconds = table, operations, seconds
        self._text = text

    def __repr__(self) -> str:
        """Bytes, operations and seconds in one line."""
        total = self.table.iloc[-1]
        sent = int(total["uplink_bytes"] + total["downlink_bytes"])
        return f"<semcons_ray.DryRun: {sent:,} bytes, {self.operations:.2g} operations, {self.seconds:.0f} seconds>"

    def __str__(self) -> str:
        """All that is foretold as text, as wide as the terminal."""
        return self._text()

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from semcons_ray.reporting.notebook import table_cell

        return table_cell("What would be sent (bytes) and computed (tokens)", self.table)


def _check_kind(path: Path, file: str, kind: str) -> None:
    if not (path / file).is_file():
        raise RunFolderError(f"{path} has no {file}, so it holds no {kind}")
