"""A real model behind a real server, with faults between."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from semcons_ray.config import JudgeConfig
from semcons_ray.endpoints.api_model import ApiModel, ApiOptions
from semcons_ray.endpoints.judge import Judge
from semcons_ray.messages import Turn
from semcons_ray.modeling.client_model import Pair, Task
from tests.endpoints import proxy
from tests.endpoints.conftest import KEY, VARIABLE
from tests.endpoints.proxy import Proxy
from tests.endpoints.server import serving

pytestmark = [pytest.mark.served, pytest.mark.slow, pytest.mark.real]

PAIRS = [
    Pair("What is the capital of France?", "PARIS!"),
    Pair("What is the capital of Italy?", "ROME!"),
    Pair("How many legs has a dog?", "four legs"),
]
PROMPTS = [
    "What is the capital of Spain?",
    (Turn("user", "What is the capital of Spain?"), Turn("assistant", "MADRID!"), Turn("user", "And of Portugal?")),
]


def client(url: str, name: str, folder: Path, **options) -> ApiModel:
    values = {"model": name, "base_url": url, "api_key_env": VARIABLE, "max_concurrency": 1} | options
    return ApiModel(
        ApiOptions(**values), name="closed", client_id=0, embedding_model="packaged:all-minilm-l6-v2", folder=folder,
        system_prompt="",
    )  # fmt: skip


def answers(model: ApiModel) -> tuple[list[str], Task]:
    task = Task(1, "answer", np.random.default_rng(np.random.SeedSequence([1, 1])), temperature=0.0, max_new_tokens=12)
    (texts,) = model.answer(PROMPTS, task)
    model.close()
    return texts, task


def test_a_real_model_learns_in_context_through_faults_and_answers_once(
    real_server: tuple[str, str], tmp_path: Path, make_proxy: Callable[..., Proxy]
) -> None:
    url, name = real_server
    plain, _ = answers(client(url, name, tmp_path / "plain", k=0))
    faults = {1: proxy.status(503, retry_after_ms="10"), 3: proxy.cut, 5: proxy.reset}
    between = make_proxy(url, faults)
    model = client(between.url, name, tmp_path / "taught", k=2)
    model.learn(PAIRS, Task(1, "learn", np.random.default_rng(0)))
    taught, told = answers(model)
    assert all(plain)
    assert all(taught)
    assert taught != plain  # examples before a question change what the model says
    assert told.tokens > 2 * 12
    assert sorted(between.seen.values()) == [2, 2]
    again = client(between.url, name, tmp_path / "taught", k=2)
    again.restore(model.state())
    assert answers(again)[0] == taught
    assert between.number == 4
    assert between.keys == {f"Bearer {KEY}"}
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_real_model_judges(real_server: tuple[str, str], tmp_path: Path) -> None:
    url, name = real_server
    judge = Judge(JudgeConfig(model=name, base_url=url, max_tokens=8), tmp_path, "here")
    opinions = judge.compare(1, ["What is the capital of France?"], ["Paris"], ["It is a river."])
    (row,) = judge.take_rows()
    judge.close()
    assert len(opinions) == 1
    assert row.tokens > 0


@pytest.fixture
def make_proxy():
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda url, faults: stack.enter_context(serving(Proxy(url, faults)))
