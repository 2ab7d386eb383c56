import json
from pathlib import Path

import pytest

from semcons_ray.errors import ModelError
from semcons_ray.modeling.footprint import measure_footprint
from semcons_ray.modeling.packaged import cache_dir, resolve_model


def test_a_path_is_itself(tiny_llama: Path) -> None:
    assert resolve_model(str(tiny_llama)) == str(tiny_llama)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("packaged:gpt-17", "packaged models are packaged:smollm2-135m-instruct"),
        ("/no/such/folder", "no config.json there"),
    ],
)
def test_unknown_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        resolve_model(name)


def test_a_hub_model_that_cannot_be_had_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"^cannot find model 'nobody/nothing' on the hub[^\n]*$"):
        resolve_model("nobody/nothing")


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEMCONS_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("SEMCONS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "semcons_ray"


def test_a_damaged_packaged_file_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEMCONS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("semcons_ray.modeling.packaged._locate", lambda *_: tmp_path / "bad.gguf")
    with pytest.raises(ModelError, match="is damaged"):
        resolve_model("packaged:smollm2-135m-instruct")


def test_footprint_by_hand(tiny_llama: Path) -> None:
    """Hidden 32, ffn 64, 2 layers, 4 heads: a batch of 2 x 8 tokens in float32."""
    footprint = measure_footprint(tiny_llama, dtype="float32", max_length=8, batch_size=2)
    vocabulary = json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    attention = 32 * 32 * 2 + 32 * 16 * 2
    parameters = 2 * (attention + 3 * 32 * 64 + 2 * 32) + 32 + 2 * vocabulary * 32
    kept = 16 * 2 * (26 * 32 + 3 * 64) * 4
    assert footprint.weights == 4 * parameters
    assert footprint.activations == kept + 3 * 16 * 8 * 2 * 4 * 4 + 8 * vocabulary * 16


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        measure_footprint(tmp_path, dtype="float32", max_length=8, batch_size=2)


def test_a_damaged_header_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x05")
    with pytest.raises(ModelError, match="is damaged"):
        measure_footprint(tmp_path, dtype="float32", max_length=8, batch_size=2)
