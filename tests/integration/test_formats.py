"""Each format trains, and gives the same bits as the same rows in a plain file; its malformed twin is one line."""

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import zstandard

from semcons_ray.commands.cli import main
from semcons_ray.config import ExperimentConfig
from semcons_ray.runs.experiment import run_experiment
from tests.invariants.runs import Silent, assert_same_run
from tests.tiny import examples

pytestmark = pytest.mark.real

ROWS = [row for row in examples() if row["category"] != "spell"][:120]
Row = dict[str, Any]


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def plain(row: Row) -> Row:
    return row


def chat(row: Row) -> list[Row]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


def write_csv(path: Path, rows: list[Row], delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Fixture:
    """A data set in some format.

    Attributes:
        row: A row of the plain file in this format.
        write: Writes the rows into a folder.
        source: What `data.source` is, within that folder.
        settings: Further settings of `data`.
        broken: What replaces the first row in the malformed twin.
    """

    row: Callable[[Row], Row]
    write: Callable[[Path, list[Row]], object]
    source: str = "x.jsonl"
    settings: dict[str, Any] = field(default_factory=dict)
    broken: Row = field(default_factory=lambda: {"nothing": "known"})


def as_lines(folder: Path, rows: list[Row]) -> None:
    (folder / "x.jsonl").write_bytes(lines(rows))


def as_shards(folder: Path, rows: list[Row]) -> None:
    for shard in range(3):
        (folder / f"part{shard}.jsonl").write_bytes(lines(rows[shard * 40 : (shard + 1) * 40]))


def as_configuration(folder: Path, rows: list[Row]) -> None:
    (folder / "README.md").write_text(
        "---\nconfigs:\n- {config_name: main, data_files: main.jsonl}\n"
        "- {config_name: other, data_files: other.jsonl}\n---\n"
    )
    (folder / "main.jsonl").write_bytes(lines(rows))
    (folder / "other.jsonl").write_bytes(lines([{"prompt": "p", "response": "r"}]))


FIXTURES = {
    "json": Fixture(plain, lambda folder, rows: (folder / "x.json").write_text(json.dumps(rows)), "x.json"),
    "tsv": Fixture(plain, lambda folder, rows: write_csv(folder / "x.tsv", rows, "\t"), "x.tsv"),
    "parquet": Fixture(plain, lambda folder, rows: pd.DataFrame(rows).to_parquet(folder / "x.parquet"), "x.parquet"),
    "gz": Fixture(plain, lambda folder, rows: (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines(rows))),
                  "x.jsonl.gz"),
    "zst": Fixture(plain, lambda folder, rows: (folder / "x.json.zst").write_bytes(
        zstandard.compress(json.dumps(rows).encode())), "x.json.zst"),
    "glob": Fixture(plain, as_shards, "part*.jsonl"),
    "folder": Fixture(plain, lambda folder, rows: (folder / "train.jsonl").write_bytes(lines(rows)), ""),
    "save_to_disk": Fixture(plain, lambda folder, rows: datasets.Dataset.from_list(rows).save_to_disk(folder / "saved"),
                            "saved"),
    "named configuration": Fixture(plain, as_configuration, "", {"subset": "main"}),
    "chosen columns": Fixture(
        lambda row: {"task": row["prompt"], "solution": row["response"], "kind": row["category"]},
        as_lines, settings={"columns": {"prompt": "task", "response": "solution", "category": "kind"}}),
    "TRL, text": Fixture(
        lambda row: {"prompt": row["prompt"], "completion": " " + row["response"], "category": row["category"]},
        as_lines),
    "TRL, chat": Fixture(
        lambda row: {"prompt": chat(row)[:1], "completion": chat(row)[1:], "category": row["category"]}, as_lines,
        broken={"prompt": [{"role": "user"}], "completion": [{"role": "assistant", "content": {}}]}),
    "messages": Fixture(lambda row: {"messages": chat(row), "category": row["category"]}, as_lines,
                        broken={"messages": "hello"}),
    "Alpaca": Fixture(
        lambda row: {"instruction": row["prompt"], "input": "", "output": row["response"], "category": row["category"]},
        as_lines),
    "Dolly": Fixture(
        lambda row: {"instruction": row["prompt"], "context": "", "response": row["response"],
                     "category": row["category"]}, as_lines),
    "ShareGPT": Fixture(
        lambda row: {"id": "x", "conversations": [{"from": "human", "value": row["prompt"]},
                                                  {"from": "gpt", "value": row["response"]}],
                     "category": row["category"]}, as_lines, broken={"conversations": [3]}),
    "question and answer": Fixture(
        lambda row: {"question": row["prompt"], "answer": row["response"], "category": row["category"]}, as_lines),
}  # fmt: skip


def settings(source: Path, **data: Any) -> dict[str, Any]:
    return {
        "num_rounds": 1,
        "data": {"source": str(source), "examples_per_client": 8, "num_test": 6, **data},
        "clients": {"num_clients": 2},
    }


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., ExperimentConfig]) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    as_lines(folder, ROWS)
    run_experiment(tiny_config(**settings(folder / "x.jsonl")), folder / "run", Silent())
    return folder / "run"


@pytest.mark.parametrize("name", FIXTURES)
def test_a_format_gives_the_bits_of_its_plain_twin(
    name: str, tmp_path: Path, twin: Path, tiny_config: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    fixture = FIXTURES[name]
    fixture.write(data, [fixture.row(row) for row in ROWS])
    run_experiment(tiny_config(**settings(data / fixture.source, **fixture.settings)), tmp_path / "run", Silent())
    assert_same_run(twin, tmp_path / "run")


@pytest.mark.parametrize("name", FIXTURES)
def test_its_malformed_twin_is_one_line(
    name: str, tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    fixture = FIXTURES[name]
    fixture.write(data, [fixture.broken] * 3 if name in ("parquet", "save_to_disk", "tsv") else [fixture.broken])
    words = [
        f"--data.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in fixture.settings.items()
    ]
    out = tmp_path / "run"
    source = f"--data.source={data / fixture.source}"
    assert main(["run", f"--model.name={tiny_llama}", source, *words, "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("semcons: ")
    assert "Traceback" not in "".join(said)
    shutil.rmtree(out, ignore_errors=True)
