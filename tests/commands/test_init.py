"""Presets: each is valid, differs from the defaults in all that it says, and runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from huggingface_hub.utils import validate_repo_id

from semcons_ray.commands.cli import main
from semcons_ray.commands.init import PRESETS
from semcons_ray.config import ExperimentConfig, changed_settings, is_chosen, load_config, read_yaml, setting_keys
from semcons_ray.modeling.footprint import measure_footprint
from semcons_ray.runs.assembly import LENGTHS
from tests.tiny import examples, write_hollow

NAMES = ["cpu", "dolly", "flora", "flowertune-general", "flowertune-medical", "gpu-1b", "gpu-8b", "short-answers"]
OF_DEFAULT_SIZE = ("cpu", "short-answers")


def test_there_are_these() -> None:
    assert list(PRESETS) == NAMES


def leaves(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in values.items():
        if f"{above}{key}" in setting_keys():
            yield f"{above}{key}"
        else:
            yield from leaves(value, f"{above}{key}.")


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_only_what_differs_from_the_defaults_and_has_an_effect(name: str) -> None:
    config = load_config(PRESETS[name])  # which refuses what has no effect
    assert set(leaves(read_yaml(PRESETS[name]))) == set(leaves(changed_settings(config)))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_DEFAULT_SIZE])
def test_a_preset_chooses_lengths_that_go_together(name: str) -> None:
    config = load_config(PRESETS[name])
    assert all(is_chosen(config, key) for key in LENGTHS)
    assert 24 < config.generation.max_new_tokens <= config.model.max_length / 2
    assert config.data.max_response_chars >= 4 * config.generation.max_new_tokens


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_names_things_that_can_be(name: str) -> None:
    config, default = load_config(PRESETS[name]), ExperimentConfig()
    for place in {config.model.name, config.data.source} - {default.model.name, default.data.source}:
        validate_repo_id(place)
        assert "/" in place
    assert max(map(len, PRESETS[name].read_text().splitlines())) <= 120


@pytest.mark.parametrize("name", ["dolly", "flora", "flowertune-general", "flowertune-medical"])
def test_a_preset_of_a_published_experiment_says_where_it_is_published(name: str) -> None:
    head = PRESETS[name].read_text().partition("\nname: ")[0]
    assert "arXiv:" in head
    assert "github.com/" in head


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False}  # fmt: skip
SIZES: dict[str, tuple[str, dict[str, Any], int]] = {
    "gpu-1b": ("llama", {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                         "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49152,
                         "tie_word_embeddings": True}, 24),
    "gpu-8b": ("qwen3", {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
                         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
                         "tie_word_embeddings": False}, 40),
    "flora": ("llama", LLAMA_7B, 24),
    "flowertune-general": ("mistral", {**LLAMA_7B, "intermediate_size": 14336, "num_key_value_heads": 8,
                                       "vocab_size": 32768}, 24),
}  # fmt: skip
SIZES |= {"dolly": SIZES["gpu-1b"], "flowertune-medical": SIZES["flowertune-general"]}


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_fits_the_gpu_that_it_names(name: str, tmp_path: Path) -> None:
    architecture, shape, gigabytes = SIZES[name]
    config = load_config(PRESETS[name])
    footprint = measure_footprint(
        write_hollow(tmp_path, architecture, **shape),
        dtype="bfloat16",
        quantization=config.model.quantization,
        max_length=config.model.max_length,
        batch_size=config.training.batch_size,
        generation_batch_size=config.generation.batch_size,
        max_new_tokens=config.generation.max_new_tokens,
        gradient_checkpointing=config.training.gradient_checkpointing,
        device="cuda",
    )
    assert 0.4 < footprint.device_bytes / (gigabytes * 1e9) < 0.95
    assert f"{gigabytes} GB" in PRESETS[name].read_text()


def dolly(row: dict[str, str]) -> dict[str, str]:
    return {"instruction": row["prompt"], "context": "", "response": row["response"], "category": row["category"]}


def alpaca(row: dict[str, str]) -> dict[str, str]:
    return {"instruction": row["prompt"], "input": "", "output": row["response"], "text": row["prompt"]}


def flashcard(row: dict[str, str]) -> dict[str, str]:
    return {"instruction": "Answer this question truthfully", "input": row["prompt"], "output": row["response"]}


SCHEMAS = {"dolly": dolly, "flora": dolly, "flowertune-general": alpaca, "flowertune-medical": flashcard}


@pytest.mark.real
@pytest.mark.parametrize("name", NAMES)
def test_a_preset_runs_with_something_small_laid_over_it(name: str, tmp_path: Path, tiny_llama: Path) -> None:
    assert main(["init", str(tmp_path / "mine"), "--preset", name]) == 0
    rows = map(SCHEMAS.get(name, dict), examples())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {
        "num_rounds": 2,
        "data": {"source": str(tmp_path / "rows.jsonl"), "examples_per_client": 3, "num_test": 4},
        "prompts": {"budget": 4},
        "model": {"name": str(tiny_llama), "dtype": "float32", "quantization": "none", "chat_template_kwargs": {},
                  "max_length": 256},
        "generation": {"max_new_tokens": 4},
        "evaluation": {"num_answers": 2},
        "resources": {"fleet": "local", "device": "cpu"},
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    files = [str(tmp_path / "mine/config.yaml"), str(tmp_path / "small.yaml")]
    assert main(["run", *files, "--seed", "3", "--out", str(tmp_path / "run")]) == 0
    config, preset = load_config(tmp_path / "run/config.yaml"), load_config(PRESETS[name])
    assert (config.seed, config.num_rounds, config.name) == (3, 2, preset.name)
    assert (config.training, config.clients, config.algorithm) == (preset.training, preset.clients, preset.algorithm)
    assert config.model.lora == preset.model.lora
    assert pd.read_parquet(tmp_path / "run/metrics.parquet")["nll"].notna().all()
    report = (tmp_path / "run/data_report.json").read_text()
    assert ("not used: input, text" in report) == (name == "flowertune-general")
    assert ("not used: instruction" in report) == (name == "flowertune-medical")


def test_init_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["init", "--help"])
    text = capsys.readouterr().out
    for name, path in PRESETS.items():
        assert f"  {name} " in text
        assert path.read_text().splitlines()[0][2:] in text


@pytest.mark.parametrize("preset", [None, *NAMES])
def test_a_config_names_its_schema_which_lies_beside_it(preset: str | None, tmp_path: Path) -> None:
    assert main(["init", str(tmp_path), *(["--preset", preset] if preset else [])]) == 0
    first = (tmp_path / "config.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=config.schema.json"
    assert json.loads((tmp_path / "config.schema.json").read_text())["properties"]["model"]
    assert load_config(tmp_path / "config.yaml") == (load_config(PRESETS[preset]) if preset else ExperimentConfig())
