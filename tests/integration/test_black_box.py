"""Runs in which models behind an endpoint take part beside open ones, through faults and a kill."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from semcons_ray.config import ExperimentConfig, dump_config
from tests.endpoints import proxy
from tests.endpoints.proxy import Fault, Proxy
from tests.endpoints.server import Server, serving
from tests.invariants.runs import assert_same_run

pytestmark = [pytest.mark.served, pytest.mark.ray, pytest.mark.slow, pytest.mark.real]

MakeConfig = Callable[..., ExperimentConfig]
KEY = "sk-test-0a1b2c3d4e5f6g7h8i9j"
VARIABLE = "SEMCONS_TEST_KEY"


def configured(make: MakeConfig, url: str, fleet: str) -> ExperimentConfig:
    """An open client and two closed ones."""
    options = {
        "model": "small", "base_url": url, "api_key_env": VARIABLE, "k": 2, "max_concurrency": 2,
        "timeout_seconds": 2.0, "usd_per_million_input_tokens": 1.0,
    }  # fmt: skip
    return make(
        num_rounds=3,
        clients={
            "num_clients": 3,
            "mix": {make().model.name: 1, "closed": 2},
            "models": {"closed": {"kind": "openai", "options": options}},
        },
        resources={"fleet": fleet, "device": "cpu"},
    )


def last_word(body: bytes) -> str:
    return str(json.loads(body)["messages"][-1]["content"])


def hurting(number: int, body: bytes) -> Fault | None:
    """Faults that are over when the request is repeated, and an answer that is refused whenever it is asked for."""
    faults: Mapping[int, Fault] = {
        2: proxy.status(429, retry_after_ms="10"), 5: proxy.status(500, retry_after_ms="10"), 8: proxy.cut,
        11: proxy.reset, 14: proxy.status(503, retry_after_ms="10"), 17: proxy.html(502),
    }  # fmt: skip
    return proxy.REFUSED if "spell" in last_word(body) and "one" in last_word(body) else faults.get(number)


def command(*arguments: Any) -> "subprocess.Popen[str]":
    whole = [sys.executable, "-m", "semcons_ray.commands.cli", *map(str, arguments)]
    environment = os.environ | {VARIABLE: KEY}
    return subprocess.Popen(whole, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: "subprocess.Popen[str]") -> str:
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    return output + errors


def kept(run: Path) -> list[dict[str, Any]]:
    lines = [line for path in run.rglob("calls.jsonl") for line in path.read_bytes().split(b"\n")[:-1]]
    return [call for call in map(json.loads, lines) if call["type"] == "call"]


@pytest.fixture(scope="module")
def undisturbed(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counter[bytes]]:
    """A run that nobody kills, and how often each request came."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with serving(Server(key=KEY)) as server, serving(Proxy(server.url, hurting)) as between:
        config = configured(tiny_config, between.url, "local")
        (folder / "config.yaml").write_text(dump_config(config))
        said = finished(command("run", folder / "config.yaml", "--out", folder / "run"))
    assert KEY not in said
    return folder / "run", between.seen


@pytest.mark.parametrize("fleet", ["local", "ray"])
def test_closed_clients_take_part_and_a_killed_run_goes_on_without_asking_twice(
    undisturbed: tuple[Path, Counter[bytes]], tiny_config: MakeConfig, tmp_path: Path, fleet: str
) -> None:
    whole, seen = undisturbed
    reached, held = threading.Event(), threading.Event()

    def stopping(number: int, body: bytes) -> Fault | None:
        if number == seen.total() // 2:  # in the middle of a visit of a later round
            reached.set()
            held.wait(60)
        return hurting(number, body)

    run = tmp_path / "run"
    with serving(Server(key=KEY)) as server, serving(Proxy(server.url, stopping)) as between:
        (tmp_path / "config.yaml").write_text(dump_config(configured(tiny_config, between.url, fleet)))
        driver = command("run", tmp_path / "config.yaml", "--out", run)
        assert reached.wait(250)
        driver.kill()
        driver.communicate()
        held.set()
        assert kept(run)
        said = finished(command("resume", run))

    assert_same_run(whole, run)
    calls = kept(run)
    assert len({call["key"] for call in calls}) == len(calls) == len(kept(whole))
    # A request went through twice only if it was under way when the run was killed.
    assert sum(count - 1 for count in between.passed.values()) <= 2
    ledger = pd.read_parquet(run / "ledger.parquet")
    assert ledger["cost_usd"].sum() == pytest.approx(10e-6 * len(calls))
    answers = pd.concat(map(pd.read_parquet, sorted((run / "consensus").iterdir())))
    assert set(answers.loc[answers["answer"] != "", "client_id"]) == {0, 1, 2}
    files = [path for folder in (whole, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in said
    assert between.keys == {f"Bearer {KEY}"}


def test_a_lost_endpoint_loses_its_clients_and_not_the_run(tiny_config: MakeConfig, tmp_path: Path) -> None:
    with serving(Server(key="another")) as server:
        config = configured(tiny_config, server.url, "local")
        config = config.model_copy(update={"failures": config.failures.model_copy(update={"quorum": 0.3})})
        (tmp_path / "config.yaml").write_text(dump_config(config))
        said = finished(command("run", tmp_path / "config.yaml", "--out", tmp_path / "run"))
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    assert rounds["lost"].tolist()[1:] == ["1, 2"] * 3
    named = rounds["failures"].str.contains(r"set clients\.models\.closed\.options\.api_key_env")
    assert named.tolist()[1:] == [True] * 3
    assert KEY not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
