"""Smoke of the scripts that are to meet a GPU: that they run, on a CPU."""

from pathlib import Path

import pytest

from tests.experiments.scripts import load_script

gpu = load_script("gpu")


def test_similarity_is_held_against_reading_the_same_memory():
    found = gpu.similarity("cpu", small=True)
    assert found["bytes"] == 100 * 200 * 384 * 4
    assert found["ratio"] > 0
    assert len(found["all_ratios"]) == gpu.REPETITIONS


@pytest.mark.real
def test_one_and_eight_packed_clients_train_and_generate(tiny_llama: Path):
    found = gpu.tokens("cpu", small=True, model_name=str(tiny_llama))
    for clients in (1, 8):
        entry = found[f"{clients}_clients"]
        assert entry["trained_tokens_per_second"] > 0
        assert entry["generated_tokens_per_second"] > 0
        assert entry["joules_measured"] is None
        assert entry["joules_estimated"] > 0


@pytest.mark.real
@pytest.mark.slow
def test_a_run_says_where_its_clients_were(tiny_llama: Path):
    found = gpu.placement("cpu", small=True, model_name=str(tiny_llama), fleet="local")
    assert found["clients_answered"] == 2
    assert [worker["clients"] for worker in found["workers"]] == [[0, 1]]


@pytest.mark.real
@pytest.mark.parametrize("part", ["devices", "memory", pytest.param("options", marks=pytest.mark.long)])
def test_random_models_are_measured_in_each_shape(part: str, tiny_llama: Path, tmp_path: Path):
    found = getattr(gpu, part)("cpu", small=True, models=tmp_path, tokenizer=str(tiny_llama))
    assert {name.partition(",")[0] for name in found} == {"smollm2-135m", "llama-3.2-1b"}
    for entry in found.values():
        if part == "memory":
            assert entry["ratio"] > 0
        elif part == "devices":
            assert min(entry.values()) > 0
        else:
            assert entry["tokens_per_second"]["packed"] > 0


@pytest.mark.real
def test_a_run_with_a_large_model_says_where_its_time_went(tiny_llama: Path, tmp_path: Path):
    found = gpu.large("cpu", small=True, models=tmp_path, tokenizer=str(tiny_llama))
    assert found["clients_answered"] == 4
    assert {"fine_tune", "generate", "embed"} <= set(found["stages"])
    assert found["trained_tokens_per_second"] > 0
    assert found["joules"] > 0


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["run.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "torch sees no GPU here" in capsys.readouterr().err
