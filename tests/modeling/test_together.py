"""Clients that train together learn what each would in turn, whatever their settings, and whatever befalls another."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from semcons_ray.config import GenerationConfig as GenerationSettings
from semcons_ray.config import ModelConfig, TrainingConfig
from semcons_ray.errors import ModelError
from semcons_ray.federation.weights import with_rank
from semcons_ray.modeling.client_model import Targets
from semcons_ray.modeling.fit import check_model
from semcons_ray.modeling.fused import fuse
from semcons_ray.modeling.language_model import FineTuned, LanguageModel, Lesson, Pair, Parameters
from tests.modeling.test_gradients import faint, load
from tests.tiny import examples, write_model

TOGETHER = TrainingConfig(train_together=2)
ROWS = examples()[:420:7]
Steps = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


def drawn(model: LanguageModel, seed: int, rank: int = 4) -> dict[str, Tensor]:
    """An adapter of random numbers, so that all gradients are far from 0."""
    random = np.random.default_rng(seed)
    adapter = with_rank(model.fresh_adapter(), rank)
    return {
        key: torch.from_numpy(0.2 * random.standard_normal(value.shape, dtype=np.float32))
        for key, value in adapter.items()
    }


def lesson(model: LanguageModel, client: int, *, rank: int = 4, **settings: Any) -> tuple[Lesson, Steps]:
    """What a client learns: `client` + 5 examples; and the gradients of its steps, once it has."""
    steps: Steps = []

    def keep(parameters: Parameters) -> None:
        steps.append({key: value.grad.clone() for key, value in parameters.items() if value.grad is not None})

    pairs = [
        Pair(row["prompt"], row["response"], 0.5 + i % 3) for i, row in enumerate(ROWS[7 * client :][: client + 5])
    ]
    training = TrainingConfig.model_validate({"learning_rate": 1e-3, "keep_optimizer": True, **settings})
    own = Lesson(drawn(model, client, rank), pairs, training, np.random.default_rng(client), adjust=keep)
    return own, steps


def assert_same(one: tuple[Lesson, Steps, FineTuned], other: tuple[Lesson, Steps, FineTuned]) -> None:
    """Gradients, losses, adapters and optimizers agree, and the random streams are at the same place."""
    assert one[2].tokens == other[2].tokens
    assert one[2].loss == pytest.approx(other[2].loss, rel=1e-5)
    assert len(one[1]) == len(other[1]) > 0
    for mine, theirs in zip(one[1], other[1], strict=True):
        for key in theirs:
            assert (mine[key] - theirs[key]).norm() < 1e-4 * theirs[key].norm(), key
    assert one[2].optimizer.keys() == other[2].optimizer.keys() != set()
    for key, value in other[0].adapter.items():
        assert (one[0].adapter[key] - value).norm() < 1e-4 * value.norm(), key
    assert one[0].generator.random() == other[0].generator.random()


# Four clients of 5 to 8 examples: other steps, batches, ranks, schedules and what is beside the base.
DIFFERENT: list[dict[str, Any]] = [
    {"batch_size": 1, "lr_scheduler_type": "linear"},
    {"batch_size": 2, "gradient_accumulation_steps": 2, "rank": 2},
    {"batch_size": 8, "local_steps": 5},
    {"batch_size": 3, "local_epochs": 2, "max_grad_norm": 0.01},
]


@pytest.mark.parametrize("common", [{}, {"packing": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_together_each_client_learns_what_it_would_in_turn(
    architecture: str, common: dict[str, Any], tmp_path: Path
) -> None:
    of_gpt2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if architecture == "gpt2" else {}
    model = load(write_model(tmp_path, architecture, **of_gpt2))
    groups = [[lesson(model, client, **own, **common) for client, own in enumerate(DIFFERENT)] for _ in range(2)]
    for (first, *_), (third, *_) in (group[0::2] for group in groups):
        first.frozen, third.frozen = drawn(model, 8), drawn(model, 9, rank=6)
    turns, group = groups
    in_turn = [model.fine_tune_together([one])[0] for one, _ in turns]
    together = model.fine_tune_together([one for one, _ in group])
    assert len({len(steps) for _, steps in group}) > 1  # each ends when it is done
    for mine, theirs, learnt, expected in zip(group, turns, together, in_turn, strict=True):
        assert_same((*mine, learnt), (*theirs, expected))
    again, _ = lesson(model, 1, **DIFFERENT[1], **common)
    repeated = model.fine_tune_together([again])[0]  # the model is as it was, to the bit
    assert repeated.loss == in_turn[1].loss
    assert all(torch.equal(again.adapter[key], value) for key, value in turns[1][0].adapter.items())


def test_one_lesson_has_the_bits_of_fine_tune(model: LanguageModel) -> None:
    one, _ = lesson(model, 3)
    adapter = drawn(model, 3)
    learnt = model.fine_tune_together([one])[0]
    expected = model.fine_tune(adapter, one.pairs, one.training, np.random.default_rng(3))
    assert (learnt.loss, learnt.tokens) == (expected.loss, expected.tokens)
    assert all(torch.equal(one.adapter[key], value) for key, value in adapter.items())


def test_targets_of_one_client_are_no_matter_to_another(model: LanguageModel) -> None:
    groups = []
    for _ in range(2):
        first, second = lesson(model, 1), lesson(model, 2)
        answer = model.response_ids(first[0].pairs[0].prompt, first[0].pairs[0].response)
        soft = Targets(answer, torch.tensor([[token, 9] for token in answer]), torch.tensor([[0.7, 0.3]] * len(answer)))
        first[0].pairs = [*first[0].pairs, Pair(first[0].pairs[0].prompt, "", 2.0, soft)]
        groups.append([first, second])
    turns, group = groups
    in_turn = [model.fine_tune_together([one])[0] for one, _ in turns]
    for mine, theirs, learnt, expected in zip(
        group, turns, model.fine_tune_together([one for one, _ in group]), in_turn, strict=True
    ):
        assert_same((*mine, learnt), (*theirs, expected))


def test_what_is_not_finite_stays_with_its_client(model: LanguageModel) -> None:
    results = []
    for spoilt in (False, True):
        group = [lesson(model, client, batch_size=2)[0] for client in range(3)]
        if spoilt:
            next(iter(group[1].adapter.values()))[0, 0] = float("nan")
        results.append((group, model.fine_tune_together(group)))
    (whole, expected), (spoilt_too, found) = results
    assert np.isnan(found[1].loss)
    for client in (0, 2):
        assert found[client].loss == expected[client].loss
        assert all(torch.equal(spoilt_too[client].adapter[key], value) for key, value in whole[client].adapter.items())


def test_a_loss_scale_that_overflows_is_halved_for_its_client_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client's scales are those that it has alone, and they are not the same."""
    model = load(faint(tmp_path, 2.0**7), dtype="float16")
    seen: dict[int, list[float]] = {}
    accumulate = LanguageModel._accumulate

    def spy(self: LanguageModel, learners: Any, *more: Any) -> list[Tensor]:
        for learner in learners:
            seen.setdefault(len(learner.lesson.pairs), []).append(learner.scale.factor)
        return accumulate(self, learners, *more)

    monkeypatch.setattr(LanguageModel, "_accumulate", spy)

    def lessons() -> list[Lesson]:
        heavy, light = (lesson(model, client, local_steps=3)[0] for client in (1, 2))
        light.adapter = model.fresh_adapter()
        return [heavy, light]

    in_turn = [model.fine_tune_together([one])[0].loss for one in lessons()]
    alone = dict(seen)
    seen.clear()
    together = [one.loss for one in model.fine_tune_together(lessons())]
    assert seen == alone
    assert len({*map(tuple, alone.values())}) == 2
    assert together == pytest.approx(in_turn, rel=1e-2)


def test_rows_that_do_not_fit_into_memory_are_halved_for_all(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"batch_size": 4, "auto_find_batch_size": True}
    expected = model.fine_tune_together([lesson(model, client, **settings)[0] for client in range(2)])
    rows: list[int] = []
    forward = model.model.forward

    def small(**inputs: Tensor) -> object:
        rows.append(len(inputs["input_ids"]))
        if rows[-1] > 4:
            raise torch.OutOfMemoryError("out of memory")
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", small)
    monkeypatch.setattr(model, "_fits", model._fits)
    found = model.fine_tune_together([lesson(model, client, **settings)[0] for client in range(2)])
    assert len([size for size in rows if size > 4]) == 1
    assert [one.loss for one in found] == pytest.approx([one.loss for one in expected], rel=1e-5)
    monkeypatch.setattr(model, "_fits", 8)
    with pytest.raises(ModelError, match=r"at training\.batch_size 4 of 2 clients .*: lower training\.train_together;"):
        model.fine_tune_together([lesson(model, client, batch_size=4)[0] for client in range(2)])


def test_a_model_whose_layers_do_not_read_whole_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, targets = write_model(tmp_path, "llama"), ["q_proj", "lm_head"]
    load(folder, target_modules=targets)
    says = (
        rf"^training\.train_together does not fit {folder}: .*lm_head reads \d+ vectors where the batch has \d+ tokens$"
    )
    with pytest.raises(ModelError, match=says):
        load(folder, target_modules=targets, trainings=[TOGETHER])
    load(folder, trainings=[TOGETHER])

    def mixed_up(plain: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        return (plain + x.flip(0) @ down.T @ up.T).to(plain.dtype)

    monkeypatch.setattr("semcons_ray.modeling.by_row._added", mixed_up)
    with pytest.raises(ModelError, match="who is beside a client changes its gradients"):
        load(folder, trainings=[TOGETHER])


def test_a_model_that_drops_out_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    for config, says in (({}, r"has resid_pdrop 0\.1, "), ({"resid_pdrop": 0.0, "embd_pdrop": 0.0}, "has attn_pdrop")):
        folder = write_model(tmp_path / str(len(config)), "gpt2", n_positions=256, **config)
        settings = ModelConfig(name=str(folder), dtype="float32", max_length=64)
        check_model(folder, settings, [TrainingConfig()], [GenerationSettings()], ["a"])
        with pytest.raises(
            ModelError, match=rf"^training\.train_together does not fit {folder}: its config\.json {says}"
        ):
            check_model(folder, settings, [TOGETHER], [GenerationSettings()], ["a"])
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    folder = write_model(tmp_path / "none", "gpt2", n_positions=256, **none)
    check_model(
        folder, ModelConfig(name=str(folder), dtype="float32", max_length=64), [TOGETHER], [GenerationSettings()], ["a"]
    )


def test_fused_layers_are_themselves_again(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    fuse(model.model)
    before = model.fine_tune_together([lesson(model, 1)[0]])[0].loss
    group = [lesson(model, client) for client in (1, 2)]
    learnt = model.fine_tune_together([one for one, _ in group])
    assert learnt[0].loss == pytest.approx(before, rel=1e-5)
    assert model.fine_tune_together([lesson(model, 1)[0]])[0].loss == before
    assert any("forward" in layer.__dict__ for layer in model.model.modules())
