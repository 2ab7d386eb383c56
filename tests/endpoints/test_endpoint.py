import asyncio
import json
import logging
import threading
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from semcons_ray.config import EndpointConfig, JudgeConfig
from semcons_ray.endpoints.endpoint import Missing
from semcons_ray.endpoints.kept_calls import Call
from semcons_ray.errors import ClientError, ConfigError, RunFolderError, UnansweredError
from tests.endpoints import proxy
from tests.endpoints.conftest import KEY, VARIABLE, requests
from tests.endpoints.server import Server, completion, serving

AGAIN = {"retry_after_ms": "10"}
SETTING = "clients.models.closed.options"


def texts(results) -> list[str]:
    return [result.answer if isinstance(result, Call) else "" for result in results]


def answers(*missing: int, count: int = 4) -> list[str]:
    return ["" if number in missing else f"question {number} (1)" for number in range(count)]


def assert_no_key(folder: Path, *texts: str) -> None:
    """No file and no text has the key, nor its end."""
    found = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for text in (*found, *(text.encode() for text in texts)):
        assert KEY.encode() not in text
        assert KEY[-6:].encode() not in text


def test_answers_come_in_the_order_of_requests_and_what_they_took_is_counted(server: Server, endpoint) -> None:
    server.answer = lambda body: (time.sleep(0.03 if body["messages"][-1]["content"] == "question 0" else 0), "yes")[1]
    prices = {"usd_per_million_input_tokens": 2.0, "usd_per_million_output_tokens": 8.0}
    results = endpoint(server.url, **prices).ask(requests(3), "client 0")
    assert texts(results) == ["yes"] * 3
    assert [(one.input_tokens, one.output_tokens, one.finish) for one in results] == [(10, 5, "stop")] * 3
    assert [one.usd for one in results] == pytest.approx([60e-6] * 3)


def test_what_is_sent_is_what_was_asked_for(server: Server, endpoint) -> None:
    asked = requests(1, temperature=0.5, top_p=0.9, top_k=7, seed=3, stop=("end",))
    endpoint(server.url).ask(asked, "client 0")
    (body,) = server.asked
    assert body == {
        "model": "small", "messages": [{"role": "user", "content": "question 0"}], "max_tokens": 8,
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "stop": ["end"],
    }  # fmt: skip


def test_an_answer_ends_before_the_first_stop_even_if_the_endpoint_went_on(server: Server, endpoint) -> None:
    server.answer = lambda body: " one\nQ: two"
    assert texts(endpoint(server.url).ask(requests(1, stop=("Z", "Q:")), "client 0")) == ["one"]


# Each fault meets the second request once. Which of four answers is missing; how many requests went out.
FAULTS = {
    "429": (proxy.status(429, **AGAIN), False, 5),
    "500": (proxy.status(500, **AGAIN), False, 5),
    "502": (proxy.html(502), False, 5),
    "503": (proxy.status(503, Retry_After="0.05"), False, 5),
    "cut": (proxy.cut, False, 5),
    "reset": (proxy.reset, False, 5),
    "silent": (proxy.silent, False, 5),
    "empty": (proxy.EMPTY, True, 4),
    "nothing": (proxy.NOTHING, True, 4),
    "refused": (proxy.REFUSED, True, 4),
    "filtered": (proxy.FILTERED, True, 4),
    "not JSON": (proxy.NOT_JSON, True, 4),
    "other JSON": (proxy.OTHER_JSON, True, 4),
    "no choices": (proxy.NO_CHOICES, True, 4),
    "page": (proxy.html(200), True, 4),
    "bad request": (proxy.status(400), True, 4),
    "redirect": (proxy.status(307, Location="http://127.0.0.1:9/"), True, 4),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_repeated_or_costs_one_answer(name, proxied, endpoint, tmp_path: Path, caplog) -> None:
    fault, is_missing, sent = FAULTS[name]
    between = proxied({2: fault})
    caplog.set_level(logging.DEBUG)
    hurt = endpoint(between.url, max_concurrency=1, timeout_seconds=1 if name == "silent" else 20)
    results = hurt.ask(requests(4), "client 0, round 1, answer")
    assert texts(results) == answers(*([1] if is_missing else []))
    assert between.number == sent
    repeated = {json.loads(body)["messages"][0]["content"]: count for body, count in between.seen.items() if count > 1}
    assert repeated == ({} if is_missing else {"question 1": 2})
    told = [record.getMessage() for record in caplog.records if record.name.startswith("semcons_ray")]
    assert len(told) == is_missing
    if is_missing:
        assert told[0].startswith("client 0, round 1, answer: 1 of 4 answers are missing: 1 x ")
    assert_no_key(tmp_path, caplog.text)
    assert between.keys == {f"Bearer {KEY}"}


def test_an_answer_that_is_cut_by_its_length_counts(proxied, endpoint) -> None:
    (result,) = endpoint(proxied({1: proxy.CUT_BY_LENGTH}).url).ask(requests(1), "client 0")
    assert (result.answer, result.finish) == ("half of it", "length")


def test_what_fails_every_time_is_missing_after_the_retries(proxied, endpoint, caplog) -> None:
    hurt = proxied(lambda _, body: proxy.status(503, **AGAIN) if b"question 2" in body else None)
    results = endpoint(hurt.url, max_retries=2).ask(requests(4), "client 3, round 2, answer")
    assert texts(results) == answers(2)
    assert sorted(hurt.seen.values()) == [1, 1, 1, 3]
    assert "client 3, round 2, answer: 1 of 4 answers are missing: 1 x status 503 (fault 503)" in caplog.text


def test_an_endpoint_that_is_gone_in_mid_round_costs_the_answers_that_were_left(server: Server, endpoint) -> None:
    ended = threading.Event()

    def answer(body):
        if len(server.asked) == 2:
            threading.Thread(target=lambda: (server.shutdown(), server.server_close(), ended.set())).start()
            ended.wait()
            raise ConnectionAbortedError  # ends the connection, too
        return "yes"

    server.answer = answer
    results = endpoint(server.url, max_concurrency=1, max_retries=1, timeout_seconds=0.5).ask(requests(4), "client 0")
    assert texts(results) == ["yes", "", "", ""]


@pytest.mark.parametrize(
    ("fault", "option"),
    [
        (proxy.status(503, **AGAIN), "max_retries"),
        (proxy.status(429, **AGAIN), "requests_per_minute"),
        (proxy.silent, "timeout_seconds"),
        (proxy.html(200), "base_url"),
        (proxy.REFUSED, "model"),
        (proxy.reset, "base_url"),
    ],
)
def test_a_client_is_lost_if_nothing_is_answered_and_told_which_setting_to_look_at(
    fault, option, proxied, endpoint
) -> None:
    hurt = endpoint(proxied(lambda *_: fault).url, max_retries=0, timeout_seconds=0.2)
    with pytest.raises(ClientError, match=rf"client 0, round 1: none of 3 .*{SETTING}\.{option}"):
        hurt.ask(requests(3), "client 0, round 1")


def test_a_wrong_key_loses_the_client_at_once_and_shows_no_part_of_it(
    server: Server, endpoint, tmp_path: Path, caplog
) -> None:
    server.key = "another"
    caplog.set_level(logging.DEBUG)
    with pytest.raises(UnansweredError) as caught:
        endpoint(server.url, max_concurrency=1).ask(requests(20), "client 0, round 1")
    said = str(caught.value)
    assert f"refuses the key in {VARIABLE} (Incorrect API key provided: [key]" in said
    assert said.endswith(f"set {SETTING}.api_key_env")
    assert "sk-test" not in said
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert_no_key(tmp_path, said, caplog.text)


def test_an_unknown_model_loses_the_client_at_once(proxied, endpoint) -> None:
    between = proxied({})
    with pytest.raises(UnansweredError, match=rf"knows no model large .*; set {SETTING}\.model or {SETTING}\.base_url"):
        endpoint(between.url, model="large", max_concurrency=1).ask(requests(20), "client 0")
    assert between.number <= 2  # the thread may have begun another


def test_a_reply_that_comes_byte_by_byte_for_ever_holds_nothing_up(server: Server, endpoint, monkeypatch) -> None:
    monkeypatch.setattr("semcons_ray.endpoints.endpoint.LONGEST_RETRY_AFTER", 0.0)
    over = threading.Event()

    def drip(handler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not over.wait(0.05):
            handler.wfile.write(b" ")

    with serving(proxy.Proxy(server.url, {1: drip})) as between:
        slow = endpoint(between.url, max_concurrency=2, max_retries=0, timeout_seconds=0.2)
        results = slow.ask(requests(3), "client 0")
        over.set()
    assert sum(text == "" for text in texts(results)) == 1


# Kept calls


def test_what_was_answered_is_not_asked_again(server: Server, endpoint) -> None:
    first = endpoint(server.url).ask(requests(3), "client 0")
    second = endpoint(server.url).ask(requests(5), "client 0")
    assert second[:3] == first
    assert Counter(body["messages"][0]["content"] for body in server.asked) == {f"question {n}": 1 for n in range(5)}


def test_the_same_question_of_another_task_is_asked(server: Server, endpoint) -> None:
    made = endpoint(server.url)
    for seed in (1, 1, 2):
        made.ask(requests(1, seed=seed), "client 0")
    assert [body["seed"] for body in server.asked] == [1, 2]


def test_a_request_that_is_there_twice_is_sent_once(server: Server, endpoint) -> None:
    assert texts(endpoint(server.url).ask(requests(1) * 2, "client 0")) == ["question 0 (1)"] * 2
    assert len(server.asked) == 1


def test_what_failed_is_asked_again_and_what_was_refused_is_not(server: Server, proxied, endpoint) -> None:
    between = proxied({2: proxy.status(400), 3: proxy.REFUSED})
    options = {"max_concurrency": 1, "max_retries": 0}
    assert texts(endpoint(between.url, **options).ask(requests(4), "client 0")) == answers(1, 2)
    assert texts(endpoint(between.url, **options).ask(requests(4), "client 0")) == answers(2)
    assert between.number == 5


def test_half_a_line_is_dropped_and_damage_is_told(server: Server, endpoint, tmp_path: Path) -> None:
    endpoint(server.url).ask(requests(2), "client 0")
    path = tmp_path / "calls" / "calls.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    for _ in range(2):
        assert texts(endpoint(server.url).ask(requests(2), "client 0")) == answers(count=2)
        assert len(server.asked) == 3
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(RunFolderError, match=r"calls\.jsonl is damaged"):
        endpoint(server.url).ask(requests(2), "client 0")


# Caps and pace


def test_after_a_cap_answers_are_missing_which_is_said_once_and_a_resumed_run_goes_on_counting(
    server: Server, endpoint, caplog
) -> None:
    capped = endpoint(server.url, max_requests=3)
    assert texts(capped.ask(requests(2), "client 0")) == answers(count=2)
    results = capped.ask(requests(5), "client 0")
    assert sum(bool(text) for text in texts(results)) == 3
    assert texts(capped.ask(requests(9)[6:], "client 0")) == [""] * 3
    assert len(server.asked) == 3
    assert [record.getMessage() for record in caplog.records if record.name.startswith("semcons_ray")] == [
        f"{SETTING}.max_requests 3 is reached: all further answers are missing"
    ]
    assert texts(endpoint(server.url, max_requests=4).ask(requests(9)[5:], "client 0")).count("") == 3


def test_tokens_and_money_stay_within_their_caps(server: Server, endpoint) -> None:
    # A request takes at most 3 + 8 tokens by the estimate, and 15 by the server's count.
    results = endpoint(server.url, max_tokens_total=60, max_concurrency=1).ask(requests(9), "client 0")
    assert sum(isinstance(result, Call) for result in results) == 4
    prices = {"usd_per_million_input_tokens": 1e6}  # the four before were free
    results = endpoint(server.url, max_usd=32, max_concurrency=1, **prices).ask(requests(9, seed=1), "client 0")
    assert sum(isinstance(result, Call) for result in results) == 3
    results = endpoint(server.url, max_usd=35, **prices).ask(requests(2, seed=2), "client 0")
    assert sum(isinstance(result, Call) for result in results) == 1


def test_a_request_that_may_not_fit_beside_others_waits_until_these_have_ended(server: Server, endpoint) -> None:
    # Each may take 3 + 40 tokens and takes 15, so four fit, though only two at the same time.
    asked = [msgspec.structs.replace(request, max_tokens=40) for request in requests(6)]
    results = endpoint(server.url, max_tokens_total=100, max_concurrency=3).ask(asked, "client 0")
    assert sum(isinstance(result, Call) for result in results) == 4
    assert server.most_at_once <= 2


def test_no_more_requests_than_allowed_are_under_way(server: Server, endpoint) -> None:
    together = threading.Barrier(3)  # breaks unless three are there at the same time

    def answer(body):
        together.wait(timeout=5)
        return "yes"

    server.answer = answer
    assert texts(endpoint(server.url, max_concurrency=3).ask(requests(9), "client 0")) == ["yes"] * 9
    assert server.most_at_once == 3


def test_requests_are_spaced_evenly_repeated_ones_too(proxied, endpoint) -> None:
    came: list[float] = []

    def fault(number: int, body: bytes):
        came.append(time.monotonic())
        return proxy.status(503, **AGAIN) if number == 2 else None

    endpoint(proxied(fault).url, requests_per_minute=600).ask(requests(4), "client 0")
    assert len(came) == 5
    assert came[-1] - came[0] >= 4 * 0.1 - 0.05  # a late start of the first only widens the others


def test_it_works_inside_a_running_event_loop(server: Server, endpoint) -> None:
    async def ask():
        return endpoint(server.url).ask(requests(2), "client 0")

    assert texts(asyncio.run(ask())) == answers(count=2)


# Parameters


def test_a_model_that_wants_max_completion_tokens_gets_it_and_that_is_remembered(
    server: Server, endpoint, caplog
) -> None:
    def answer(body):
        for name in ("max_tokens", "temperature"):
            if name in body:
                message = f"Unsupported parameter: '{name}' is not supported with this model."
                return {"status": 400, "error": {"message": message, "param": name, "code": "unsupported_parameter"}}
        return "yes"

    server.answer = answer
    made = endpoint(server.url, max_concurrency=1)
    assert texts(made.ask(requests(3), "client 0")) == ["yes"] * 3
    assert len(server.asked) == 5
    assert server.asked[-1]["max_completion_tokens"] == 8
    assert texts(endpoint(server.url).ask(requests(5)[3:], "client 0")) == ["yes"] * 2
    assert len(server.asked) == 7
    told = [record.getMessage() for record in caplog.records if record.name.startswith("semcons_ray")]
    assert told == [
        f"{SETTING}: small takes no max_tokens; max_completion_tokens is sent instead",
        f"{SETTING}: small takes no temperature; it is left out from now on",
    ]


def test_what_is_refused_however_it_is_spelt_is_not_asked_for_ever(server: Server, endpoint) -> None:
    server.answer = lambda body: {
        "status": 400, "error": {"message": "no", "param": "max_tokens", "code": "unsupported_parameter"}
    }  # fmt: skip
    with pytest.raises(UnansweredError):
        endpoint(server.url).ask(requests(1), "client 0")
    assert len(server.asked) == 2


def test_tokens_are_estimated_where_the_endpoint_does_not_count_them(server: Server, endpoint) -> None:
    server.answer = lambda body: completion("twelve bytes", usage=False)
    (call,) = endpoint(server.url).ask(requests(1), "client 0")
    assert (call.input_tokens, call.output_tokens) == (3, 3)


# Settings


def test_a_key_that_is_missing_is_told_with_the_name_of_its_variable(endpoint, monkeypatch) -> None:
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ConfigError, match=f"{VARIABLE} is not set, which {SETTING}.api_key_env names"):
        endpoint("http://127.0.0.1:1/v1")
    monkeypatch.setenv(VARIABLE, f"{KEY}\n{KEY}")
    with pytest.raises(ConfigError) as caught:
        endpoint("http://127.0.0.1:1/v1")
    assert KEY not in str(caught.value)


def test_an_endpoint_without_a_key_gets_none_of_the_users(server: Server, proxied, endpoint, monkeypatch) -> None:
    server.key = None
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key-of-the-user")
    between = proxied({})
    endpoint(between.url, api_key_env=None).ask(requests(1), "client 0")
    assert between.keys == {"Bearer none"}


@pytest.mark.parametrize(
    "values",
    [
        {"api_key_env": KEY},
        {"base_url": f"http://user:{KEY}@localhost/v1"},
        {"base_url": "localhost:8000"},
        {"max_usd": 1.0},
        {"max_requests": 0},
        {"requests_per_minute": 0},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values) -> None:
    for kind in (EndpointConfig, JudgeConfig):
        with pytest.raises(ValueError):
            kind(**values)


def test_a_missing_answer_says_why() -> None:
    assert str(Missing("timed out")) == "timed out"
    assert str(Missing("status 503", "overloaded")) == "status 503 (overloaded)"
