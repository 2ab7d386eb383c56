from collections.abc import Iterator, Mapping
from typing import Any, cast

from semcons_ray.federation.fleet import Reply
from semcons_ray.runs.experiment import _Watched
from tests.invariants.runs import Silent


class FailingFleet:
    """Client 1 fails whatever is asked of it; the others reply with nothing in particular."""

    lost: Mapping[int, str] = {}

    def measure(self, round: int, downlinks: Mapping[int, bytes]) -> Iterator[Reply]:
        for client in downlinks:
            if client != 1:
                yield Reply(client_id=client, round=round, uplink=b"", train_loss=0.0, num_private=1,
                            num_pseudo_labels=0, evaluation=None, rows=())  # fmt: skip
        self.lost = {1: "it died"}

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        return self.measure(round, downlinks)


def test_a_client_that_fails_is_known_whether_it_was_visited_or_measured() -> None:
    for round in (0, 1):
        watched = _Watched(cast(Any, FailingFleet()), Silent(), 1)
        downlinks = dict.fromkeys(range(3), b"")
        replies = watched.visit(1, downlinks, evaluate=True) if round else watched.measure(0, downlinks)
        assert [reply.client_id for reply in replies] == [0, 2]
        assert (watched.asked, watched.lost) == ((0, 1, 2), {1: "it died"})
