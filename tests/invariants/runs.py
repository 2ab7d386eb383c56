"""Run an experiment in a test, and compare what two runs wrote."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from semcons_ray.federation.fleet import Reply
from semcons_ray.runs.observers import Observer


class StoppedError(BaseException):
    """What a test raises in an observer to stop a run, as Ctrl-C does: an Exception would only be a warning."""


class Silent(Observer):
    """Keeps the plan; `on_client` is called after each reply, and fails the test if it fails."""

    def __init__(self, on_client: Callable[[Reply], None] = lambda reply: None) -> None:
        self.on_client = on_client
        self.plan = ""

    def planned(self, text: str) -> None:
        self.plan = text

    def client_done(self, reply: Reply) -> None:
        try:
            self.on_client(reply)
        except Exception as error:
            raise StoppedError from error


def replace_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table of a run anew, as one file, as an earlier version did."""
    shutil.rmtree(path)
    table.to_parquet(path, index=False)


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics and what they are made of, answers, votes, bytes on the wire and adapters are equal to the last bit."""
    tables = [
        sorted(str(path.relative_to(run)) for part in ("consensus", "items") for path in run.glob(f"{part}/*.parquet"))
        for run in (one, other)
    ]
    assert tables[0] == tables[1]
    for name in ("metrics.parquet", *tables[0]):
        pd.testing.assert_frame_equal(pd.read_parquet(one / name), pd.read_parquet(other / name), check_exact=True)
    times = ["started_at", "duration_seconds"]
    rounds = [pd.read_parquet(run / "rounds.parquet").drop(columns=times) for run in (one, other)]
    pd.testing.assert_frame_equal(*rounds, check_exact=True)
    totals = [
        pd.read_parquet(run / "ledger.parquet")
        .groupby(["round", "client_id", "stage"])[["tokens", "uplink_bytes", "downlink_bytes"]]
        .sum()
        .loc[lambda table: table.ne(0).any(axis="columns")]
        for run in (one, other)
    ]
    assert len(totals[0])
    pd.testing.assert_frame_equal(*totals, check_exact=True)
    adapters = sorted(path.relative_to(one) for path in one.glob("adapters/*/adapter_model.safetensors"))
    assert adapters
    for name in adapters:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
