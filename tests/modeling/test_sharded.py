"""A model divided between two gloo ranks against the same model whole."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from semcons_ray.errors import ConfigError
from semcons_ray.modeling import sharded
from semcons_ray.modeling.language_model import LanguageModel
from tests.modeling.ranks import CASES, PAIRS, SETTINGS, STEPS, measure

Measured = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(tiny_llama: Path, folder: Path) -> list[dict[str, Measured]]:
    """What each of two ranks measured, by case."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install --no-deps -r requirements-deepspeed.lock")
    command = [sys.executable, "-m", "tests.modeling.ranks"]
    here = {**os.environ, "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(tiny_llama), str(folder)],
            env=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            said, _ = process.communicate(timeout=400)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, folder: Path) -> Callable[[str], Measured]:
    model, done = LanguageModel(str(tiny_llama), **SETTINGS), {}

    def get(case: str) -> Measured:
        if case not in done:
            done[case] = measure(model, case, folder / f"whole {case}")
        return done[case]

    return get


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
class TestRanks:
    def test_losses_are_those_of_the_whole_model_at_every_step(
        self, ranks: list[dict[str, Measured]], whole: Callable[[str], Measured], case: str
    ) -> None:
        expected = whole(case)
        for rank in ranks:
            assert len(rank[case]["losses"]) == STEPS
            assert rank[case]["losses"] == pytest.approx(expected["losses"], abs=1e-4)
            assert rank[case]["loss"] == pytest.approx(expected["loss"], abs=1e-4)
            assert rank[case]["tokens"] == expected["tokens"]

    def test_so_is_the_adapter(
        self, ranks: list[dict[str, Measured]], whole: Callable[[str], Measured], case: str
    ) -> None:
        for key, value in whole(case)["adapter"].items():
            torch.testing.assert_close(ranks[0][case]["adapter"][key], value, atol=1e-4, rtol=1e-3)
            assert torch.equal(ranks[0][case]["adapter"][key], ranks[1][case]["adapter"][key])

    def test_so_are_scores_and_greedy_answers(
        self, ranks: list[dict[str, Measured]], whole: Callable[[str], Measured], case: str
    ) -> None:
        expected = whole(case)
        for rank in ranks:
            assert rank[case]["nll"][0] == pytest.approx(expected["nll"][0], rel=1e-5)
            assert rank[case]["nll"][1:] == expected["nll"][1:]
            assert rank[case]["answers"] == expected["answers"]
        assert ranks[0][case]["drawn"] == ranks[1][case]["drawn"]

    def test_a_rank_holds_half_of_the_base_with_zero_3_before_and_after_work(
        self, ranks: list[dict[str, Measured]], whole: Callable[[str], Measured], case: str, tiny_llama: Path
    ) -> None:
        model = LanguageModel(str(tiny_llama), **SETTINGS).model
        base = sum(value.numel() for value in model.parameters() if not value.requires_grad)
        share = 2 if CASES[case]["zero_stage"] == 3 else 1
        for rank in ranks:
            assert rank[case]["held"] == [math.ceil(base / share)] * 2


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in CASES if "algorithms" not in case])  # which score with two adapters
def test_the_adapter_loads_in_plain_peft_and_scores_what_was_measured(
    ranks: list[dict[str, Measured]], case: str, folder: Path, tiny_llama: Path
) -> None:
    plain = LanguageModel(str(tiny_llama), **SETTINGS)
    plain.model = PeftModel.from_pretrained(plain.model.unload(), folder / case).eval()
    plain._parameters = {}
    score = plain.negative_log_likelihood({}, PAIRS, 6)
    assert score.num_tokens == ranks[0][case]["nll"][1]
    assert score.nll == pytest.approx(ranks[0][case]["nll"][0], rel=1e-5)


def test_without_deepspeed_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"^sharding\.models needs DeepSpeed.*pip install --no-deps -r requirements-"):
        sharded.import_deepspeed()
