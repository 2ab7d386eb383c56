"""Of a folder that holds its weights more than once, those count that transformers loads."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from semcons_ray.errors import ModelError
from semcons_ray.modeling.model_folder import read_shapes

NOTHING_SAID = SimpleNamespace()
INDEX = "model.safetensors.index.json"


def write(folder: Path, name: str, **shapes: list[int]) -> None:
    header = {key: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for key, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text)


def write_index(folder: Path, **files: str) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("copy", ["consolidated.safetensors", "model.fp16.safetensors", "adapter.safetensors"])
def test_another_copy_beside_the_whole_model_does_not_count(copy: str, tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", a=[2, 3])
    write(tmp_path, copy, a=[2, 3], b=[500, 500])
    assert read_shapes(tmp_path, NOTHING_SAID) == {"a": [2, 3]}


def test_of_a_model_in_parts_only_those_in_the_index_count(tmp_path: Path) -> None:
    write(tmp_path, "model-00001-of-00002.safetensors", a=[2, 3])
    write(tmp_path, "model-00002-of-00002.safetensors", b=[4])
    write(tmp_path, "consolidated.safetensors", tok_embeddings=[500, 500])
    write_index(tmp_path, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    assert read_shapes(tmp_path, NOTHING_SAID) == {"a": [2, 3], "b": [4]}


def test_the_whole_model_goes_before_one_in_parts(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", a=[2, 3])
    write(tmp_path, "model-00001-of-00001.safetensors", a=[7, 7])
    write_index(tmp_path, a="model-00001-of-00001.safetensors")
    assert read_shapes(tmp_path, NOTHING_SAID) == {"a": [2, 3]}


def test_the_configuration_may_name_the_file(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", a=[2, 3])
    write(tmp_path, "other.safetensors", a=[7, 7])
    assert read_shapes(tmp_path, SimpleNamespace(transformers_weights="other.safetensors")) == {"a": [7, 7]}


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    write_index(tmp_path, a="model-00001-of-00001.safetensors")
    with pytest.raises(ModelError, match=r"model-00001-of-00001\.safetensors is missing$"):
        read_shapes(tmp_path, NOTHING_SAID)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ModelError, match=rf"{INDEX} is damaged: [^\n]+$"):
        read_shapes(tmp_path, NOTHING_SAID)


@pytest.mark.parametrize("header", [[], {"a": 3}, {"a": {}}, 3], ids=str)
def test_a_header_of_another_form_is_damaged(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged: [^\n]+$"):
        read_shapes(tmp_path, NOTHING_SAID)


def test_a_pointer_in_place_of_a_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match=r"is damaged: it does not begin with the length of a header$"):
        read_shapes(tmp_path, NOTHING_SAID)


def test_without_weights_that_are_loaded_it_is_said(tmp_path: Path) -> None:
    write(tmp_path, "consolidated.safetensors", a=[2, 3])
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"no model\.safetensors file; weights in other formats are not loaded"):
        read_shapes(tmp_path, NOTHING_SAID)
