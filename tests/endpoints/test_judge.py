import math
from pathlib import Path

import pytest

from semcons_ray.config import JudgeConfig, validate_config
from semcons_ray.endpoints.judge import Judge
from semcons_ray.errors import ConfigError
from tests.endpoints import proxy
from tests.endpoints.conftest import KEY, VARIABLE
from tests.endpoints.server import MODEL, Server


@pytest.fixture
def judge(server: Server, tmp_path: Path):
    made: list[Judge] = []

    def make(url: str = server.url, **options) -> Judge:
        values = {"model": MODEL, "base_url": url, "api_key_env": VARIABLE} | options
        made.append(Judge(JudgeConfig(**values), tmp_path / "judge", "here"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def prefers(*words: str):
    """A judge that likes the answer with the first of these words, and else says that there is no difference."""

    def answer(body) -> str:
        asked = body["messages"][-1]["content"].partition("\n\nReply")[0]
        first, second = asked.split("Answer A:\n")[1].split("\n\nAnswer B:\n")
        for word in words:
            if (word in first) != (word in second):
                return "A" if word in first else "B."
        return "TIE"

    return answer


def opinions(judge: Judge, *answers: str, reference: str = "good") -> list[tuple[float, float]]:
    return [tuple(one) for one in judge.compare(1, ["why?"] * len(answers), answers, [reference] * len(answers))]


def test_a_judge_without_a_favourite_place_agrees_with_itself(server: Server, judge) -> None:
    server.answer = prefers("better", "good")
    assert opinions(judge(), "better", "bad", "good") == [(1.0, 1.0), (0.0, 1.0), (0.5, 1.0)]


def test_one_that_likes_the_first_place_gives_half_and_does_not_agree(server: Server, judge) -> None:
    server.answer = lambda body: "A"
    assert opinions(judge(), "better") == [(0.5, 0.0)]


def test_a_tie_in_one_order_counts_half(server: Server, judge) -> None:
    server.answer = lambda body: "tie" if "Answer A:\nbetter" in body["messages"][-1]["content"] else "B"
    assert opinions(judge(), "better") == [(0.75, 0.0)]


def test_both_are_asked_with_the_instructions_and_nothing_says_whose_answer_is_whose(server: Server, judge) -> None:
    opinions(judge(instructions="Look at the style."), "mine", reference="theirs")
    asked = [[message["content"] for message in body["messages"]] for body in server.asked]
    assert {system for system, _ in asked} == {"Look at the style."}
    assert sorted(user.partition("\n\nReply")[0] for _, user in asked) == [
        "Question:\nwhy?\n\nAnswer A:\nmine\n\nAnswer B:\ntheirs",
        "Question:\nwhy?\n\nAnswer A:\ntheirs\n\nAnswer B:\nmine",
    ]
    assert {body["temperature"] for body in server.asked} == {0.0}


@pytest.mark.parametrize("verdict", ["Both are fine.", "A or B", "", "It is C"])
def test_a_verdict_that_cannot_be_read_is_not_a_number(server: Server, judge, verdict: str, caplog) -> None:
    server.answer = lambda body: verdict if "bad" in body["messages"][-1]["content"] else "TIE"
    good, bad = opinions(judge(), "fair", "bad")
    assert good == (0.5, 1.0)
    assert all(map(math.isnan, bad))
    assert "no verdict on 1 of 2 answers" in caplog.text


def test_an_empty_answer_has_lost_and_nobody_is_asked(server: Server, judge) -> None:
    ((score, agreement),) = opinions(judge(), "")
    assert score == 0.0
    assert math.isnan(agreement)
    assert server.asked == []


def test_a_verdict_is_asked_for_once_in_a_run_and_paid_for_once(server: Server, judge) -> None:
    server.answer = prefers("better")
    first = judge(usd_per_million_input_tokens=1.0)
    first.compare(1, ["why?"] * 2, ["better", "better"], ["good"] * 2)
    again = judge()
    again.compare(2, ["why?"], ["better"], ["good"])
    assert len(server.asked) == 2
    (row,), (later,) = first.take_rows(), again.take_rows()
    assert (row.worker, row.stage, row.round, row.client_id, row.tokens) == ("judge", "evaluate", 1, -1, 30)
    assert row.cost_usd == pytest.approx(20e-6)
    assert (later.tokens, later.cost_usd) == (0, 0.0)


@pytest.mark.parametrize("fault", [proxy.status(500), proxy.html(200), proxy.status(401)])
def test_a_judge_that_fails_ends_nothing(proxied, judge, fault, caplog) -> None:
    lost, empty = opinions(judge(proxied(lambda *_: fault).url, max_retries=0), "better", "")
    assert all(map(math.isnan, lost))
    assert empty[0] == 0.0
    assert "the metric judge is NaN" in caplog.text
    assert KEY not in caplog.text


def test_the_judges_settings_need_its_metric_and_the_other_way_round() -> None:
    named = {"model": "m", "base_url": "http://localhost/v1"}
    metrics = ["rouge_l", "judge"]
    config = validate_config({"evaluation": {"metrics": metrics, "judge": named}}, where="here")
    assert config.evaluation.judge.model == "m"
    with pytest.raises(ConfigError, match=r"metrics judge needs evaluation\.judge\.model and evaluation\.judge\.base_"):
        validate_config({"evaluation": {"metrics": metrics}}, where="here")
    with pytest.raises(ConfigError, match=r"evaluation\.judge\.model m has no effect: it needs judge in evaluation\.m"):
        validate_config({"evaluation": {"judge": named}}, where="here")
    with pytest.raises(ConfigError, match=r"evaluation\.judge\.api_key_env: the name of an") as caught:
        validate_config({"evaluation": {"metrics": metrics, "judge": {**named, "api_key_env": KEY}}}, where="here")
    assert KEY not in str(caught.value)
