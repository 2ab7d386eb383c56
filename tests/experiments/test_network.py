import math

import pandas as pd
import pytest

from tests.experiments.scripts import load_script

prediction = load_script("network", "prediction.py")
Link, Visit, arrivals, round_seconds = (
    prediction.Link, prediction.Visit, prediction.arrivals, prediction.round_seconds
)  # fmt: skip

MEGABYTE_A_SECOND = 8.0


def test_a_round_of_one_client_is_what_it_gets_computes_and_sends_and_then_the_server() -> None:
    visit = Visit(down_bytes=1e6, compute_seconds=3.0, up_bytes=2e6, collect_seconds=0.25)
    link = Link(MEGABYTE_A_SECOND / 2, efficiency=0.5, call_seconds=0.125)  # 0.25 MB of messages a second
    assert round_seconds([visit], link, 0.5) == 0.125 + 4 + 3 + 8 + 0.25 + 0.5


def test_what_is_always_sent_takes_its_part_of_the_rate_once_for_each_client_on_it() -> None:
    own = Link(MEGABYTE_A_SECOND, background_bytes_per_second=0.25e6)
    assert arrivals([0.0, 0.0], [1.5e6, 0.75e6], own) == pytest.approx([2, 1])
    shared = Link(MEGABYTE_A_SECOND, shared=True, background_bytes_per_second=0.25e6)
    assert arrivals([0.0, 0.0], [0.5e6, 0.5e6], shared) == pytest.approx([2, 2])


def test_a_round_waits_for_the_slowest() -> None:
    quick, slow = Visit(0, 1.0, 1e6), Visit(0, 5.0, 1e6)
    assert round_seconds([quick, slow, quick], Link(MEGABYTE_A_SECOND)) == 6


def test_the_server_works_on_one_message_after_the_other_while_others_are_on_their_way() -> None:
    visits = [Visit(0, at, 0, collect_seconds=2.0) for at in (4.0, 1.0, 1.5)]  # done at 3, 5, 7
    assert round_seconds(visits, Link(MEGABYTE_A_SECOND)) == 7


def test_equal_clients_take_as_long_on_a_shared_link_as_one_with_all_of_it() -> None:
    visits = [Visit(1e6, 1.0, 0.5e6)] * 4
    assert round_seconds(visits, Link(MEGABYTE_A_SECOND, shared=True)) == pytest.approx(4 + 1 + 2)


def test_a_shared_link_is_divided_evenly_at_any_time() -> None:
    """The first is alone for a second and sends 1 of its 2 MB; both then get half, until the second is done with its
    0.5 MB after one more; the first has 0.5 MB left."""
    link = Link(MEGABYTE_A_SECOND, shared=True)
    assert arrivals([0.0, 1.0], [2e6, 0.5e6], link) == pytest.approx([2.5, 2.0])
    assert arrivals([0.0, 9.0], [2e6, 0.5e6], link) == pytest.approx([2.0, 9.5])  # idle in between
    assert arrivals([3.0, 0.0], [0, 0], link) == [3.0, 0.0]


def test_a_link_without_end_takes_no_time() -> None:
    for shared in (False, True):
        assert arrivals([1.0, 2.0], [1e6, 1e6], Link(math.inf, shared=shared)) == [1.0, 2.0]


def test_visits_of_a_round_are_read_from_the_ledger() -> None:
    run = load_script("network")
    ledger = pd.DataFrame(
        [
            (0, "load", 9.0, 0, 900),
            (0, "fine_tune", 1.0, 0, 300),
            (0, "generate", 2.0, 40, 0),
            (1, "fine_tune", 4.0, 0, 300),
            (1, "generate", 5.0, 50, 0),
            (-1, "embed", 0.25, 0, 0),
            (-1, "embed", 0.75, 0, 0),
            (-1, "consensus", 0.125, 0, 0),
            (-1, "idle", 8.0, 0, 0),
        ],
        columns=["client_id", "stage", "duration_seconds", "uplink_bytes", "downlink_bytes"],
    )
    visits, conclude_seconds = run.of_round(ledger, 2)
    assert [(visit.down_bytes, visit.compute_seconds, visit.up_bytes, visit.collect_seconds) for visit in visits] == [
        (300, 3.0, 40, 0.5),
        (300, 9.0, 50, 0.5),
    ]
    assert conclude_seconds == 0.125
