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
    for clients in gpu.CLIENTS:
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


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["run.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "torch sees no GPU here" in capsys.readouterr().err
