"""Data sets of a hub: their configurations, splits and shards, and what can go wrong on the way."""

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semcons_ray.data.sources import load_examples
from semcons_ray.errors import DataError
from tests.hub import Hub

CARD = """\
---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*.parquet}
  - {split: test, path: main/test.parquet}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train.json}
---
"""


def rows(name: str, count: int = 3) -> list[dict[str, Any]]:
    return [{"question": f"{name} {n}", "answer": n} for n in range(count)]


@pytest.fixture
def math(hub: Hub, tmp_path: Path) -> str:
    """A data set of two configurations, one of them in shards; its commit."""
    folder = tmp_path / "math"
    for name in ("main", "socratic"):
        (folder / name).mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for shard in range(2):
        table = pa.Table.from_pylist(rows(f"shard {shard}"))
        pq.write_table(table, folder / f"main/train-0000{shard}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows("test")), folder / "main/test.parquet")
    (folder / "socratic/train.json").write_text(json.dumps(rows("socratic")))
    return hub.push("datasets/org/math", folder)


def prompts(source: str, **options: Any) -> list[str]:
    return [example.prompt for example in load_examples(source, **options).examples]


def message(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as raised:
        load_examples(source, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_configuration_its_splits_and_shards_are_read(math: str) -> None:
    for source in ("org/math", f"org/math@{math}"):
        every = ["shard 0 0", "shard 0 1", "shard 0 2", "shard 1 0", "shard 1 1", "shard 1 2"]
        assert prompts(source, subset="main") == every
        assert prompts(source, subset="main", split="train[2:4]+test[:1]") == ["shard 0 2", "shard 1 0", "test 0"]
        assert prompts(source, subset="main", split="test") == ["test 0", "test 1", "test 2"]
        assert prompts(source, subset="socratic") == ["socratic 0", "socratic 1", "socratic 2"]


def test_where_there_are_several_configurations_they_are_listed(math: str) -> None:
    for options in ({}, {"subset": "other"}):
        said = message("org/math", **options)
        assert "org/math" in said
        assert "data.subset" in said
        assert "main, socratic" in said
    assert "split nonsense" in message("org/math", subset="main", split="nonsense")


def test_what_is_missing_is_one_line(math: str) -> None:
    assert "org/nothing" in message("org/nothing")
    assert "no-such-commit" in message("org/math@no-such-commit", subset="main")


def test_a_gated_data_set_wants_a_token(hub: Hub, math: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("datasets/org/math")
    said = message("org/math", subset="main")
    assert "org/math" in said
    assert "HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", "hf_let_me_in")
    assert prompts("org/math", subset="socratic") == ["socratic 0", "socratic 1", "socratic 2"]


def test_a_download_that_was_cut_goes_on(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("long", 20_000)))
    hub.push("datasets/org/long", folder)
    hub.cuts["train.jsonl"] = 2
    assert len(prompts("org/long")) == 20_000
    assert hub.cuts["train.jsonl"] == 0


def test_several_may_download_at_once(math: str) -> None:
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(prompts("org/math", subset="main"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(one == found[0] for one in found)


def test_what_was_downloaded_is_read_without_the_hub(hub: Hub, math: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    online = prompts(f"org/math@{math}", subset="main")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert prompts(f"org/math@{math}", subset="main") == online
    assert not hub.asked
