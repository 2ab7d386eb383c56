import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from semcons_ray.config import parse_yaml, validate_config
from semcons_ray.endpoints import api_model
from semcons_ray.endpoints.api_model import ApiModel
from semcons_ray.errors import ClientError, ConfigError
from semcons_ray.messages import Turn
from semcons_ray.modeling.client_model import Pair, Task
from semcons_ray.parts import build
from semcons_ray.runs.assembly import judge_of, kinds_of
from tests.endpoints import proxy
from tests.endpoints.conftest import KEY, VARIABLE
from tests.endpoints.server import MODEL, Server, completion, serving


def task(purpose: str = "answer", round: int = 1, **others) -> Task:
    return Task(round, purpose, np.random.default_rng(np.random.SeedSequence([1, round])), **others)


@pytest.fixture
def client(server: Server, tmp_path: Path, monkeypatch) -> Iterator:
    """Makes a client; its embedder puts texts in a row by the number in them."""

    class Embedder:
        def embed(self, texts):
            angles = torch.tensor([float("".join(filter(str.isdecimal, text)) or 0) for text in texts]) / 100
            return torch.stack([angles.cos(), angles.sin()], dim=1)

    monkeypatch.setattr(api_model, "_embedder", lambda name: Embedder())
    made: list[ApiModel] = []

    def make(url: str = server.url, client_id: int = 0, system_prompt: str = "", **options) -> ApiModel:
        values = {"model": MODEL, "base_url": url, "api_key_env": VARIABLE, "timeout_seconds": 5} | options
        offered = {"name": "closed", "client_id": client_id, "embedding_model": "m", "seed": 0,
                   "folder": tmp_path / f"client_{client_id:03d}", "system_prompt": system_prompt}  # fmt: skip
        path, setting = "semcons_ray.endpoints.api_model:ApiModel", "clients.models.closed.options"
        made.append(build("client", path, values, setting=setting, offered=offered))
        return made[-1]

    yield make
    for one in made:
        one.close()


PAIRS = [Pair(f"how far is {n}?", f"{n} miles") for n in (10, 50, 20, 90)]


def spoken(body) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def shown(server: Server) -> list[str]:
    """What the assistant said in the last request."""
    return [content for role, content in spoken(server.asked[-1]) if role == "assistant"]


def test_the_nearest_examples_go_before_a_question_the_nearest_last(server: Server, client) -> None:
    model = client(k=2, system_prompt="Be brief.")
    model.learn(PAIRS, task("learn"))
    assert model.answer(["how far is 22?"], task()) == [["how far is 22? (6)"]]
    assert spoken(server.asked[0]) == [
        ("system", "Be brief."),
        ("user", "how far is 10?"), ("assistant", "10 miles"),
        ("user", "how far is 20?"), ("assistant", "20 miles"),
        ("user", "how far is 22?"),
    ]  # fmt: skip


def test_what_it_has_learnt_is_its_state(server: Server, client) -> None:
    model = client(k=1)
    model.learn(PAIRS, task("learn"))
    again = client(k=1)
    again.restore(model.state())
    again.answer(["how far is 88?"], task())
    assert shown(server) == ["90 miles"]
    again.learn([Pair("how far is 87?", "87 miles")], task("learn"))
    again.answer(["how far is 88?"], task(round=2))
    assert shown(server) == ["87 miles"]
    again.restore({})
    again.answer(["how far is 88?"], task(round=3))
    assert shown(server) == []


def test_without_examples_nothing_is_embedded(server: Server, client, monkeypatch) -> None:
    monkeypatch.delattr(api_model, "_embedder")
    model = client(k=0)
    model.learn(PAIRS, task("learn"))
    assert model.answer(["how far is 1?"], task()) == [["how far is 1? (1)"]]


def test_the_farthest_examples_are_left_out_until_the_conversation_fits(server: Server, client) -> None:
    # Each example takes 4 + 2 tokens, the question 4.
    for room, expected in ((16, ["10 miles", "20 miles"]), (15, ["20 miles"]), (9, [])):
        model = client(k=3, context_tokens=room)
        model.learn(PAIRS, task("learn"))
        model.answer(["how far is 22?"], task(round=room))
        assert shown(server) == expected


def test_conversations_are_asked_and_shown_turn_by_turn(server: Server, client) -> None:
    talk = (Turn("system", "Count."), Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"))
    model = client(k=1, system_prompt="Be brief.")
    model.learn([Pair(talk, "four")], task("learn"))
    model.answer([(Turn("system", "Spell."), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))], task())
    assert spoken(server.asked[0]) == [
        ("system", "Spell."),
        ("user", "Count.\n\none"), ("assistant", "two"), ("user", "three"), ("assistant", "four"),
        ("user", "a"), ("assistant", "b"), ("user", "c"),
    ]  # fmt: skip


def test_every_sample_has_a_seed_of_its_own_which_is_the_same_when_it_is_asked_again(server: Server, client) -> None:
    answered = client(k=0).answer(["a", "b"], task(num_samples=3, temperature=0.7))
    assert answered == [["a (1)", "b (1)"]] * 3
    seeds = {body["seed"] for body in server.asked}
    assert len(seeds) == 6
    client(k=0, client_id=1).answer(["a", "b"], task(num_samples=3, temperature=0.7))
    assert {body["seed"] for body in server.asked[6:]} == seeds  # of the task's generator, which is the same here


def test_tokens_and_money_are_told_also_of_answers_that_were_kept(server: Server, client) -> None:
    prices = {"usd_per_million_input_tokens": 1.0, "usd_per_million_output_tokens": 2.0}
    for _ in range(2):
        told = task()
        client(k=0, **prices).answer(["a", "b"], told)
        assert (told.tokens, told.cost_usd) == (30, pytest.approx(40e-6))
    assert len(server.asked) == 2


def test_a_missing_answer_is_an_empty_text_and_a_client_without_answers_is_lost(proxied, client) -> None:
    hurt = client(proxied({1: proxy.REFUSED}).url, k=0, max_concurrency=1)
    assert hurt.answer(["a", "b"], task()) == [["", "b (1)"]]
    lost = client(proxied(lambda *_: proxy.status(500)).url, k=0, max_retries=0)
    with pytest.raises(ClientError, match=r"client 0, round 2, answer: none of 2 .*clients\.models\.closed\.options"):
        lost.answer(["a", "b"], task(round=2))


def test_a_client_whose_cap_is_reached_is_not_lost(client) -> None:
    capped, told = client(k=0, max_requests=1, max_concurrency=1), task()
    assert capped.answer(["a", "b"], told) == [["a (1)", ""]]
    assert told.note == "clients.models.closed.options.max_requests 1 is reached"
    assert capped.answer(["a", "b"], task(round=2)) == [["", ""]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": -1}, r"options\.k: Input should be greater than or equal to 0 \(got -1\)"),
        ({"api_key": KEY}, r"has no option api_key"),
        ({"api_key_env": KEY}, r"options\.api_key_env: the name of an environment variable is expected"),
        ({"model": ""}, r"options\.model is missing"),
        ({"base_url": ""}, r"options\.base_url is missing"),
        ({"learning": "magic"}, r"options\.learning"),
        ({"max_usd": 1}, r"options: max_usd needs usd_per_million_input_tokens"),
    ],
)
def test_options_that_do_not_do_are_refused_by_their_keys(client, options, said) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        client(**options)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_settings_in_the_how_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    how_to = (Path(__file__).parents[2] / "docs" / "black_box.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml experiment\n(.*?)```", how_to, re.DOTALL)
    first, second = (validate_config(parse_yaml(block), where="docs") for block in blocks)
    (model,) = kinds_of(first, tmp_path).values()
    assert model.environment == ("OPENAI_API_KEY",)
    assert judge_of(second, tmp_path)


# Fine-tuning jobs, against the server of these tests: they have not been run against a provider's.


@pytest.fixture
def fast_polls(monkeypatch) -> None:
    monkeypatch.setattr(api_model, "FIRST_POLL_SECONDS", 0.01)


def test_a_provider_trains_and_its_model_answers_and_is_trained_further(server: Server, client, fast_polls) -> None:
    model = client(learning="fine_tuning", usd_per_million_training_tokens=3.0, system_prompt="Be brief.")
    told = task("learn")
    model.learn(PAIRS[:2], told)
    assert (told.tokens, told.cost_usd) == (1000, pytest.approx(3e-3))
    (upload,) = server.files
    lines = [json.loads(line) for line in upload.splitlines() if line.startswith(b"{")]
    assert lines[0] == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "how far is 10?"},
            {"role": "assistant", "content": "10 miles"},
        ]
    }
    again = client(learning="fine_tuning")
    again.restore(model.state())
    again.answer(["how far is 1?"], task())
    assert (server.asked[0]["model"], len(server.asked[0]["messages"])) == ("ft:small:ftjob-1", 1)
    again.learn(PAIRS, task("learn", round=2))
    assert server.jobs["ftjob-2"]["model"] == "ft:small:ftjob-1"


def test_a_resumed_run_starts_no_second_job(server: Server, client, fast_polls, monkeypatch) -> None:
    monkeypatch.setattr(api_model.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        client(learning="fine_tuning").learn(PAIRS, task("learn"))
    monkeypatch.undo()
    monkeypatch.setenv(VARIABLE, KEY)
    for _ in range(2):
        told = task("learn")
        model = client(learning="fine_tuning")
        model.learn(PAIRS, told)
        assert (list(server.jobs), told.tokens) == (["ftjob-1"], 1000)
    assert server.jobs["ftjob-1"]["polls"] == 2


@pytest.mark.parametrize(
    ("outcome", "options", "said"),
    [
        ({"status": "failed", "error": {"code": "x", "message": f"no {KEY}", "param": None}}, {},
         r"round 1, learn: the fine-tuning job ftjob-1 has failed: no \[key\]; see clients\.models\.closed\.options"),
        ({"status": "running"}, {"job_timeout_seconds": 0.05}, r"is still running; see .*job_timeout_seconds"),
        ({"status": "running"}, {"api_key_env": "SEMCONS_OTHER_KEY"}, r"refuses the key in SEMCONS_OTHER_KEY"),
    ],
)  # fmt: skip
def test_a_job_that_fails_or_takes_too_long_loses_the_client(
    server: Server, client, fast_polls, monkeypatch, outcome, options, said
) -> None:
    monkeypatch.setenv("SEMCONS_OTHER_KEY", "another-key")
    server.outcome = outcome
    with pytest.raises(ClientError, match=said):
        client(learning="fine_tuning", **options).learn(PAIRS, task("learn"))


# Kill -9 in the middle of a visit

VISIT = """
import sys, numpy as np
from pathlib import Path
from semcons_ray.endpoints.api_model import ApiModel, ApiOptions
from semcons_ray.modeling.client_model import Task
url, folder, variable = sys.argv[1:]
options = ApiOptions(model="small", base_url=url, api_key_env=variable, k=0, max_concurrency=2)
model = ApiModel(options, name="closed", client_id=0, embedding_model="", folder=Path(folder), system_prompt="")
task = Task(1, "answer", np.random.default_rng(np.random.SeedSequence([1, 1])))
print(model.answer([f"question {n}" for n in range(12)], task)[0])
"""


@pytest.mark.slow
def test_after_a_kill_what_was_kept_is_not_asked_again(server: Server, proxied, tmp_path: Path) -> None:
    answered = proxied(lambda number, _: proxy.silent if number > 6 else None)
    command = [sys.executable, "-c", VISIT]
    environment = {**os.environ, VARIABLE: KEY, "PYTHONPATH": str(Path(__file__).parents[2])}
    visit = subprocess.Popen([*command, answered.url, str(tmp_path), VARIABLE], env=environment)
    calls = tmp_path / "calls.jsonl"
    until = time.monotonic() + 60
    while (not calls.is_file() or calls.read_bytes().count(b"\n") < 6) and time.monotonic() < until:
        time.sleep(0.02)
    visit.send_signal(signal.SIGKILL)
    visit.wait()
    with calls.open("ab") as file:
        file.write(b'{"type":"call","key":"half')
    kept = {msgspec.json.decode(line)["answer"] for line in calls.read_bytes().splitlines()[:-1]}
    assert len(kept) == 6
    after = proxied({})
    done = subprocess.run(
        [*command, after.url, str(tmp_path), VARIABLE], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([f"question {n} (1)" for n in range(12)])
    asked = {json.loads(body)["messages"][0]["content"] for body in after.seen}
    assert asked == {f"question {n}" for n in range(12)} - {answer.removesuffix(" (1)") for answer in kept}
    assert set(after.seen.values()) == {1}
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in done.stderr


def test_a_server_that_says_little_is_understood(client) -> None:
    with serving(Server(lambda body: {"choices": [{"message": {"content": "yes"}}]}, key=KEY)) as terse:
        assert client(terse.url, k=0).answer(["a"], task()) == [["yes"]]
    with serving(Server(lambda body: completion("  "), key=KEY)) as blank, pytest.raises(ClientError, match="empty"):
        client(blank.url, k=0, client_id=1).answer(["a"], task())
