"""Reads a run folder into frames, and makes the tables that the terminal and the HTML page show.

Legend: C clients, R rounds, S stages. Every number has a source: bytes are lengths of encoded messages and seconds are
timed, so both are measured; joules are marked as measured or estimated.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from semcons_ray.config import DEFAULT_METRICS
from semcons_ray.data.losses import Tally
from semcons_ray.errors import ConfigError, RunFolderError, first_line
from semcons_ray.evaluation.bootstrap import NUM_RESAMPLES
from semcons_ray.evaluation.harness import PREFIX, STDERR
from semcons_ray.evaluation.metrics import OWN_METRICS, find_metric, metrics_of
from semcons_ray.metering.ledger import LedgerRow
from semcons_ray.metering.units import format_quantity
from semcons_ray.reporting.intervals import INTERVALS, changes
from semcons_ray.reporting.terminal import print_whole
from semcons_ray.runs.run_folder import Loss, MetricsRow, RoundRow, RunFolder, columns_of, comparable_loss

STAGES = ("load", "fine_tune", "generate", "encode", "embed", "consensus", "aggregate", "evaluate", "idle")
SHORT_NAMES: Mapping[Loss, str] = {"nll": "NLL", "bits_per_byte": "bits/byte"}
UNITS: Mapping[Loss, str] = {"nll": "nats a token", "bits_per_byte": "of the reference text"}
MOST_ROWS = 40
"""How many clients a terminal shows."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
INTERVAL_NOTE = (
    f"[95% intervals]: bootstrap, {NUM_RESAMPLES:,} draws of as many test questions, the same for all clients and for "
    "both models of a change. A change of less than half of its interval, the least that is seen, could be none."
)
TASKS_NOTE = "± 1.96 standard errors of one model over the items of the task, as lm-eval computes them."

_DATA = {"role": "str", "client_id": "int64", "prompt": "str", "response": "str", "category": "str"}
_CONSENSUS = {
    "prompt_id": "int64",
    "client_id": "int64",
    "answer": "str",
    "similarity": "float64",
    "chosen": "bool",
    "agreement": "float64",
    "abstained": "bool",
}


@dataclass(frozen=True, eq=False)
class Run:
    """The contents of a run folder; each frame has the columns of the file of its name.

    Attributes:
        folder: The run folder.
        metrics: Clients' models on the test set; round 0 is the base model.
        rounds: A row for each round that is done; round 0 is set-up.
        ledger: A row for each piece of work.
        consensus: Every answer to every public prompt with its `round`; no rows if the algorithm forms no consensus.
        data: Who holds which example.
        base_items: What each test item gave for the base model of each client; see `read_items`.
        last_items: The same for the client's model, as last measured.
        config: Every setting, nested.
        environment: Versions and machine.
        placement: Workers and energy meters.
        tallies: How much of the data is not used, and why.
    """

    folder: Path
    metrics: pd.DataFrame
    rounds: pd.DataFrame
    ledger: pd.DataFrame
    consensus: pd.DataFrame
    data: pd.DataFrame
    base_items: pd.DataFrame
    last_items: pd.DataFrame
    config: dict[str, Any]
    environment: dict[str, Any]
    placement: dict[str, Any]
    tallies: tuple[Tally, ...]

    @property
    def num_rounds(self) -> int:
        """Number of rounds that are done, without set-up."""
        return int((self.rounds["round"] > 0).sum())

    @property
    def loss(self) -> Loss:
        """The loss by which its clients may be averaged."""
        return comparable_loss(telling(self.metrics, "nll")["model"])


@dataclass(frozen=True)
class Totals:
    """The cost of a whole run; see `energy` for `energy_source`. `usd` is what was paid for work done elsewhere."""

    uplink_bytes: int
    downlink_bytes: int
    wall_seconds: float
    setup_seconds: float
    joules: float
    energy_source: str
    usd: float


def read_run(folder: Path) -> Run:
    """Read the folder of a run, which may still be going on.

    Raises:
        RunFolderError: A file is missing or damaged; the message names it.
    """
    opened = RunFolder(folder)
    try:
        config = opened.stored_config()
    except ConfigError as error:
        raise RunFolderError(str(error)) from error
    rounds = read_rounds(folder)
    files = {round: folder / f"consensus/round_{round:03d}.parquet" for round in rounds["round"]}
    # The settings do not tell which rounds formed a consensus: rounds that are done are not all rounds of the run.
    labelled = set(rounds.loc[(rounds["num_labels"] > 0) | rounds["mean_agreement"].notna(), "round"])
    answers = [
        read_table(path, _CONSENSUS).assign(round=round)
        for round, path in files.items()
        if round in labelled or path.is_file()
    ]
    empty = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in {**_CONSENSUS, "round": "int64"}.items()})
    metrics = read_metrics(folder)
    base_items, last_items = read_items(folder, metrics, config.evaluation.metrics)
    return Run(
        folder=folder,
        metrics=metrics,
        rounds=rounds,
        ledger=read_ledger(folder),
        consensus=pd.concat(answers, ignore_index=True) if answers else empty,
        data=read_table(folder / "data.parquet", _DATA),
        base_items=base_items,
        last_items=last_items,
        config=config.model_dump(mode="json"),
        environment=read_json(folder / "environment.json"),
        placement=read_json(folder / "placement.json"),
        tallies=opened.tallies(),
    )


def read_metrics(folder: Path) -> pd.DataFrame:
    """metrics.parquet of a run: the columns of `MetricsRow`, and one for each further metric.

    Raises:
        RunFolderError: See `read_table`.
    """
    return read_table(folder / "metrics.parquet", columns_of(MetricsRow), others="float64")


def read_rounds(folder: Path) -> pd.DataFrame:
    """rounds.parquet of a run; without distrust and virtual time where an earlier version wrote it.

    Raises:
        RunFolderError: See `read_table`.
    """
    added: dict[str, float | str] = {"distrusted": "", "virtual_seconds": math.nan}
    return read_table(folder / "rounds.parquet", columns_of(RoundRow), added=added)


def read_ledger(folder: Path) -> pd.DataFrame:
    """ledger.parquet of a run; nothing was paid where an earlier version wrote it.

    Raises:
        RunFolderError: See `read_table`.
    """
    return read_table(folder / "ledger.parquet", columns_of(LedgerRow), added={"cost_usd": 0.0, "note": ""})


def further_metrics(metrics: pd.DataFrame) -> list[str]:
    """Metrics of answers in metrics.parquet besides those that it always has, and scores in tasks of lm-eval."""
    known = {*columns_of(MetricsRow), *OWN_METRICS}
    return [name for name in map(str, metrics) if name not in known and not name.startswith(PREFIX)]


def read_items(folder: Path, metrics: pd.DataFrame, settings: Iterable[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What each test item gave for the base model of each client, and for its model as last measured.

    Args:
        folder: The run folder.
        metrics: The run's metrics.
        settings: Its `evaluation.metrics`.

    Returns:
        Two tables with columns client_id, question (the item's number) and those that `metrics_of(settings)` are
        computed from. Without rows if the run is of a time before items were written.

    Raises:
        RunFolderError: See `read_table`.
    """
    columns = dict.fromkeys(("client_id", "item"), "int64")
    columns |= dict.fromkeys(("nats", "num_tokens", "num_bytes"), "float64")  # NaN where likelihood is not known
    columns |= {key: "float64" for key in metrics_of(settings) if not find_metric(key).over}
    last = metrics.groupby("client_id")["round"].max()
    tables = [pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in {**columns, "round": "int64"}.items()})]
    if (folder / "items").is_dir():
        rounds = sorted(set(last) | ({0} & set(metrics["round"])))
        files = {round: folder / f"items/round_{round:03d}.parquet" for round in rounds}
        tables = [read_table(path, columns).assign(round=round) for round, path in files.items()] or tables
    items = pd.concat(tables, ignore_index=True).rename(columns={"item": "question"})
    return items[items["round"] == 0], items[items["round"] == items["client_id"].map(last)]


def read_table(
    path: Path, columns: Mapping[str, str], *, others: str = "", added: Mapping[str, float | str] = {}
) -> pd.DataFrame:
    """Read columns of a parquet file, or of a folder of them, and convert them to the given types.

    Args:
        path: The file or folder.
        columns: Types by name.
        others: The type of all further columns; "": they are left out.
        added: Values for columns that earlier versions did not write.

    Raises:
        RunFolderError: The file is missing, damaged or lacks a column; the message names it.
    """
    frame = read_frame(path)
    frame = frame.assign(**{name: value for name, value in added.items() if name not in frame})
    if absent := [name for name in columns if name not in frame]:
        raise RunFolderError(f"{path} lacks column {', '.join(absent)}: another version wrote it, or it is damaged")
    if others:
        columns = {**{str(name): others for name in frame}, **columns}
    texts = {name: "" for name, kind in columns.items() if kind == "str"}
    try:
        return frame[list(columns)].astype(dict(columns)).fillna(texts)
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {first_line(error)}") from error


def read_frame(path: Path) -> pd.DataFrame:
    """Read a parquet file, or a folder of them as one table, as it is.

    Raises:
        RunFolderError: It is missing or damaged; the message names it.
    """
    missing = RunFolderError(f"{path} is missing: the run has not come that far, or files were lost")
    if path.is_dir() and not any(path.glob("[!.]*")):
        raise missing
    try:
        return pd.read_parquet(path)
    except FileNotFoundError as error:
        raise missing from error
    except (OSError, ValueError) as error:  # what pyarrow raises for a file that is cut off or no parquet at all
        raise RunFolderError(f"{path} cannot be read: {first_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file of a run.

    Raises:
        RunFolderError: It is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is missing: the run has not come that far, or files were lost") from error
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path} is damaged: it holds a {type(value).__name__}, not an object")
    return value


def metric_by_round(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A metric as measured, rounds by clients, (R, C); NaN where a client was not measured."""
    table = metrics.pivot_table(index="round", columns="client_id", values=metric, aggfunc="last", dropna=False)
    return table.dropna(axis="index", how="all").sort_index()


def held_by_round(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A metric of each client's model after each round, (R, C): as measured in the round, else as last measured.

    A client that takes no part in a round, or fails, keeps its model, so its last measurement still holds; without it
    a mean would change with who was sampled. NaN if the client was not measured yet, or its measurement is NaN.
    """
    rows = metrics.reset_index(drop=True).reset_index(names="row")
    last = rows.pivot_table(index="round", columns="client_id", values="row", aggfunc="last").sort_index().ffill()
    measured = rows[metric].to_numpy(dtype="float64")[last.fillna(0).to_numpy(dtype="int64")]
    return pd.DataFrame(measured, last.index, last.columns).where(last.notna())


def telling(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of clients that have a metric at all; others have models that do not tell it."""
    return metrics[metrics["client_id"].isin(metrics.loc[metrics[metric].notna(), "client_id"])]


def mean_by_round(metrics: pd.DataFrame, metric: str) -> pd.Series[float]:
    """Mean of `held_by_round` over clients that have the metric, from the first round by which all of them were
    measured; NaN if a client's is NaN.

    Empty if none has it, and for NLL if clients have several models, since nats a token of several models have no mean.
    """
    told = telling(metrics, metric)
    if told.empty or (metric == "nll" and comparable_loss(told["model"]) != "nll"):
        return pd.Series(dtype="float64")
    mean = held_by_round(told, metric).mean(axis="columns", skipna=False)
    return mean[mean.notna().cummax()]


def describe_measured(run: Run) -> str:
    """A note on how many clients were measured in the last evaluated round; empty if all were."""
    last = run.metrics.groupby("client_id")["round"].max()
    count, of = int((last == last.max()).sum()), run.config["clients"]["num_clients"]
    return f"{count} of {of} clients measured in round {last.max()}" if count < of else ""


def describe_untold(run: Run) -> str:
    """A note on how many clients' models tell how likely they find a text; empty if all do."""
    count, of = telling(run.metrics, "nll")["client_id"].nunique(), run.metrics["client_id"].nunique()
    return f"likelihood is known of {count} of {of} clients, over which its means are" if count < of else ""


def mean_over_clients(clients: pd.DataFrame) -> pd.Series[float]:
    """Means of the columns of `quality`, each metric over the clients that have it; NaN if one of theirs is NaN."""
    means: dict[str, float] = {}
    for metric in [name.removeprefix("last_") for name in map(str, clients) if name.startswith("last_")]:
        columns = [name for name in (f"{part}_{metric}" for part in ("base", "last", "change")) if name in clients]
        known = clients[columns].dropna(how="all").mean(skipna=False)
        means |= {name: float(known[name]) for name in columns}
    return pd.Series(means, dtype="float64")


def describe_failures(rounds: pd.DataFrame) -> str:
    """How many visits failed, with the reasons for the last round with failures; empty if none failed."""
    failed = rounds[rounds["lost"] != ""]
    if failed.empty:
        return ""
    visits = int((failed["num_participants"] - failed["num_answered"]).sum())
    newest = failed.iloc[-1]
    return f"{visits} visit{'s' if visits > 1 else ''} failed; in round {newest['round']}: {newest['failures']}"


def describe_distrust(rounds: pd.DataFrame) -> str:
    """Whom the defence distrusts, by the last round in which it distrusts anyone; empty if it never does."""
    found = rounds[rounds["distrusted"] != ""]
    if found.empty:
        return ""
    newest = found.iloc[-1]
    return f"clients {newest['distrusted']} in round {newest['round']}; their votes count less, or nothing"


def quality(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row a client: its model, and each metric of the base model and as last measured.

    Returns:
        Index client_id; columns model, last_round (the round of the last measurement, 0 for a client that was never
        measured after training, whose last is then the base model's), base_M, last_M and change_M (last - base) for M
        in `DEFAULT_METRICS`, and for own_nll and own_bits_per_byte where clients have test sets of their own; NaN where
        there is no measurement, or it is no number.
    """
    clients = metrics.sort_values("round")
    last = clients.drop_duplicates("client_id", keep="last").set_index("client_id").sort_index()
    base = clients[clients["round"] == 0].set_index("client_id").reindex(last.index)
    table = last[["model", "round"]].rename(columns={"round": "last_round"})
    for metric in [*DEFAULT_METRICS, *(name for name in OWN_METRICS if name in metrics)]:
        table[f"base_{metric}"] = base[metric]
        table[f"last_{metric}"] = last[metric]
        table[f"change_{metric}"] = last[metric] - base[metric]
    return table


def metric_table(run: Run) -> pd.DataFrame:
    """Each metric of the base models and the clients' models as last measured, with intervals; see `changes`."""
    keys = [key for key in metrics_of(run.config["evaluation"]["metrics"]) if key != "nll" or run.loss == "nll"]
    return changes(run.base_items, run.last_items, keys)


def task_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Means over clients of scores in tasks of lm-eval, where there are any.

    Returns:
        Index TASK/METRIC; columns base, last (each client's last) and change, and the errors base_error and last_error,
        1.96 standard errors of one model over the items of the task: half of its 95% interval.
    """
    rows = {}
    for column in [name for name in map(str, metrics) if name.startswith(PREFIX) and not name.endswith(STDERR)]:
        known = metrics[metrics[column].notna()].sort_values("round")
        last = known[known["round"] > 0].drop_duplicates("client_id", keep="last")
        row: dict[str, float] = {}
        for name, part in (("base", known[known["round"] == 0]), ("last", last)):
            row |= {name: part[column].mean(), f"{name}_error": 1.96 * part[column + STDERR].mean()}
        rows[column.removeprefix(PREFIX)] = {**row, "change": row["last"] - row["base"]}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")


def format_interval(row: pd.Series[Any], name: str, *, signed: bool = False) -> str:
    """A number of a table with its intervals, as 1.200 ± 0.030 [1.100, 1.300], without those that are not known."""
    value, spread, *ends = (row[f"{name}{part}"] for part in ("", "_half_width", "_low", "_high"))
    text = format_number(value, signed=signed) + ("" if math.isnan(spread) else f" ± {format_number(spread)}")
    shown = ", ".join(format_number(end, signed=signed) for end in ends)
    return text if math.isnan(ends[0]) else f"{text} [{shown}]"


def format_error(row: pd.Series[Any], name: str) -> str:
    """A number of `task_table` with its error, as 0.310 ± 0.045."""
    value, error = format_number(row[name]), row[f"{name}_error"]
    return value if math.isnan(error) else f"{value} ± {format_number(error)}"


def as_of(last_round: int, num_rounds: int) -> str:
    """The round of a last measurement as text; empty if that is the last round done."""
    if not last_round:
        return "base"
    return f"round {last_round}" if last_round < num_rounds else ""


def bytes_by_round(ledger: pd.DataFrame) -> pd.DataFrame:
    """Encoded bytes of messages, measured. Index round; columns uplink_bytes, downlink_bytes, total_bytes."""
    table = ledger.groupby("round")[["uplink_bytes", "downlink_bytes"]].sum()
    table = table[table.index > 0]
    return table.assign(total_bytes=table["uplink_bytes"] + table["downlink_bytes"])


def energy(ledger: pd.DataFrame) -> tuple[float, str]:
    """Joules of ledger rows, and their source.

    Returns:
        The sum over rows whose energy is known, NaN if there is none; and "measured", "estimated", "unavailable", or
        a mixture such as "measured and estimated, partly unavailable".
    """
    known = ledger[ledger["energy_joules"].notna() & (ledger["energy_source"] != "unavailable")]
    if known.empty:
        return float("nan"), "unavailable"
    # Idle rows have 0 J; their source would make a measured sum look mixed.
    telling = known[known["energy_joules"] > 0]
    sources = set((known if telling.empty else telling)["energy_source"])
    source = " and ".join(name for name in ("measured", "estimated") if name in sources)
    partly = ", partly unavailable" if len(known) < len(ledger) else ""
    return float(known["energy_joules"].sum()), source + partly


def work_by_stage(ledger: pd.DataFrame) -> pd.DataFrame:
    """Work of all workers by stage, in the order of `STAGES`.

    Returns:
        Index stage; columns seconds (measured, summed over workers), share (of those seconds), tokens, usd, joules
        and energy_source.
    """
    rows = []
    for stage in STAGES:
        work = ledger[ledger["stage"] == stage]
        if len(work):
            joules, source = energy(work)
            rows.append((stage, *work[["duration_seconds", "tokens", "cost_usd"]].sum(), joules, source))
    columns = ["stage", "seconds", "tokens", "usd", "joules", "energy_source"]
    table = pd.DataFrame(rows, columns=columns).astype({"tokens": "int64"}).set_index("stage")
    table.insert(1, "share", table["seconds"] / table["seconds"].sum())
    return table


def by_round_and_stage(ledger: pd.DataFrame, value: str) -> pd.DataFrame:
    """Sum of a column of the ledger by round and stage, (R, S), for stages that occur."""
    table = ledger.pivot_table(index="round", columns="stage", values=value, aggfunc="sum", fill_value=0.0)
    return table[[stage for stage in STAGES if stage in table]]


def busy_share(ledger: pd.DataFrame) -> pd.Series[float]:
    """Share of the rounds' time that each worker was at work, 0 to 1; NaN if no idle time was recorded."""
    rows = ledger[ledger["worker"].isin(ledger.loc[ledger["stage"] == "idle", "worker"])]
    seconds = rows.groupby("worker")["duration_seconds"].sum()
    idle = rows[rows["stage"] == "idle"].groupby("worker")["duration_seconds"].sum()
    return (1 - idle / seconds).reindex(sorted(set(ledger["worker"])))


def wins(consensus: pd.DataFrame) -> pd.DataFrame:
    """Number of prompts whose pseudo-label is a client's answer, by client and round, (C, R)."""
    return consensus.pivot_table(index="client_id", columns="round", values="chosen", aggfunc="sum", fill_value=0)


def agreement(consensus: pd.DataFrame) -> pd.DataFrame:
    """Distribution of agreement over prompts. Index round; columns mean, abstained (share of prompts), q10 to q90.

    Agreement is NaN where no prompt had two answers.
    """
    prompts = consensus.drop_duplicates(["round", "prompt_id"]).groupby("round")
    table = prompts.agg(mean=("agreement", "mean"), abstained=("abstained", "mean"))
    for quantile in QUANTILES:
        table[f"q{quantile:.0%}".rstrip("%")] = prompts["agreement"].quantile(quantile)
    return table


def totals(run: Run) -> Totals:
    """The cost of the whole run."""
    joules, source = energy(run.ledger)
    setup = run.rounds["round"] == 0
    return Totals(
        uplink_bytes=int(run.ledger["uplink_bytes"].sum()),
        downlink_bytes=int(run.ledger["downlink_bytes"].sum()),
        wall_seconds=float(run.rounds["duration_seconds"].sum()),
        setup_seconds=float(run.rounds.loc[setup, "duration_seconds"].sum()),
        joules=joules,
        energy_source=source,
        usd=float(run.ledger["cost_usd"].sum()),
    )


def format_number(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """A number with `digits` decimals; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def format_usd(value: float) -> str:
    """US dollars, to two digits at least; a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"US$ {value:,.2f}" if value >= 1 or not value else f"US$ {value:.2g}"


def format_seconds(value: float) -> str:
    """Seconds as 4.2 s, 3 min 20 s or 5 h 02 min."""
    if math.isnan(value):
        return "–"
    if value < 60:
        return f"{value:.1f} s" if value < 59.95 else "1 min 00 s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h {minutes:02d} min"


def short_model_name(name: str) -> str:
    """The last part of a hub id, a path, or packaged:NAME."""
    return name.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1] or name


def format_setting(value: object) -> str:
    """The value of a setting as readable text; a mix of models as shares and names."""
    if isinstance(value, str) and value.startswith("{"):
        value = json.loads(value)
    if isinstance(value, dict):
        return ", ".join(_format_entry(*entry) for entry in value.items()) or "none"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "null"
    if isinstance(value, (bool, np.bool_)):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_entry(name: object, value: object) -> str:
    if isinstance(value, (int, float)):  # the share of a model
        return f"{value:g} {short_model_name(str(name))}"
    return f"{name} {format_setting(value)}"


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """By dotted key, its shortest end that no other of the keys has, as learning_rate of training.learning_rate."""
    ends = {key: [key.split(".", skipped)[-1] for skipped in range(key.count("."), -1, -1)] for key in keys}
    count = Counter(end for own in ends.values() for end in own)
    return {key: next((end for end in own if count[end] == 1), key) for key, own in ends.items()}


def describe_trial(settings: Mapping[str, object]) -> str:
    """A trial by its settings, by dotted key, as learning_rate=0.001, budget=12."""
    short = short_keys(settings)
    return ", ".join(f"{short[key]}={format_setting(value)}" for key, value in settings.items())


def print_result(run: Run, console: Console | None = None) -> None:
    """Print a run's result table; on stdout unless given another console."""
    print_whole(console or Console(), *_result(run))


def render_result(run: Run, width: int | None = None) -> str:
    """What `print_result` prints, as plain text of `width` columns; by default the terminal's."""
    stream = io.StringIO()
    print_result(run, Console(file=stream, width=width, color_system=None, force_jupyter=False))
    return stream.getvalue()


def result_cells(run: Run) -> pd.DataFrame:
    """The result table as texts under short headings: a row for each client and, of several, their mean."""
    name, clients = SHORT_NAMES[run.loss], quality(run.metrics)
    rows = []
    for client_id, row in clients.iterrows():
        known = as_of(row["last_round"], run.num_rounds)
        cells = _quality_cells(row, run.loss, f" ({known})" if known else "")
        rows.append((str(client_id), short_model_name(row["model"]), *cells))
    if len(clients) > 1:
        mean = mean_over_clients(clients)
        rows.append(("mean", describe_measured(run), *_quality_cells(mean, run.loss)))
    headings = ("client", "model", f"base {name}", f"last {name}", "change", "ROUGE-L", "similarity")
    return pd.DataFrame(rows, columns=headings)


def describe_progress(run: Run) -> str:
    """The run's name, and how many of its rounds are done."""
    return f"{run.config['name']}: {run.num_rounds} of {run.config['num_rounds']} rounds"


def _result(run: Run) -> list[RenderableType]:
    table = Table(title=Text(describe_progress(run)), title_justify="left", show_edge=False, pad_edge=False)
    cells, hidden = _shown_cells(run)
    for heading in cells:
        table.add_column(str(heading), justify="left" if heading == "model" else "right", overflow="fold")
    for row in cells.to_numpy().tolist():
        is_mean = row[0] == "mean"
        if is_mean:
            table.add_section()
        table.add_row(*map(Text, row), style="bold" if is_mean else None)
    cost = totals(run)
    up, down = format_quantity(cost.uplink_bytes, "B"), format_quantity(cost.downlink_bytes, "B")
    wall, setup = format_seconds(cost.wall_seconds), format_seconds(cost.setup_seconds)
    joules = f"{format_quantity(cost.joules, 'J')} ({cost.energy_source})"
    loss = SHORT_NAMES[run.loss]
    some = f"Shown are the {MOST_ROWS} clients of the highest {loss}; metrics.parquet has {hidden:,} more."
    lines = (
        f"on the wire  {up} up, {down} down (measured)",
        f"wall time    {wall}, set-up {setup} of it (measured)",
        f"energy       {joules if cost.energy_source != 'unavailable' else 'unavailable'}",
        *([f"paid         {format_usd(cost.usd)}"] if cost.usd else []),
        *(f"note         {untold}" for untold in [describe_untold(run)] if untold),
        *(f"left out     {failures}" for failures in [describe_failures(run.rounds)] if failures),
        *(f"distrusted   {found}" for found in [describe_distrust(run.rounds)] if found),
    )
    told = [Text(some)] if hidden else []
    return [table, *told, *_metric_lines(run), *_task_lines(run), Text(), *map(Text, lines)]


def _shown_cells(run: Run) -> tuple[pd.DataFrame, int]:
    """The rows of `result_cells` for which a terminal has room, and how many clients are left out."""
    cells, last = result_cells(run), quality(run.metrics)[f"last_{run.loss}"].reset_index(drop=True)
    if len(last) <= MOST_ROWS:
        return cells, 0
    worst = last.sort_values(ascending=False, kind="stable").index[:MOST_ROWS]
    return cells.iloc[[*sorted(worst), len(cells) - 1]], len(last) - MOST_ROWS


def _metric_lines(run: Run) -> list[RenderableType]:
    """The table of metrics with their intervals; nothing if no item was measured."""
    measured = metric_table(run)
    if measured.empty:
        return []
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("mean over clients")
    for heading in (*INTERVALS, "least that is seen", "questions"):
        table.add_column(heading, justify="right")
    for _, row in measured.iterrows():
        cells = [format_interval(row, name, signed=name == "change") for name in INTERVALS]
        table.add_row(row["label"], *cells, format_number(row["smallest"]), str(row["num_items"]))
    return [Text(), table, Text(INTERVAL_NOTE)]


def _task_lines(run: Run) -> list[RenderableType]:
    """The table of scores in tasks of lm-eval; nothing if there are none."""
    scores = task_table(run.metrics)
    if scores.empty:
        return []
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("lm-eval, mean over clients", overflow="fold")
    for heading in INTERVALS:
        table.add_column(heading, justify="right")
    for task, row in scores.iterrows():
        cells = (format_error(row, "base"), format_error(row, "last"), format_number(row["change"], signed=True))
        table.add_row(Text(str(task)), *cells)
    return [Text(), table, Text(TASKS_NOTE)]


def _quality_cells(row: pd.Series[Any], loss: Loss, behind: str = "") -> tuple[str, ...]:
    return (
        format_number(row[f"base_{loss}"]),
        format_number(row[f"last_{loss}"]) + behind,
        format_number(row[f"change_{loss}"], signed=True),
        format_number(row["last_rouge_l"]),
        format_number(row["last_similarity"]),
    )
