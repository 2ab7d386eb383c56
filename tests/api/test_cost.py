import argparse
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLTextConfig,
)

from semcons_ray.api.cost import (
    ALL_LINEAR,
    DTYPE_BYTES,
    ENCODING_BYTES,
    count_parameters,
    estimate,
    read_linear_maps,
)
from semcons_ray.commands.cost import add_arguments, run
from semcons_ray.errors import ConfigError, ModelError
from semcons_ray.messages import Answers, PseudoLabels, PublicPrompts
from semcons_ray.modeling.shapes import SHAPES


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="semcons cost")
    add_arguments(parser)
    return parser.parse_args(arguments)


def write_config(folder, values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize(
    ("targets", "per_rank"),
    [
        (["q", "v"], 6_322_176),
        (["q_proj", "k_proj", "v_proj", "o_proj"], 12_644_352),
        (["q", "k", "v", "o", "gate", "up", "down"], 38_965_248),
        (ALL_LINEAR, 38_965_248),
    ],
)
def test_llama_405b_has_the_parameters_of_the_worked_example(targets, per_rank):
    assert estimate(read_linear_maps("llama-3.1-405b"), targets=targets, rank=1).parameters == per_rank


def test_the_worked_example():
    cost = estimate(
        read_linear_maps("Llama-3.1-405B"),
        targets=["q", "v"],
        rank=16,
        dtype="float16",
        prompts=500,
        tokens=100,
        bytes_per_token=4,
        clients=10,
        rounds=20,
    )
    assert cost.weights.uplink_bytes == cost.weights.downlink_bytes == 202_309_632
    assert cost.text.uplink_bytes == cost.text.downlink_bytes == cost.text.once_bytes == 200_000
    assert int(cost.ratio) == 1011
    assert cost.total_bytes(cost.weights) == 10 * 20 * 2 * 202_309_632
    assert cost.total_bytes(cost.text) == 10 * (20 * 2 + 1) * 200_000
    assert cost.total_ratio == pytest.approx(cost.ratio * 40 / 41)


def test_several_answers_go_up_and_one_label_comes_down():
    text = estimate(read_linear_maps("qwen3-8b"), prompts=500, tokens=100, samples=8).text
    assert (text.uplink_bytes, text.downlink_bytes, text.once_bytes) == (1_600_000, 200_000, 200_000)


def test_a_built_in_name_may_be_in_capitals():
    assert count_parameters("LLAMA-3.1-8B") == SHAPES["llama-3.1-8b"].parameters


def test_smollm2_by_hand():
    maps = read_linear_maps("smollm2-135m")
    assert maps["q_proj"] == 30 * (576 + 9 * 64)
    assert maps["k_proj"] == maps["v_proj"] == 30 * (576 + 3 * 64)
    assert maps["gate_proj"] == maps["down_proj"] == 30 * (576 + 1536)


def test_query_width_can_differ_from_hidden_size():
    assert read_linear_maps("qwen3-0.6b")["q_proj"] == 28 * (1024 + 16 * 128)
    assert read_linear_maps("gemma-3-270m")["o_proj"] == 18 * (4 * 256 + 640)


TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 80, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (LlamaConfig(**TINY), ["q_proj", "v_proj"]),
        (LlamaConfig(**TINY, tie_word_embeddings=True), ALL_LINEAR),
        (Qwen3Config(**TINY, head_dim=16), ["q_proj", "o_proj", "down_proj"]),
        (Gemma3TextConfig(**TINY, head_dim=32), ALL_LINEAR),
        (GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=50), ["c_attn"]),
        (GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=50), ALL_LINEAR),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "-",
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_config_file_gives_the_parameters_that_peft_trains(tmp_path, config, targets):
    path = write_config(tmp_path, config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert estimate(read_linear_maps(path), targets=targets, rank=3).parameters == trained


def test_a_published_config_file_agrees_with_the_built_in_shape(tmp_path):
    values = {
        "model_type": "llama",
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "intermediate_size": 53248,
        "vocab_size": 128256,
    }
    write_config(tmp_path, values)
    assert read_linear_maps(str(tmp_path)) == read_linear_maps("llama-3.1-405b")  # a folder does as well


def test_only_the_text_part_of_a_vision_model_counts(tmp_path):
    text = Gemma3TextConfig(**TINY, head_dim=16)
    whole = Gemma3Config(text_config=text.to_dict()).to_dict()
    (tmp_path / "text").mkdir()
    assert read_linear_maps(write_config(tmp_path, whole)) == read_linear_maps(
        write_config(tmp_path / "text", text.to_dict())
    )


def test_text_bytes_are_close_to_those_of_real_messages():
    texts = tuple("x" * 400 for _ in range(500))
    text = estimate(read_linear_maps("qwen3-8b"), prompts=500, tokens=100, bytes_per_token=4).text
    answers = Answers(round_number=1, client_id=0, num_examples=64, answers=texts)
    labels = PseudoLabels(round_number=1, prompt_ids=tuple(range(500)), responses=texts)
    for expected, message in (
        (text.uplink_bytes, answers),
        (text.downlink_bytes, labels),
        (text.once_bytes, PublicPrompts(prompts=texts)),
    ):
        assert expected < len(message.encode()) < expected + 500 * 10


@given(
    name=st.sampled_from(sorted(SHAPES)),
    rank=st.integers(1, 256),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    prompts=st.integers(1, 10_000),
    clients=st.integers(1, 100),
    rounds=st.integers(1, 100),
)
def test_sizes_scale_as_they_should(name, rank, dtype, prompts, clients, rounds):
    maps = read_linear_maps(name)
    cost = estimate(maps, rank=rank, dtype=dtype, prompts=prompts, clients=clients, rounds=rounds)
    assert cost.weights.uplink_bytes == rank * sum(maps.values()) * DTYPE_BYTES[dtype]
    twice = estimate(maps, rank=rank, dtype=dtype, prompts=2 * prompts, clients=clients, rounds=rounds)
    assert cost.ratio == pytest.approx(2 * twice.ratio)
    more = estimate(maps, rank=rank, dtype=dtype, prompts=prompts, clients=clients + 1, rounds=rounds)
    assert more.ratio == cost.ratio
    assert more.total_bytes(more.text) - cost.total_bytes(cost.text) == cost.total_bytes(cost.text) // clients
    assert cost.ratio * 2 / 3 <= cost.total_ratio * (1 + 1e-12) < cost.ratio


def test_a_map_named_twice_counts_once():
    maps = read_linear_maps("qwen3-8b")
    assert estimate(maps, targets=["q", "q_proj", " q"]) == estimate(maps, targets="q_proj")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rank": 0}, "--rank"),
        ({"prompts": -1}, "--prompts"),
        ({"tokens": 0}, "--tokens"),
        ({"bytes_per_token": float("nan")}, "--bytes-per-token"),
        ({"clients": 0}, "--clients"),
        ({"rounds": 0}, "--rounds"),
        ({"dtype": "float8"}, "--dtype"),
        ({"targets": ["q", "lm_head"]}, "no linear map 'lm_head'; the model has q_proj, k_proj"),
        ({"targets": [""]}, "--targets"),
    ],
)
def test_a_wrong_argument_is_named(wrong, named):
    with pytest.raises(ConfigError, match=named):
        estimate(read_linear_maps("qwen3-8b"), **wrong)


@pytest.mark.parametrize("model", ["llama-4", "missing/config.json"])
def test_an_unknown_model_lists_the_known_ones(model):
    with pytest.raises(ModelError) as caught:
        read_linear_maps(model)
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in (model, *SHAPES))


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-model"}', '{"model_type": "vit"}'])
def test_a_config_of_no_language_model_is_one_clear_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="Give a built-in name") as caught:
        read_linear_maps(str(tmp_path / "config.json"))
    assert "\n" not in str(caught.value)


def test_each_expert_of_a_mixture_counts_as_peft_trains_it(tmp_path):
    config = Qwen3MoeConfig(**TINY, head_dim=16, moe_intermediate_size=32, num_experts=4)
    maps = read_linear_maps(write_config(tmp_path, config.to_dict()))
    assert maps["gate_up_proj"] == 2 * 4 * (48 + 2 * 32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    lora = LoraConfig(
        r=3,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    trained = sum(weight.numel() for weight in get_peft_model(model, lora).parameters() if weight.requires_grad)
    assert estimate(maps, targets=["q", "gate_up", "down"], rank=3).parameters == trained


def test_a_text_part_without_output_embedding_counts_as_well(tmp_path):
    text = Qwen3VLTextConfig(**TINY, head_dim=16)
    maps = read_linear_maps(write_config(tmp_path, Qwen3VLConfig(text_config=text.to_dict()).to_dict()))
    assert maps == read_linear_maps(write_config(tmp_path, Qwen3Config(**TINY, head_dim=16).to_dict()))


def test_the_built_in_count_of_parameters_is_that_of_the_config(tmp_path):
    config = Qwen3Config(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    path = write_config(tmp_path, config.to_dict())
    assert read_linear_maps(path) == read_linear_maps("qwen3-0.6b")
    assert count_parameters(path) == pytest.approx(count_parameters("qwen3-0.6b"), rel=0.001)


def test_a_hub_id_that_cannot_be_reached_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="--model nobody/nothing: ") as caught:
        read_linear_maps("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_the_table_states_every_size_and_that_it_is_analytic(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(parse("--clients", "10", "--rounds", "5")) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = {line.split("│")[0].strip(): line.replace("│", " ").split()[-5:] for line in out.splitlines() if "│" in line}
    assert rows["up, a client and round"] == ["202", "MB", "200", "kB", "1,011.5x"]
    assert rows["down, a client and round"] == rows["up, a client and round"]
    assert rows["both, a client and round"] == ["405", "MB", "400", "kB", "1,011.5x"]
    assert rows["public prompts, once a client"] == ["0", "B", "200", "kB", "-"]
    assert rows["total, 10 clients, 5 rounds"] == ["20.2", "GB", "22.0", "MB", "919.6x"]
    assert "101,154,816 parameters" in out
    assert "Analytic, not measured" in out


def test_the_command_line_reaches_every_argument(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    weights = "--model smollm2-135m --targets all-linear --rank 4 --dtype int8"
    text = "--prompts 10 --tokens 5 --bytes-per-token 2.5 --clients 1 --rounds 1"
    run(parse(*weights.split(), *text.split()))
    out = capsys.readouterr().out
    assert f"{4 * sum(read_linear_maps('smollm2-135m').values()):,} parameters in int8" in out
    assert "125 B" in out


def test_over_a_hundred_rounds_the_worked_example_comes_to_about_1006():
    cost = estimate(read_linear_maps("llama-3.1-405b"), targets=["q", "v"], clients=4, rounds=100)
    assert cost.total_ratio == pytest.approx(202_309_632 * 200 / (200_000 * 201)) == pytest.approx(1006, abs=1)


@pytest.mark.parametrize(("encoding", "size"), ENCODING_BYTES.items())
def test_an_encoding_stands_for_its_bytes_a_token_unless_they_are_given(capsys, monkeypatch, encoding, size):
    monkeypatch.setenv("COLUMNS", "200")
    run(parse("--encoding", encoding))
    assert f"{size:g} bytes a token ({encoding})" in capsys.readouterr().out
    run(parse("--encoding", encoding, "--bytes-per-token", "3.25"))
    assert "3.25 bytes a token (as given)" in capsys.readouterr().out


def test_the_figure_states_the_ratio_of_the_chosen_model(tmp_path, capsys):
    path = tmp_path / "figure.svg"
    run(parse("--rounds", "100", "--figure", str(path)))
    drawn = path.read_text()
    assert "1,006.5x" in drawn
    assert all(f"LoRA on {targets}" in drawn for targets in ("q,v", "q,k,v,o", ALL_LINEAR))
    assert f"figure: {path}" in capsys.readouterr().out
    run(parse("--rounds", "100", "--figure", str(path)))
    assert path.read_text() == drawn


def test_the_figure_takes_a_model_that_the_table_lacks(tmp_path):
    model = write_config(tmp_path, GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=50).to_dict())
    path = tmp_path / "figure.png"
    run(parse("--model", model, "--targets", "c_attn", "--figure", str(path)))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_figure_in_another_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        run(parse("--figure", str(tmp_path / "figure.pdf")))


def test_the_help_gives_an_example_that_parses(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SHAPES)
    example = text.split("Example: semcons cost ")[1].split()
    assert run(parse(*example)) == 0
