"""The clock: a discrete-event simulation of rounds, by simpy, in which visits and transfers take virtual time.

It knows what a visit asks of a device and of a link, and not what is learnt in it. A run asks it after each round who
was in time; a replay asks it how long a finished run's rounds take. Both go through `Clock.round`, so in the same
federation they take the same times.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from simpy import Environment, Event

from semcons_ray.config import ByClient
from semcons_ray.timeline.availability import Availability
from semcons_ray.timeline.devices import MINILM, Device, Model
from semcons_ray.timeline.links import Link
from semcons_ray.timeline.members import Members
from semcons_ray.timeline.pipe import Pipe
from semcons_ray.timeline.policies import Policy
from semcons_ray.timeline.work import ServerWork, Visit

COLUMNS = (
    *("round", "client_id", "counted_in", "asked_at", "began_at", "downlink_seconds", "fine_tune_seconds"),
    *("generate_seconds", "latency_seconds", "uplink_seconds", "ended_at", "downlink_bytes", "uplink_bytes"),
)
"""Columns of `Clock.visits`. Times are virtual seconds since the run began. `counted_in` is the round in which the
client's answers counted, 0 if they did in none; `began_at` is when it was there to begin."""

PASSES = 3
"""How often the server reads or writes what it is sent: it decodes, adds up or compares, and encodes."""

LATE = "its answers were not there in time, by federation.policy"
GONE = "it was gone before its answers were through, by federation.availability or federation.dropout"


@dataclass(frozen=True)
class Site:
    """The server's machine.

    Attributes:
        device: What it computes on.
        link: Its link, which all clients share.
    """

    device: Device
    link: Link


@dataclass(frozen=True)
class Closed:
    """A round that has ended.

    Attributes:
        round: The round.
        started_at: When clients were asked, in virtual seconds since the run began.
        closed_at: When the server stopped to wait for answers.
        arrived: Clients whose answers count in it, in the order of arrival, and the round in which each was asked.
        missing: Clients asked in it whose answers will not count, and why.
    """

    round: int
    started_at: float
    closed_at: float
    arrived: Mapping[int, int]
    missing: Mapping[int, str]


class Clock:
    """A federation's virtual time.

    Args:
        members: The clients.
        site: The server.
        policy: When a round ends.
        availability: When clients are there.
        models: Each client's model, by client id; None: it computes elsewhere, in no time.
        batch_size: Prompts that a client answers at a time.
        step_tokens: Tokens that it trains on at a time.

    Attributes:
        members: The clients.
        site: The server.
    """

    def __init__(
        self,
        members: Members,
        site: Site,
        policy: Policy,
        availability: Availability,
        models: ByClient[Model | None],
        *,
        batch_size: int,
        step_tokens: float,
    ) -> None:
        self.members = members
        self.site = site
        self._policy = policy
        self._availability = availability
        self._models = models
        self._batch_size = batch_size
        self._step_tokens = step_tokens
        self._env = Environment()
        self._to_clients = Pipe(self._env, site.link.up_bytes_per_second)
        self._to_server = Pipe(self._env, site.link.down_bytes_per_second)
        self._rows = array("d")
        self._at_work: dict[int, int] = {}  # and the round in which each was asked
        self._heard: dict[int, int] = {}  # likewise, of those whose answers will count when the round ends
        self._awaited: set[int] = set()
        self._counted_in = 1
        self._until, self._is_over = Event(self._env), _at_any_end

    @property
    def seconds(self) -> float:
        """Virtual time since the run began."""
        return float(self._env.now)

    @property
    def pending(self) -> Mapping[int, int]:
        """Clients that are still at work, or whose answers count in the next round, and the round in which each was
        asked."""
        return self._at_work | self._heard

    def idle(self, client_ids: Sequence[int]) -> list[int]:
        """Those of the clients that can be asked now. While all are still at work on earlier rounds, and there is no
        answer to form a round of, time goes on."""
        while not (idle := [one for one in client_ids if one not in self._at_work and one not in self._heard]):
            if self._heard or not client_ids:
                break
            self._go_on(_at_any_end)
        return idle

    def round(self, round: int, visits: Sequence[Visit]) -> Closed:
        """Let clients begin their visits now, and time go on until the policy ends the round.

        Args:
            round: The round.
            visits: What each client that is asked does.
        """
        started_at, asked = self.seconds, [visit.client_id for visit in visits]
        self._counted_in = round
        self._awaited = {*asked, *self._at_work} if self._policy.keeps_late else {*asked}
        # A client's id decides nothing: of those that are done at the same time, who comes first is drawn.
        for visit in sorted(visits, key=lambda visit: self.members.chances[visit.client_id]):
            self._at_work[visit.client_id] = round
            self._env.process(self._visit(visit))
        if math.isfinite(self._policy.seconds):
            self._env.timeout(self._policy.seconds).callbacks.append(lambda _: self._end(round))
        if not self._is_enough():
            self._go_on(self._is_enough)
        arrived, self._heard, self._counted_in = self._heard, {}, round + 1
        later = self._at_work if self._policy.keeps_late else ()
        missing = {
            one: LATE if one in self._at_work else GONE for one in asked if one not in arrived and one not in later
        }
        return Closed(round, started_at, self.seconds, arrived, missing)

    def serve(self, work: ServerWork) -> None:
        """Let the server work, and time go on so long."""
        device = self.site.device
        seconds = device.embedding_seconds(work.embedded_tokens, MINILM)
        seconds += PASSES * work.received_bytes / device.bytes_per_second
        if seconds:
            self._env.run(until=self._env.now + seconds)

    def finish(self) -> None:
        """Let those who are still at work after the last round end their visits, whose answers count in none."""
        self._counted_in = 0
        while self._at_work:
            self._go_on(_at_any_end)

    def visits(self) -> pd.DataFrame:
        """A row for each visit that has ended, in the order of their ends; see `COLUMNS`."""
        table = pd.DataFrame(np.array(self._rows).reshape(-1, len(COLUMNS)), columns=[*COLUMNS])
        whole = [name for name in COLUMNS if not name.endswith(("_at", "_seconds"))]
        return table.astype(dict.fromkeys(whole, "int64"))

    def _go_on(self, is_over: Callable[[], bool]) -> None:
        """Let time go on until it is over, which may be so whenever a visit has ended."""
        self._until, self._is_over = Event(self._env), is_over
        self._env.run(until=self._until)

    def _is_enough(self) -> bool:
        return not self._awaited or self._policy.is_enough(len(self._heard))

    def _end(self, round: int) -> None:
        """End a round that takes too long, if it has not ended."""
        if self._counted_in == round and not self._until.triggered:
            self._until.succeed()

    def _visit(self, visit: Visit) -> Generator[Event, None, None]:
        """A client's visit, from when it is asked. Its answers are lost if it is gone before they are through."""
        env, client_id, model = self._env, visit.client_id, self._models[visit.client_id]
        device, link, chance = self.members[client_id]
        asked_at = env.now
        start, end = self._availability.window(client_id, chance, asked_at)
        if start == math.inf:
            self._ends(visit, asked_at, asked_at, 0.0, 0.0, 0.0, 0.0, 0.0, is_heard=False)
            return
        if start > asked_at:
            yield env.timeout(start - asked_at)
        began_at = env.now
        if visit.downlink_bytes:
            yield self._to_clients.transfer(visit.downlink_bytes, link.down_bytes_per_second)
        downlink = env.now - began_at
        training = answering = 0.0
        if model:
            training = device.training_seconds(visit.trained_tokens, model, visit.trained_tokens / self._step_tokens)
            answering = device.generation_seconds(
                visit.generated_tokens, model, self._batch_size, visit.prompt_tokens
            )
        latency = 2 * (link.latency_seconds + self.site.link.latency_seconds)  # there and back, in one wait
        left = max(end - env.now, 0.0)
        stays = training + answering + latency <= left and not self.members.drops_out(client_id, visit.round)
        training = min(training, left)  # as far as it comes
        answering = min(answering, left - training)
        latency = min(latency, left - training - answering)
        yield env.timeout(training + answering + latency)
        uplink_at = env.now
        if stays and visit.uplink_bytes:
            yield self._to_server.transfer(visit.uplink_bytes, link.up_bytes_per_second)
        uplink = env.now - uplink_at
        is_heard = stays and env.now <= end
        self._ends(visit, asked_at, began_at, downlink, training, answering, latency, uplink, is_heard=is_heard)

    def _ends(self, visit: Visit, *times: float, is_heard: bool) -> None:
        """Note a visit, and look whether what is waited for is over."""
        round = self._at_work.pop(visit.client_id)
        counts = is_heard and (self._policy.keeps_late or round == self._counted_in)
        if counts:
            self._heard[visit.client_id] = round
        self._awaited.discard(visit.client_id)
        sizes = (visit.downlink_bytes, visit.uplink_bytes if is_heard else 0)
        counted_in = self._counted_in if counts else 0
        self._rows.extend((round, visit.client_id, counted_in, *times, self._env.now, *sizes))
        if not self._until.triggered and self._is_over():
            self._until.succeed()


def _at_any_end() -> bool:
    return True
