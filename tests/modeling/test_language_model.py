import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig
from semcons_ray.errors import ModelError
from semcons_ray.messages import Turn
from semcons_ray.modeling import language_model
from semcons_ray.modeling.decoding import chosen_tokens
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.optimizer import AdamW
from semcons_ray.modeling.packaged import CHATML
from semcons_ray.modeling.steps import num_steps, steps_of
from tests.tiny import train_tokenizer, write_model

PAIRS = [Pair("add one and two", "it is 3"), Pair("spell one two", "o n e"), Pair("which is more, one or two?", "two")]
GREEDY = GenerationConfig(max_new_tokens=8, temperature=0.0, batch_size=2)


def load(folder: Path, **changes: object) -> LanguageModel:
    settings = {"lora": LoraConfig(rank=4), "dtype": "float32", "device": "cpu", "max_length": 64, **changes}
    return LanguageModel(str(folder), **settings)  # type: ignore[arg-type]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


def trained(model: LanguageModel, **training: object) -> dict[str, torch.Tensor]:
    adapter = model.fresh_adapter()
    settings = TrainingConfig.model_validate({"learning_rate": 1e-2, "batch_size": 2, "local_epochs": 5, **training})
    model.fine_tune(adapter, PAIRS, settings, rng())
    return adapter


def test_nll_equals_that_of_plain_transformers(model: LanguageModel, tiny_llama: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    expected, tokens = list[float](), list[int]()
    for pair in PAIRS:
        turns = [{"role": "user", "content": pair.prompt}]
        prompt = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))[
            "input_ids"
        ]
        response = [*tokenizer(pair.response)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = plain(input_ids=torch.tensor([[*prompt, *response]]), labels=labels).loss.detach()
        expected.append(float(loss) * len(response))
        tokens.append(len(response))
    score = model.negative_log_likelihood(model.fresh_adapter(), PAIRS, batch_size=2)
    assert list(score.num_tokens) == tokens
    assert list(score.num_bytes) == [len(pair.response) for pair in PAIRS]
    assert list(score.nll) == pytest.approx(expected, rel=1e-5)
    assert score.nll_sum == pytest.approx(sum(expected), rel=1e-5)
    # Whatever is scored beside it, in the order of the pairs.
    backwards = model.negative_log_likelihood(model.fresh_adapter(), PAIRS[::-1], batch_size=3)
    assert list(backwards.nll) == pytest.approx(expected[::-1], rel=1e-5)


@pytest.mark.parametrize("length", [1, 8, 9, 30])
def test_greedy_answers_equal_those_of_plain_transformers_one_by_one(
    model: LanguageModel, tiny_llama: Path, length: int
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    expected = []
    for pair in PAIRS:
        turns = [{"role": "user", "content": pair.prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        output = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    settings = GREEDY.model_copy(update={"max_new_tokens": length})
    answers, _ = model.generate(model.fresh_adapter(), [pair.prompt for pair in PAIRS], settings, rng())
    assert answers == expected


def test_an_answer_that_ends_leaves_its_batch_and_the_others_go_on(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained(model, local_epochs=150)  # which has learnt to end
    settings = GREEDY.model_copy(update={"max_new_tokens": 16, "batch_size": 3})
    prompts = [pair.prompt for pair in PAIRS]
    one_by_one = [model.generate(adapter, [prompt], settings, rng()) for prompt in prompts]
    rows: list[int] = []
    forward = model.model.forward

    def spy(**inputs: torch.Tensor) -> object:
        rows.append(len(inputs["input_ids"]))
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", spy)
    answers, tokens = model.generate(adapter, prompts, settings, rng())
    assert answers == [answer for [answer], _ in one_by_one]
    assert tokens == sum(rows) == sum(count for _, count in one_by_one)
    assert rows[0] == 3
    assert rows[-1] < 3


def test_several_samples_are_those_of_calls_one_after_another_and_prompts_are_read_once(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [pair.prompt for pair in PAIRS] + ["add three"]
    settings = GREEDY.model_copy(update={"temperature": 1.0, "batch_size": 2, "max_new_tokens": 5})
    random = rng()
    apart = [model.generate(model.fresh_adapter(), prompts, settings, random) for _ in range(3)]
    read: list[int] = []
    forward = model.model.forward

    def spy(**inputs: torch.Tensor) -> object:
        read.append(inputs["input_ids"].numel())
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", spy)
    together, tokens = model.generate(
        model.fresh_adapter(), prompts, settings.model_copy(update={"num_samples": 3}), rng()
    )
    assert together == [answer for answers, _ in apart for answer in answers]
    assert len({*together}) > len(prompts)
    assert tokens == sum(count for _, count in apart)
    read_by_three = sum(read)
    read.clear()
    model.generate(model.fresh_adapter(), prompts, settings.model_copy(update={"max_new_tokens": 1}), rng())
    # Of each answer all tokens but the last are read; texts that go on beside them in a batch are not padded anew.
    assert read_by_three == sum(read) + tokens - 3 * len(prompts)


@pytest.mark.parametrize("tokens", [3, 8, 100])
def test_how_often_ends_are_read_does_not_change_answers(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(model, "ends", [*range(0, 400, 7)])
    prompts = [f"add {word} and {other}" for word in ("one", "two", "three") for other in ("four", "four and five")]
    for stop in ([], ["a", "i"]):
        settings = GenerationConfig(max_new_tokens=20, temperature=1.0, batch_size=4, stop=stop)
        expected = model.generate(model.fresh_adapter(), prompts, settings, rng())
        with monkeypatch.context() as patched:
            patched.setattr(model, "_read_every", tokens)
            assert model.generate(model.fresh_adapter(), prompts, settings, rng()) == expected


def test_a_drawn_answer_does_not_depend_on_what_it_is_batched_with(model: LanguageModel) -> None:
    prompts = [pair.prompt for pair in PAIRS]
    settings = [GREEDY.model_copy(update={"temperature": 1.0, "batch_size": size}) for size in (1, 2, 3)]
    one, two, three = (model.generate(model.fresh_adapter(), prompts, setting, rng()) for setting in settings)
    assert one == two == three
    assert len(set(one[0])) == 3


def test_tokens_are_drawn_in_proportion_to_their_probability() -> None:
    """Quantiles at equal distances pick each token as often as its probability says, at any temperature."""
    probabilities = torch.tensor([0.5, 0.0, 0.125, 0.375])
    draws = torch.arange(16) / 16
    logits = probabilities.log().expand(16, 4)
    for settings, counts in (
        ({}, [8, 0, 2, 6]),
        ({"top_k": 3}, [8, 0, 2, 6]),
        ({"top_k": 2}, [10, 0, 0, 6]),  # 4 : 3, so the quantile of the first is 9.14 of 16
        ({"top_k": 1}, [16, 0, 0, 0]),
        ({"top_p": 0.88}, [8, 0, 2, 6]),
        ({"top_p": 0.87}, [10, 0, 0, 6]),
        ({"top_p": 0.5}, [16, 0, 0, 0]),
        ({"top_p": 0.58, "top_k": 2}, [10, 0, 0, 6]),  # of the two left, the first has 0.57
        ({"top_p": 0.57, "top_k": 2}, [16, 0, 0, 0]),
        ({"temperature": 0.0}, [16, 0, 0, 0]),
    ):
        generation = GenerationConfig.model_validate(settings)
        assert torch.bincount(chosen_tokens(logits, generation, draws), minlength=4).tolist() == counts, settings
    warm = GenerationConfig(temperature=2.0)
    assert torch.bincount(chosen_tokens(2 * logits, warm, draws), minlength=4).tolist() == [8, 0, 2, 6]


def test_the_highest_draw_takes_the_last_token_that_is_left() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    highest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert chosen_tokens(logits, GenerationConfig(top_k=2), highest).tolist() == [2]
    assert chosen_tokens(logits, GenerationConfig(top_k=2), torch.tensor([0.0])).tolist() == [1]


def test_an_answer_ends_at_a_stop_text_which_is_cut_off(model: LanguageModel) -> None:
    prompts = [pair.prompt for pair in PAIRS]
    settings = GREEDY.model_copy(update={"max_new_tokens": 16})
    whole, tokens = model.generate(model.fresh_adapter(), prompts, settings, rng())
    stop = whole[0][3:5]  # inside a token, or across two
    for batch_size in (1, 3):
        stopping = settings.model_copy(update={"stop": ("not there", stop), "batch_size": batch_size})
        answers, fewer = model.generate(model.fresh_adapter(), prompts, stopping, rng())
        assert answers == [answer.partition(stop)[0].strip() for answer in whole]
        assert len(answers[0]) <= 3
        assert fewer < tokens


def test_a_stop_text_that_is_a_special_token_ends_an_answer(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, prompt, written = model.fresh_adapter(), PAIRS[0].prompt, []
    decode = model.chat.answer
    monkeypatch.setattr(model.chat, "answer", lambda ids, stop: written.append(ids) or decode(ids, stop))
    model.generate(adapter, [prompt], GREEDY, rng())
    (whole,) = written
    monkeypatch.setattr(model.chat, "_special", {"<|mark|>": whole[3]})
    marked = GREEDY.model_copy(update={"stop": ("<|mark|>", "there")})
    _, tokens = model.generate(adapter, [prompt], marked, rng())
    assert written[1] == whole[: whole.index(whole[3])]
    assert tokens == len(written[1]) + 1
    request = model.engine_request(adapter, [prompt], marked, rng())
    assert set(request.ends) - set(model.ends) == {whole[3]}
    assert request.stop == ["there"]


def test_one_step_equals_plain_adamw_on_the_plain_model_with_the_adapter(model: LanguageModel, tmp_path: Path) -> None:
    """SGD by hand is hopeless in Adam; but its first step moves each weight by lr times the sign of its gradient."""
    adapter = model.fresh_adapter()
    before = {key: value.clone() for key, value in adapter.items()}
    one_step = TrainingConfig(learning_rate=1e-3, batch_size=3, local_steps=1, max_grad_norm=1e9)
    model.fine_tune(adapter, PAIRS, one_step, rng())
    moved = torch.cat([(adapter[key] - before[key]).flatten() for key in adapter if "lora_B" in key]).abs()
    assert float(moved.median()) == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize(
    ("scheduler", "warmup", "moved"),
    [
        ("constant", 0, 4.0),
        ("linear", 0, 1 + 3 / 4 + 2 / 4 + 1 / 4),
        ("linear", 0.5, 0 + 1 / 2 + 1 + 1 / 2),
        ("linear", 0.3, 0 + 1 / 2 + 1 + 1 / 2),
        ("linear", 0.9, 0 + 1 / 3 + 2 / 3 + 1),
        ("constant_with_warmup", 0.25, 0 + 1 + 1 + 1),
        ("cosine", 0, sum((1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))),
        ("cosine_with_restarts", 0.25, 0 + sum((1 + math.cos(math.pi * step / 3)) / 2 for step in range(3))),
        ("polynomial", 0, (1 + 3 / 4 + 2 / 4 + 1 / 4) * (1 - 1e-5) + 4e-5),
        ("inverse_sqrt", 0.25, 0 + 1 + 1 / math.sqrt(2) + 1 / math.sqrt(3)),
    ],
)
def test_a_weight_of_constant_gradient_moves_by_the_learning_rate_of_each_step(
    scheduler: str, warmup: float, moved: float
) -> None:
    """Adam divides a gradient by its own size, so its steps are as long as the learning rate says."""
    weight = torch.nn.Parameter(torch.zeros(1))
    training = TrainingConfig.model_validate(
        {"learning_rate": 1e-2, "lr_scheduler_type": scheduler, "warmup_ratio": warmup}
    )
    adamw = AdamW([weight], training, {}, num_steps=4)
    for _ in range(4):
        weight.grad = torch.ones(1)
        adamw.step()
    assert weight.item() == pytest.approx(-1e-2 * moved, rel=1e-4)


@pytest.mark.parametrize(
    "budget",
    [
        {"local_epochs": 3},
        {"local_epochs": 3, "gradient_accumulation_steps": 2},
        {"local_steps": 2},
        {"local_steps": 9},
    ],
)
def test_the_learning_rate_falls_over_as_many_steps_as_there_are(budget: dict[str, int]) -> None:
    training = TrainingConfig.model_validate({"batch_size": 2, **budget})
    steps = [*steps_of([3, 1, 2, 5, 4], training, rng())]
    assert len(steps) == num_steps(5, training)


def test_a_round_of_one_step_is_no_warm_up(model: LanguageModel) -> None:
    adapter = trained(model, local_epochs=1, local_steps=1, lr_scheduler_type="cosine", warmup_ratio=0.1)
    assert any(value.any() for key, value in adapter.items() if "lora_B" in key)


def test_training_learns_what_it_is_shown(model: LanguageModel) -> None:
    """A random model can only learn which tokens are frequent in the responses; those it was not shown get rarer."""
    adapter = trained(model, local_epochs=30)
    other = [Pair("what is it?", "zzz qqq")]
    for pairs, falls in ((PAIRS, True), (other, False)):
        fresh = model.negative_log_likelihood(model.fresh_adapter(), pairs, 4)
        learnt = model.negative_log_likelihood(adapter, pairs, 4)
        assert (learnt.nll_sum < fresh.nll_sum) == falls


def test_a_pair_of_weight_zero_is_not_learnt(model: LanguageModel) -> None:
    ignored = Pair("spell six six", "s i x s i x", weight=0.0)
    settings = TrainingConfig(learning_rate=1e-2, batch_size=4, local_epochs=1)
    with_it, without = model.fresh_adapter(), model.fresh_adapter()
    model.fine_tune(with_it, [*PAIRS, ignored], settings, rng())
    model.fine_tune(without, PAIRS, settings, rng())
    for key in with_it:
        torch.testing.assert_close(with_it[key], without[key], rtol=1e-3, atol=1e-5)


def test_calls_are_pure_functions_of_adapter_and_generator(model: LanguageModel) -> None:
    first, second = trained(model), trained(model)
    assert all(torch.equal(first[key], second[key]) for key in first)
    sampled = GenerationConfig(max_new_tokens=8, temperature=1.0)
    prompts = [pair.prompt for pair in PAIRS]
    assert model.generate(first, prompts, sampled, rng(1)) == model.generate(second, prompts, sampled, rng(1))
    assert model.generate(first, prompts, sampled, rng(1)) != model.generate(first, prompts, sampled, rng(2))


def test_global_random_state_is_left_alone(model: LanguageModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trained(model)
    assert torch.equal(torch.rand(3), expected)


def test_optimizer_state_carries_over(model: LanguageModel) -> None:
    keep = TrainingConfig(learning_rate=1e-2, batch_size=3, local_steps=2, keep_optimizer=True)
    adapter = model.fresh_adapter()
    first = model.fine_tune(adapter, PAIRS, keep, rng())
    carried = {key: value.clone() for key, value in adapter.items()}
    model.fine_tune(carried, PAIRS, keep, rng(1), first.optimizer)
    model.fine_tune(adapter, PAIRS, keep, rng(1))
    assert any(not torch.equal(carried[key], adapter[key]) for key in adapter)
    assert any(key.endswith("exp_avg_sq") for key in first.optimizer)


def test_plain_peft_loads_an_exported_adapter(model: LanguageModel, tmp_path: Path) -> None:
    adapter = trained(model)
    model.export_adapter(adapter, tmp_path)
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 20]])
    model.load_adapter(adapter)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, model.model(input_ids=ids).logits)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2"])
def test_other_architectures_train_and_answer(tmp_path: Path, architecture: str) -> None:
    model = load(write_model(tmp_path / "m", architecture))
    fresh = model.negative_log_likelihood(model.fresh_adapter(), PAIRS, 4)
    learnt = model.negative_log_likelihood(trained(model, local_epochs=20), PAIRS, 4)
    answers, tokens = model.generate(model.fresh_adapter(), [PAIRS[0].prompt], GREEDY, rng())
    assert learnt.nll_sum < fresh.nll_sum
    assert len(answers) == 1
    assert 1 <= tokens <= 8


def test_attention_is_computed_as_the_setting_says(model: LanguageModel, tiny_llama: Path) -> None:
    assert model.model.config._attn_implementation == "sdpa"
    eager = load(tiny_llama, attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"
    expected = model.negative_log_likelihood(model.fresh_adapter(), PAIRS, 4)
    assert eager.negative_log_likelihood(eager.fresh_adapter(), PAIRS, 4).nll_sum == pytest.approx(expected.nll_sum)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("lacks", ["flash_attention_2", pytest.param("flex_attention", marks=pytest.mark.long)])
def test_attention_that_does_not_work_here_is_named_with_its_setting(lacks: str, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=rf"^[^\n]* with model\.attn_implementation {lacks}: [^\n]*$"):
        load(tiny_llama, attn_implementation=lacks)


def test_long_examples_are_cut_and_keep_their_response(tiny_llama: Path) -> None:
    model = load(tiny_llama, max_length=16)
    long = Pair("add one and two " * 20, "it is 3")
    score = model.negative_log_likelihood(model.fresh_adapter(), [long], 1)
    assert score.processed_tokens == 16
    assert 1 <= score.num_tokens[0] <= 8


def write_model_with_bos(folder: Path) -> Path:
    """Like Gemma: no chat template, and every text begins with token 1."""
    write_model(folder, "gemma3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def ids_generated_from(model: LanguageModel, prompt: str) -> list[int]:
    """What the model is given to answer `prompt`."""
    given: list[torch.Tensor] = []
    hook = model.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model.generate(model.fresh_adapter(), [prompt], GREEDY, rng())
    hook.remove()
    return [int(token) for token in given[0][0]]


def test_a_cut_prompt_keeps_the_token_that_begins_every_text(tmp_path: Path) -> None:
    model = load(write_model_with_bos(tmp_path), max_length=16)
    prompt = "add one and two " * 20
    plain = model.tokenizer(f"Question: {prompt}\nAnswer:", add_special_tokens=False)["input_ids"]
    response = [*model.tokenizer(" it is 3", add_special_tokens=False)["input_ids"], model.tokenizer.eos_token_id]
    assert load(tmp_path, max_length=400).chat.prompt_ids(prompt) == [1, *plain]
    room = 16 - len(response) - 1
    text = model.chat.encode(prompt, "it is 3")
    assert (text.ids, text.learnt) == ([1, *plain[-room:], *response], ((1 + room, 16),))
    assert ids_generated_from(model, prompt) == [1, *plain[-15:]]


def test_a_cut_prompt_without_such_a_token_is_its_end(tmp_path: Path) -> None:
    model = load(write_model(tmp_path, "gemma3"), max_length=16)
    prompt = "add one and two " * 20
    plain = model.tokenizer(f"Question: {prompt}\nAnswer:")["input_ids"]
    response = [*model.tokenizer(" it is 3")["input_ids"], model.tokenizer.eos_token_id]
    room = 16 - len(response)
    text = model.chat.encode(prompt, "it is 3")
    assert (text.ids, text.learnt) == ([*plain[-room:], *response], ((room, 16),))
    assert ids_generated_from(model, prompt) == plain[-16:]


def test_a_prompt_that_fits_to_the_last_token_is_left_as_it_is(tmp_path: Path) -> None:
    chat = load(write_model_with_bos(tmp_path)).chat
    assert chat._shortened_prompt([1, 7, 8, 9], 4) == [1, 7, 8, 9]
    assert chat._shortened_prompt([1, 7, 8, 9], 3) == [1, 8, 9]
    assert chat._shortened_prompt([1, 7, 8, 9], 1) == [1]
    assert chat._shortened_prompt([7, 8, 9, 1], 3) == [8, 9, 1]


def test_losses_a_few_rows_at_a_time_have_the_bits_of_all_at_once(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained_and_scored() -> tuple[dict[str, torch.Tensor], tuple[float, ...]]:
        adapter = trained(model, local_epochs=2)
        return adapter, model.negative_log_likelihood(adapter, PAIRS, 4).nll

    results = []
    for rows in (3, 1000):
        monkeypatch.setattr(language_model, "LOSS_ROWS", rows)
        results.append(trained_and_scored())
    (few, few_nll), (whole, whole_nll) = results
    assert few_nll == whole_nll
    assert all(torch.equal(few[key], whole[key]) for key in few)


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"^cannot load model [^\n]*$"):
        load(tmp_path)
    with pytest.raises(ModelError, match=r"model\.lora\.target_modules"):
        load(tiny_llama, lora=LoraConfig(target_modules=("nowhere",)))


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        (("model.layers.1.mlp.up_proj.weight",), "hold no model.layers.1.mlp.up_proj.weight, which a LlamaForCausalLM"),
        (("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"), "hold no lm_head.weight and 2 others, "),
    ],
)
def test_weights_that_are_missing_are_not_made_up(lost: tuple[str, ...], says: str, tmp_path: Path) -> None:
    file = write_model(tmp_path, "llama") / "model.safetensors"
    weights = {**load_file(file), "of_no_use": torch.zeros(2)}
    save_file(weights, file, metadata={"format": "pt"})
    load(tmp_path)
    save_file({key: value for key, value in weights.items() if key not in lost}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert f"cannot load model {tmp_path}: its files {says}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_output_embedding_that_is_tied_is_not_missing(tmp_path: Path) -> None:
    file = write_model(tmp_path, "llama", tie_word_embeddings=True) / "model.safetensors"
    assert "lm_head.weight" not in load_file(file)
    load(tmp_path)


# Conversations --------------------------------------------------------------------------------------------------------

def chatml() -> PreTrainedTokenizerFast:
    return train_tokenizer(("<pad>", "<|im_start|>", "<|im_end|>"), eos="<|im_end|>", template=CHATML)


TURNS = (Turn("user", "add one"), Turn("assistant", "it is 2"), Turn("user", "add one and two"))


def test_the_loss_of_a_conversation_is_over_all_its_answers_and_nothing_else(tmp_path: Path) -> None:
    model = load(write_model(tmp_path, tokenizer=chatml()), max_length=200)
    begin, end = "<|im_start|>", "<|im_end|>"
    pieces = [
        (f"{begin}user\nadd one{end}\n{begin}assistant\n", False),
        (f"it is 2{end}", True),
        (f"\n{begin}user\nadd one and two{end}\n{begin}assistant\n", False),
        (f"it is 3{end}", True),
    ]
    tokens = [(token, learnt) for piece, learnt in pieces for token in model.tokenizer(piece)["input_ids"]]
    ids = torch.tensor([[token for token, _ in tokens]])
    assert ids[0].tolist() == model.tokenizer("".join(piece for piece, _ in pieces))["input_ids"]
    labels = torch.tensor([[token if learnt else -100 for token, learnt in tokens]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    score = model.negative_log_likelihood(model.fresh_adapter(), [Pair(TURNS, "it is 3")], 1)
    assert score.num_tokens == (int((labels >= 0).sum()),)
    assert score.num_bytes == (len("it is 2it is 3"),)
    assert score.processed_tokens == len(tokens)
    loss = plain(input_ids=ids, labels=labels).loss.detach()
    assert score.nll_sum / score.num_tokens[0] == pytest.approx(float(loss), rel=1e-5)


def test_where_no_text_holds_all_answers_each_is_scored_by_itself(tmp_path: Path) -> None:
    model = load(write_model(tmp_path, "gemma3"), max_length=200)
    assert model.tokenizer.chat_template is None
    adapter, asked = model.fresh_adapter(), "add one and two"
    behind = Pair(f"add one\nAnswer: it is 2\n\nQuestion: {asked}", "it is 3")  # as base models read a conversation
    each = model.negative_log_likelihood(adapter, [Pair("add one", "it is 2"), behind], 2)
    whole = model.negative_log_likelihood(adapter, [Pair(TURNS, "it is 3")], 2)
    assert whole.nll == pytest.approx((each.nll_sum,), rel=1e-5)
    assert whole[1:] == ((sum(each.num_tokens),), (sum(each.num_bytes),), each.processed_tokens)


def test_a_conversation_is_trained_on_and_answered(tmp_path: Path) -> None:
    model = load(write_model(tmp_path, tokenizer=chatml()), max_length=200)
    adapter = model.fresh_adapter()
    before = model.negative_log_likelihood(adapter, [Pair(TURNS, "it is 3")], 1)
    training = TrainingConfig(learning_rate=2e-2, local_steps=20, batch_size=1)
    result = model.fine_tune(adapter, [Pair(TURNS, "it is 3")], training, rng())
    assert model.negative_log_likelihood(adapter, [Pair(TURNS, "it is 3")], 1).nll_sum < 0.95 * before.nll_sum
    assert result.tokens == 20 * before.processed_tokens
    assert model.generate(adapter, [TURNS], GenerationConfig(temperature=0.0), rng())[0] == ["it is 3"]
