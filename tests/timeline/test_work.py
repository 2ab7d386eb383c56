"""What a ledger says of visits."""

from semcons_ray.metering.ledger import LedgerRow, Stage
from semcons_ray.timeline.work import ServerWork, Visit, Visits, ledger_table, server_work, tokens_of


def row(round: int, client: int, stage: Stage, tokens: int = 0, up: int = 0, down: int = 0) -> LedgerRow:
    return LedgerRow(
        round=round, client_id=client, worker="w", node="n", stage=stage, started_at=0.0, duration_seconds=9.0,
        tokens=tokens, uplink_bytes=up, downlink_bytes=down,
    )  # fmt: skip


LEDGER = ledger_table(
    [
        row(0, 0, "evaluate", 99),
        row(1, 1, "load", down=1000),
        row(1, 1, "fine_tune", 300, down=40),
        row(1, 1, "generate", 50, up=70),
        row(1, 1, "evaluate", 5000),
        row(1, 0, "fine_tune", 200),
        row(1, 0, "encode", up=600),
        row(1, -1, "embed", 10),
        row(1, -1, "idle"),
        row(2, 0, "fine_tune", 200, down=500),
        row(2, 0, "encode", up=600),
    ]
)


def test_visits_by_hand() -> None:
    visits = Visits(LEDGER, prompt_tokens=25)
    assert visits[0] == []
    assert visits[1] == [Visit(0, 1, 0, 200, 0, 0, 600), Visit(1, 1, 1040, 300, 25, 50, 70)]
    assert visits[2] == [Visit(0, 2, 500, 200, 0, 0, 600)]
    assert visits[3] == []


def test_prompts_are_read_once_where_an_engine_answers_for_a_worker() -> None:
    rows = [row(1, 0, "fine_tune", 300), row(1, 0, "generate", 50), row(1, 0, "generate", up=70)]
    assert Visits(ledger_table(rows), prompt_tokens=25)[1] == [Visit(0, 1, 0, 300, 25, 50, 70)]


def test_messages_with_weights_grow_with_the_model_and_texts_do_not() -> None:
    # What is sent on rows of fine_tune and encode; public prompts, answers and what they cost stay.
    visits = Visits(LEDGER[LEDGER["client_id"] == 0], prompt_tokens=25, weights=10)
    assert visits[1] == [Visit(0, 1, 0, 200, 0, 0, 6000)]
    assert visits[2] == [Visit(0, 2, 5000, 200, 0, 0, 6000)]


def test_the_servers_work() -> None:
    first = LEDGER[LEDGER["round"] == 1]
    assert server_work(first) == ServerWork(13, 670)
    assert server_work(first, weights=10) == ServerWork(13, 6070)


def test_tokens_of_texts() -> None:
    assert tokens_of(["abcd", "é"]) == 2  # six bytes
    assert tokens_of([]) == 0


def test_no_rows_are_no_visits() -> None:
    assert Visits(ledger_table([]), 10)[1] == []
    assert server_work(ledger_table([])) == ServerWork(0, 0)
