"""Rounds in virtual time, against closed forms."""

import dataclasses
import math

import numpy as np
import pytest

from semcons_ray.timeline.availability import DAY, HOUR, Diurnal
from semcons_ray.timeline.clock import GONE, LATE
from semcons_ray.timeline.policies import Async, Deadline, SemiAsync
from semcons_ray.timeline.work import ServerWork
from tests.timeline.worlds import clock, device, link, visit


def test_one_client() -> None:
    # 1000 bytes at 100 a second, 500 tokens trained at 50 and 300 written at 100 a second, twice 0.25 s of latency, and
    # 200 bytes up.
    time = clock([device(50)], [link(100, latency_seconds=0.25)])
    closed = time.round(1, [visit(0, 1, down=1000, trained=500, generated=300, up=200)])
    assert closed.arrived == {0: 1}
    assert closed.closed_at == pytest.approx(10 + 10 + 3 + 0.5 + 2)
    (row,) = time.visits().itertuples()
    assert (row.counted_in, row.downlink_bytes, row.uplink_bytes) == (1, 1000, 200)
    assert [row.downlink_seconds, row.fine_tune_seconds, row.generate_seconds] == pytest.approx([10, 10, 3])
    assert [row.latency_seconds, row.uplink_seconds] == pytest.approx([0.5, 2])


def test_equal_clients_with_lines_of_their_own_take_as_long_as_one() -> None:
    alone = clock([device(50)], [link(100)]).round(1, [visit(0, 1, down=1000, trained=500, up=200)])
    many = clock([device(50)] * 5, [link(100)] * 5)
    closed = many.round(1, [visit(client, 1, down=1000, trained=500, up=200) for client in range(5)])
    assert closed.closed_at == pytest.approx(alone.closed_at)


def test_equal_clients_share_the_servers_link() -> None:
    # 5 clients at 100 a second each, of the server's 250: 50 each, both ways.
    time = clock([device(50)] * 5, [link(100)] * 5, server=link(250))
    closed = time.round(1, [visit(client, 1, down=1000, trained=500, up=200) for client in range(5)])
    assert closed.closed_at == pytest.approx(1000 / 50 + 10 + 200 / 50)


def test_everybody_waits_for_a_straggler() -> None:
    time = clock([device(100), device(100), device(10)], [link(100)] * 3)
    closed = time.round(1, [visit(client, 1, trained=500, up=100) for client in range(3)])
    assert closed.closed_at == pytest.approx(50 + 1)
    assert [*closed.arrived][-1] == 2


def test_uploads_of_those_who_end_apart_do_not_slow_each_other() -> None:
    # 0 is through with its upload, at the server's whole 100 a second, before 1 begins.
    time = clock([device(100), device(10)], [link(1000)] * 2, server=link(100))
    closed = time.round(1, [visit(client, 1, trained=500, up=500) for client in range(2)])
    assert time.visits()["uplink_seconds"].tolist() == pytest.approx([5, 5])
    assert closed.closed_at == pytest.approx(55)


def test_the_server_works_after_a_round() -> None:
    time = clock([device(50)], [link(100)])
    time.round(1, [visit(0, 1, up=100)])
    time.serve(ServerWork(0, 10**9))  # three passes at a million GB a second
    assert time.seconds == pytest.approx(1 + 3 * 1e9 / 1e15)
    served_at = time.seconds
    assert time.round(2, [visit(0, 2, up=100)]).started_at == served_at


SLOW = [device(100), device(50), device(10)]  # 5, 10 and 50 s for 500 tokens


def trained(round: int, clients: list[int]):
    return [visit(client, round, trained=500, up=0) for client in clients]


def test_who_is_late_has_no_vote_and_is_asked_again_when_it_is_done() -> None:
    time = clock(SLOW, [link(100)] * 3, Deadline(hours=20 / 3600))
    first = time.round(1, trained(1, [0, 1, 2]))
    assert first.arrived == {0: 1, 1: 1}
    assert first.missing == {2: LATE}
    assert first.closed_at == pytest.approx(20)  # the server cannot know that nobody else would come
    assert time.idle([0, 1, 2]) == [0, 1]
    second = time.round(2, trained(2, [0, 1]))
    assert second.closed_at == pytest.approx(30)  # all that were asked have answered
    time.round(3, trained(3, [0, 1]))
    fourth = time.round(4, trained(4, time.idle([0, 1, 2])))
    assert fourth.started_at == pytest.approx(40)
    assert fourth.arrived == {0: 4, 1: 4}
    assert time.idle([0, 1, 2]) == [0, 1, 2]  # its answers came at 50 s, in round 4, and count in none
    late = time.visits().query("client_id == 2")
    assert late["counted_in"].tolist() == [0]
    assert late["ended_at"].tolist() == pytest.approx([50])


def test_an_infinite_deadline_is_synchronous_to_the_bit() -> None:
    visits = [visit(client, 1, down=1234, trained=100 + 37 * client, generated=17, up=999) for client in range(7)]
    tables = []
    for policy in (None, Deadline(hours=math.inf), Deadline(hours=1e9)):
        time = clock([device(10 + client) for client in range(7)], [link(100)] * 7, policy, server=link(250))
        for round in range(1, 4):
            closed = time.round(round, [one._replace(round=round) for one in visits])
            assert len(closed.arrived) == 7
        tables.append(time.visits())
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_a_full_buffer_ends_a_round_and_late_answers_count_in_the_next() -> None:
    time = clock(SLOW, [link(100)] * 3, SemiAsync(buffer_size=2))
    first = time.round(1, trained(1, [0, 1, 2]))
    assert (first.arrived, first.missing) == ({0: 1, 1: 1}, {})
    assert first.closed_at == pytest.approx(10)
    ends = []
    for round in range(2, 7):  # at 20, 30, 40 s by 0 and 1; at 50 all three are done
        closed = time.round(round, trained(round, time.idle([0, 1, 2])))
        ends.append(closed.closed_at)
        heard = closed.arrived
        if 2 in heard:
            break
    assert ends == pytest.approx([20, 30, 40, 50])
    assert heard[2] == 1  # it was asked in round 1


def test_of_those_who_are_done_at_once_none_is_lost() -> None:
    time = clock([device(100)] * 4, [link(100)] * 4, SemiAsync(buffer_size=3))
    counted = []
    for round in range(1, 5):
        counted += time.round(round, trained(round, time.idle([0, 1, 2, 3]))).arrived.items()
    assert len(counted) == len(set(counted))
    asked = time.visits()
    assert (asked["counted_in"] >= asked["round"]).all()


def test_async_takes_one_answer_a_round() -> None:
    time = clock(SLOW, [link(100)] * 3, Async())
    order = [*time.round(1, trained(1, [0, 1, 2])).arrived]
    for round in range(2, 8):
        order += time.round(round, trained(round, time.idle([0, 1, 2]))).arrived
    # 0 is done at 5, 10, 15, ...; 1 at 10, 20, ...: whoever is done first is heard first.
    assert order[0] == 0
    assert sorted(order[1:3]) == [0, 1]
    assert order.count(0) >= 4


def test_who_is_not_there_begins_when_it_comes() -> None:
    time = clock([device(50)], [link(100)], availability=Diurnal(hours=8, zones_hours=0))
    time.round(1, [visit(0, 1, trained=500)])
    time.round(2, [visit(0, 2, trained=int(50 * 7.9 * HOUR))])
    closed = time.round(3, [visit(0, 3, trained=int(50 * 0.5 * HOUR))])  # 0.1 h are left of the night
    assert closed.arrived == {}
    assert closed.missing == {0: GONE}
    assert closed.closed_at == pytest.approx(8 * HOUR)
    assert time.visits()["fine_tune_seconds"].tolist()[-1] < 0.2 * HOUR  # it did not come to its end
    closed = time.round(4, [visit(0, 4, trained=500)])
    assert closed.arrived == {0: 4}
    assert time.visits()["began_at"].tolist()[-1] == pytest.approx(DAY)


def test_drop_outs_are_drawn_by_seed_and_end_a_round_all_the_same() -> None:
    def lost() -> list[int]:
        time = clock([device(50)] * 200, [link(100)] * 200, dropout=0.25)
        gone = []
        for round in range(1, 6):
            closed = time.round(round, [visit(client, round, trained=50, up=100) for client in range(200)])
            assert {*closed.arrived} | {*closed.missing} == {*range(200)}
            gone.append(len(closed.missing))
        assert time.visits().query("counted_in == 0")["uplink_bytes"].sum() == 0
        return gone

    assert lost() == lost()
    assert np.mean(lost()) / 200 == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 1000))


def test_a_round_in_which_nobody_is_asked_ends_at_once() -> None:
    time = clock([device(50)], [link(100)])
    closed = time.round(1, [])
    assert (closed.closed_at, closed.arrived) == (0, {})


def test_a_device_that_its_host_drives_takes_a_time_for_each_step() -> None:
    driven = dataclasses.replace(device(1e9), training_layer_seconds=0.25, overlaps=True)
    time = clock([driven], [link(100)])  # a token is a step, of a model of one layer
    assert time.round(1, [visit(0, 1, trained=40)]).closed_at == pytest.approx(10)
