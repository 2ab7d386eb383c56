"""Runs in which clients draw several answers to each prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import semcons_ray as sr
from semcons_ray.config import ExperimentConfig
from semcons_ray.consensus import Election
from semcons_ray.consensus.evidence import Evidence, Ruling
from semcons_ray.federation.opinions import opinion_of
from semcons_ray.messages import Answers
from semcons_ray.reporting import write_report
from semcons_ray.runs.experiment import plan_experiment, resume_experiment, run_experiment
from semcons_ray.runs.forecast import Forecast
from semcons_ray.studies.labels import elect, read_answered
from tests.invariants.runs import Silent, StoppedError, assert_same_run, replace_table

pytestmark = [pytest.mark.slow, pytest.mark.real]

Make = Callable[..., ExperimentConfig]


def votes(run: Path, round: int = 1) -> pd.DataFrame:
    return pd.read_parquet(run / f"consensus/round_{round:03d}.parquet")


def settings(rule: str = "plurality", **generation: Any) -> dict[str, Any]:
    return {
        "algorithm": {"rule": rule, "first_exchange": 1, "compression": "none"},
        "generation": {"max_new_tokens": 8, **generation},
        "evaluation": {"num_answers": 0, "every": 1},
    }


def test_all_samples_are_sent_and_in_the_vote(tmp_path: Path, tiny_config: Make) -> None:
    own = {"num_clients": 3, "overrides": {2: {"generation": {"num_samples": 3}}}}
    config = tiny_config(num_rounds=2, clients=own, **settings(num_samples=2))
    forecast = Forecast(plan_experiment(config, Silent()))
    run = tmp_path / "run"
    run_experiment(config, run, Silent())
    table = votes(run)
    assert [*table] == [
        *("prompt_id", "client_id", "sample", "answer", "draws", "confidence"),
        *("similarity", "chosen", "agreement", "abstained"),
    ]
    assert table["confidence"].isna().all()
    assert set(table["draws"]) == {1}
    assert table.groupby("client_id")["sample"].unique().map(list).to_dict() == {0: [0, 1], 1: [0, 1], 2: [0, 1, 2]}
    assert len(table) == 6 * 7
    assert table.groupby("prompt_id")["chosen"].sum().max() == 1

    ledger = pd.read_parquet(run / "ledger.parquet")
    wrote = ledger[(ledger["round"] == 1) & (ledger["stage"] == "generate")].set_index("client_id")
    private = pd.read_parquet(run / "data.parquet").query("role == 'private'").groupby("client_id").size()
    for client, rows in table.sort_values(["sample", "prompt_id"]).groupby("client_id"):
        first, *further = [tuple(one) for _, one in rows.groupby("sample")["answer"]]
        message = Answers(
            round_number=1, client_id=client, num_examples=int(private[client]), answers=first, further=tuple(further)
        )
        assert wrote.loc[client, "uplink_bytes"] == len(message.encode())
    once = Forecast(plan_experiment(tiny_config(num_rounds=2, **settings()), Silent()))
    for name in ("generated", "uplink_bytes"):
        assert getattr(forecast.rounds[1], name) * 3 == pytest.approx(getattr(once.rounds[1], name) * 7)

    # Its first samples are the answers of a run without further ones, and so is a random client's label.
    single = tmp_path / "single"
    run_experiment(tiny_config(num_rounds=2, **settings()), single, Silent())
    first = table[table["sample"] == 0]
    assert first["answer"].tolist() == votes(single)["answer"].tolist()
    assert first["client_id"].tolist() == votes(single)["client_id"].tolist()
    assert set(votes(single)["sample"]) == {0}
    write_report(run)


def test_a_choice_is_fewer_bytes_than_all_draws(tmp_path: Path, tiny_config: Make) -> None:
    runs, forecasts = {}, {}
    for send in ("all", "choice"):
        one_token = {"max_new_tokens": 1, "top_k": 2, "num_samples": 6, "send_draws": send}
        config = tiny_config(num_rounds=2, **settings(**one_token))
        forecasts[send] = Forecast(plan_experiment(config, Silent())).rounds[1]
        run_experiment(config, tmp_path / send, Silent())
        runs[send] = votes(tmp_path / send)
    sent = {send: pd.read_parquet(tmp_path / send / "ledger.parquet")["uplink_bytes"].sum() for send in runs}
    assert sent["choice"] < 0.7 * sent["all"]
    drawn = runs["all"][runs["all"]["answer"] != ""].groupby(["prompt_id", "client_id"])["answer"]
    table = runs["choice"].set_index(["prompt_id", "client_id"])
    assert len(table) == 6 * 3
    for place, answers in drawn:
        said = [*map(opinion_of, answers)]
        assert table.loc[place, "draws"] == max(map(said.count, said))
        assert table.loc[place, "answer"] in [*answers]
    write_report(tmp_path / "choice")
    assert forecasts["choice"].generated == forecasts["all"].generated
    assert forecasts["choice"].uplink_bytes == forecasts["all"].uplink_bytes / 6 + 3 * 6  # a count is a byte


def test_confidence_is_sent_counted_and_kept(tmp_path: Path, tiny_config: Make) -> None:
    runs = {}
    for send in (False, True):
        config = tiny_config(num_rounds=2, **settings(num_samples=2, send_confidence=send))
        runs[send] = Forecast(plan_experiment(config, Silent())).rounds[1]
        run_experiment(config, tmp_path / str(send), Silent())
    ledgers = {send: pd.read_parquet(tmp_path / str(send) / "ledger.parquet") for send in runs}
    by_client = {
        send: ledger[ledger["stage"] == "generate"].groupby("client_id")["uplink_bytes"].sum().tolist()
        for send, ledger in ledgers.items()
    }
    assert by_client[True] == [without + 11 + 2 + 2 * 6 * 4 for without in by_client[False]]
    assert runs[True].uplink_bytes == runs[False].uplink_bytes + 3 * 2 * 6 * 4
    assert runs[True].scored > runs[False].scored
    tables = {send: votes(tmp_path / str(send)) for send in runs}
    given = tables[True]["confidence"]
    assert (given[tables[True]["answer"] != ""] < 0).all()
    pd.testing.assert_frame_equal(
        tables[True].drop(columns="confidence"), tables[False].drop(columns="confidence"), check_exact=True
    )


def test_sentinels_are_the_same_whoever_asks_and_their_answers_are_labels(tmp_path: Path, tiny_config: Make) -> None:
    config = tiny_config(
        num_rounds=3,
        algorithm={"rule": "plurality", "first_exchange": 1, "competence": "sentinels"},
        prompts={"sentinels": 2},
    )
    run = sr.run(config, out=tmp_path / "run")
    labels = [run.labels(round).set_index("prompt_id") for round in (1, 2)]
    known = [of_round[of_round["client_id"] == -1] for of_round in labels]
    assert known[0].index.tolist() == known[1].index.tolist()
    assert len(known[0]) == 2
    data = pd.read_parquet(tmp_path / "run" / "data.parquet").query("role == 'public'").reset_index()
    assert known[0]["label"].tolist() == data["response"][known[0].index].tolist()
    assert len(labels[0]) == run.rounds.set_index("round").loc[1, "num_labels"]
    table = sr.labels(tmp_path / "run", rules=["plurality"]).table
    assert {"equal", "expertise", "sentinels"} <= set(table["competence"])
    assert set(table["num_items"]) == {4}  # of six prompts, two of which the server knows
    rule = Election("plurality", {"min_cosine": 0.8}, competence="sentinels")
    elected = elect(read_answered(tmp_path / "run"), rule, 1)
    given = [of_round["label"].reindex(range(6)) for of_round in labels]
    assert [elected[1], elected[2]] == [of_round.where(of_round.notna(), None).tolist() for of_round in given]
    attacked = sr.attack(tmp_path / "run", defences=["none"], attacks=["one_text"], shares=[0.4]).table
    assert set(attacked["competence"]) == {"sentinels"}
    with pytest.raises(sr.ConfigError, match=r"competence sentinels needs prompts\.sentinels over 0"):
        tiny_config(algorithm={"competence": "sentinels"})
    with pytest.raises(sr.ConfigError, match=r"prompts\.sentinels 7 is over prompts\.budget 6"):
        tiny_config(algorithm={"competence": "sentinels"}, prompts={"sentinels": 7})


def one_is_doubted(evidence: Evidence) -> Ruling:
    """Takes the votes of the client whose number is 0 in the server's order, which is another in each round."""
    trust = torch.ones(evidence.num_clients)
    trust[0] = 0.0
    return Ruling(trust[evidence.voters].expand_as(evidence.shares), trust)


def test_whom_the_defence_distrusts_is_told(tmp_path: Path, tiny_config: Make) -> None:
    algorithm = {"first_exchange": 1, "defence": f"{__name__}:{one_is_doubted.__name__}", "min_votes": 1}
    run = sr.run(tiny_config(num_rounds=3, algorithm=algorithm), out=tmp_path / "run")
    rounds = run.rounds.set_index("round")["distrusted"]
    assert rounds[[0, 3]].tolist() == ["", ""]  # nobody answers there
    for round in (1, 2):
        (client,) = map(int, rounds[round].split(", "))
        winners = set(votes(run.path, round).query("chosen")["client_id"])
        assert winners == {0, 1, 2} - {client}
        assert f"distrusted by the defence: clients {client}" in (run.path / "run.log").read_text()
    told = f"clients {rounds[2]} in round 2; their votes count less, or nothing"
    assert f"distrusted   {told}" in str(run)
    assert f'<td class="text">{rounds[2]}</td>' in run.report_html.read_text()
    old = pd.read_parquet(run.path / "rounds.parquet").drop(columns="distrusted")
    replace_table(run.path / "rounds.parquet", old)  # as an earlier version wrote it
    assert set(sr.load(run.path).rounds["distrusted"]) == {""}


def test_a_random_clients_labels_are_those_of_one_sample(tmp_path: Path, tiny_config: Make) -> None:
    for count in (1, 3):
        config = tiny_config(num_rounds=2, **settings("random_client", **({"num_samples": 3} if count == 3 else {})))
        run_experiment(config, tmp_path / str(count), Silent())
    chosen = [votes(tmp_path / name).query("chosen")[["prompt_id", "client_id", "answer"]] for name in ("1", "3")]
    assert chosen[0].to_numpy().tolist() == chosen[1].to_numpy().tolist()
    nll = [pd.read_parquet(tmp_path / name / "metrics.parquet")["nll"].tolist() for name in ("1", "3")]
    assert nll[0] == nll[1]


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(tmp_path: Path, tiny_config: Make) -> None:
    config = tiny_config(num_rounds=3, **settings("medoid", num_samples=2))
    run_experiment(config, tmp_path / "whole", Silent())
    seen: list[int] = []

    def stop(reply: Any) -> None:
        seen.append(reply.client_id)
        assert len(seen) < 6  # in the midst of round 2

    with pytest.raises(StoppedError):
        run_experiment(config, tmp_path / "stopped", Silent(stop))
    resume_experiment(tmp_path / "stopped", Silent())
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
