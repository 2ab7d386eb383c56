"""Virtual time: rounds as long as they would be in a federation of other devices and links, which decides who is heard.

Clients are visited as they always are. What each did, by its ledger, is then given to a clock, and of the replies an
algorithm gets those that would have been in time, in the order in which they would have come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from semcons_ray.federation.fleet import HandsOn, Reply, Visitor
from semcons_ray.metering.ledger import LedgerRow
from semcons_ray.timeline.clock import Clock
from semcons_ray.timeline.work import Visit, Visits, ledger_table, server_work


class VirtualTime:
    """A run's virtual time. `over` gives a visitor of clients that stands between an algorithm and a fleet.

    Args:
        clock: The clock, at the begin of round 1.
        prompt_tokens: Tokens of all public prompts together.

    Attributes:
        unheard: Replies to the last round's visits that are not heard in it.
        num_heard: How many replies are heard in it.
    """

    def __init__(self, clock: Clock, prompt_tokens: int) -> None:
        self._clock = clock
        self._prompt_tokens = prompt_tokens
        self._waiting: dict[int, Reply] = {}
        self.unheard: tuple[Reply, ...] = ()
        self.num_heard = 0

    def begin(self, rounds: Iterable[Sequence[LedgerRow]], fleet: Visitor) -> None:
        """Go on after rounds that are over, by their ledgers' rows, beginning with round 1."""
        for round, rows in enumerate(rounds, start=1):
            self._clock.round(round, self._visits(round, rows))
            self.ends(rows)
        asked_in: dict[int, list[int]] = {}
        for client, round in self._clock.pending.items():
            asked_in.setdefault(round, []).append(client)
        for round, clients in asked_in.items():  # these visits are done, so that their stored replies come
            for reply in fleet.visit(round, dict.fromkeys(clients, b""), evaluate=False):
                self._waiting[reply.client_id] = reply

    @property
    def seconds(self) -> float:
        """Virtual time since round 1 began."""
        return self._clock.seconds

    def over(self, fleet: Visitor) -> Visitor:
        """A visitor whose visits take virtual time."""
        self.unheard, self.num_heard = (), 0
        return _Timed(fleet, self)

    def ends(self, rows: Sequence[LedgerRow]) -> None:
        """Let the server's part of a round pass, by the ledger's rows of the round."""
        self._clock.serve(server_work(ledger_table(rows)))

    def idle(self, client_ids: Sequence[int]) -> list[int]:
        """See `Clock.idle`."""
        return self._clock.idle(client_ids)

    def passes(self, round: int, replies: Sequence[Reply]) -> tuple[list[Reply], Mapping[int, str]]:
        """Let a round pass in which the clients of these replies begin their visits.

        Returns:
            The replies that are heard in it, in the order of arrival, and clients that will not be heard, with the
            reasons. Of a reply that comes late only the message is left: its measurements are of an earlier round.
        """
        rows = [row for reply in replies for row in reply.rows]
        closed = self._clock.round(round, self._visits(round, rows))
        waiting = self._waiting | {reply.client_id: reply for reply in replies}
        heard = [waiting.pop(client) for client in closed.arrived]
        self._waiting = {client: reply for client, reply in waiting.items() if client in self._clock.pending}
        self.unheard = tuple(reply for reply in replies if reply.client_id not in closed.arrived)
        self.num_heard = len(heard)
        return [
            reply if reply.round == round else msgspec.structs.replace(reply, evaluation=None, rows=())
            for reply in heard
        ], closed.missing

    def _visits(self, round: int, rows: Iterable[LedgerRow]) -> list[Visit]:
        return Visits(ledger_table(rows), self._prompt_tokens)[round]


class _Timed(HandsOn):
    """See `VirtualTime.over`."""

    def __init__(self, visitor: Visitor, time: VirtualTime) -> None:
        super().__init__(visitor)
        self._time = time

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        asked = {client: downlinks[client] for client in self._time.idle([*downlinks])}
        replies = sorted(super().visit(round, asked, evaluate=evaluate), key=lambda reply: reply.client_id)
        heard, missing = self._time.passes(round, replies)
        yield from heard
        if missing:
            self.leave_out(round, missing)
