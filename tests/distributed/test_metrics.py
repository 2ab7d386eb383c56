"""What Ray's exporter gives Prometheus is what the ledger says, and the dashboard asks for nothing else."""

import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import ray

from semcons_ray.config import ExperimentConfig
from semcons_ray.distributed.metrics import METRICS
from semcons_ray.runs.experiment import run_experiment
from semcons_ray.runs.run_folder import Commit
from tests.invariants.runs import Silent

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "semcons.json"
EXPORTED = {f"ray_{name}{'_total' if kind.__name__ == 'Counter' else ''}" for name, (kind, _, _) in METRICS.items()}


RUN = "premi%C3%A8re"  # Ray takes no other letters


class Scraped(Silent):
    """Reads the exporter once the last round is committed, when the driver is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[tuple[str, dict[str, str], float]] = []

    def round_ends(self, commit: Commit) -> None:
        if commit.summary.round < 2:
            return
        metrics = commit.metrics
        urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]
        deadline = time.monotonic() + 60
        names = EXPORTED - {"ray_semcons_clients_lost_total"}  # none was
        loss = {name: sum(getattr(row, name) for row in metrics) / len(metrics) for name in ("nll", "bits_per_byte")}
        while time.monotonic() < deadline and not (
            {name for name, _, _ in self.samples} == names
            and self.sum("ray_semcons_rounds_committed_total") == 3
            and all(self.sum(f"ray_semcons_test_{name}") == pytest.approx(mean) for name, mean in loss.items())
        ):
            time.sleep(0.5)
            # Runs that this process did before are exported, too.
            self.samples = [sample for url in urls for sample in scrape(url) if sample[1]["run"] == RUN]

    def sum(self, name: str, **labels: str) -> float:
        return sum(value for key, has, value in self.samples if key == name and labels.items() <= has.items())


def scrape(url: str) -> list[tuple[str, dict[str, str], float]]:
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    found = re.findall(r"^(ray_semcons\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return [(name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for name, labels, value in found]


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.real
def test_the_exporter_says_what_the_ledger_says(
    tiny_config: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    scraped = Scraped()
    config = tiny_config(resources={"fleet": "ray", "device": "cpu", "max_workers": 1})
    run_experiment(config, tmp_path / "première", scraped)
    none_was = {"ray_semcons_clients_lost_total", "ray_semcons_cost_usd_total"}
    assert {name for name, _, _ in scraped.samples} == EXPORTED - none_was
    ledger = pd.read_parquet(tmp_path / "première" / "ledger.parquet")
    assert scraped.sum("ray_semcons_uplink_bytes_total") == ledger["uplink_bytes"].sum() > 0
    assert scraped.sum("ray_semcons_downlink_bytes_total") == ledger["downlink_bytes"].sum() > 0
    for stage, rows in ledger.groupby("stage"):
        assert scraped.sum("ray_semcons_tokens_total", stage=str(stage)) == rows["tokens"].sum()
        assert scraped.sum("ray_semcons_seconds_total", stage=str(stage)) == pytest.approx(
            rows["duration_seconds"].sum()
        )
        for source, part in rows.groupby("energy_source"):
            joules = scraped.sum("ray_semcons_energy_joules_total", stage=str(stage), source=str(source))
            assert joules == pytest.approx(part["energy_joules"].sum())
    assert scraped.sum("ray_semcons_num_rounds") == scraped.sum("ray_semcons_round") == 2
    assert scraped.sum("ray_semcons_round_clients_answered") == scraped.sum("ray_semcons_round_clients_asked") == 3
    metrics = pd.read_parquet(tmp_path / "première" / "metrics.parquet")
    last = metrics[metrics["round"] == 2]
    for name in ("nll", "bits_per_byte"):
        assert scraped.sum(f"ray_semcons_test_{name}") == pytest.approx(last[name].mean())


def test_the_dashboard_names_only_metrics_and_labels_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [entry["query"]["query"] for entry in dashboard["templating"]["list"] if entry["type"] == "query"]
    named = {name for query in queries for name in re.findall(r"ray_\w+", query)}
    assert named == EXPORTED
    labels = {"run", *(label for _, _, own in METRICS.values() for label in own)}
    for query in queries:
        used = re.findall(r"(\w+)=~?\"", query)
        used += [label for group in re.findall(r"by \((.*?)\)", query) for label in group.split(", ")]
        assert set(used) <= labels, query
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
