"""`RayServer`: the server in a Ray actor. If it dies, a new one gets the round's messages again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from semcons_ray.distributed.cluster import NO_CODE, actor_options, passed_on
from semcons_ray.distributed.worker import ServerActor
from semcons_ray.errors import PlacementError, SemconsError, first_line
from semcons_ray.federation.server import ServerSpec, Verdict
from semcons_ray.metering.ledger import LedgerRow
from semcons_ray.parts import read_code

logger = logging.getLogger(__name__)


class RayServer:
    """The server in an actor; see `ServerProtocol` for its methods.

    Answers are passed on as they come, so that they are embedded while clients are at work. The driver keeps the
    round's messages until it has the verdict, so nothing is lost if the server dies.

    Args:
        spec: What the actor builds its server from.
        node_id: Node on which it runs.
        gpus: Its share of a GPU; 0 on the CPU.
        timeout_seconds: If a call takes longer, the server is taken for dead.
        max_restarts: How often it is replaced during a call before the run fails.
        room_timeout_seconds: How long to wait for its share of a GPU, if it has one.
        code: Folder with the code of parts of one's own, if there is any.

    Raises:
        PlacementError: No GPU had that share free in that time.
    """

    def __init__(
        self,
        spec: ServerSpec,
        *,
        node_id: str,
        gpus: float,
        timeout_seconds: float,
        max_restarts: int,
        room_timeout_seconds: float = 300.0,
        code: Path | None = None,
    ) -> None:
        self._spec = spec
        self._code = code
        self._files = read_code(code) if code else NO_CODE
        # It books no core, which would be idle: it works seldom and briefly, while clients generate.
        self._options = actor_options(node_id=node_id, threads=spec.threads, num_cpus=0, num_gpus=gpus)
        self._timeout_seconds = timeout_seconds
        self._max_restarts = max_restarts
        self._heard: list[tuple[str, tuple[Any, ...]]] = []
        self._pending: list[ray.ObjectRef[Any]] = []
        self._start()
        if gpus:  # it must have its share before workers ask for theirs: placement assigned GPUs in this order
            try:
                ray.get(self._actor.place.remote(True), timeout=room_timeout_seconds)
            except GetTimeoutError:
                raise PlacementError(
                    f"no node had {gpus:g} of a GPU free for the server in {room_timeout_seconds:g} s; wait for its "
                    f"users, or lower resources.server_gpus"
                ) from None

    def begin(self, round: int, client_ids: Sequence[int], kept: bytes = b"") -> None:
        """See `ServerProtocol.begin`."""
        self._heard.clear()
        self._pending.clear()
        self._tell("begin", round, tuple(client_ids), kept)

    def collect(self, client_id: int, uplink: bytes, asked_in: int | None = None) -> None:
        """See `ServerProtocol.collect`."""
        self._tell("collect", client_id, uplink, asked_in)

    def conclude(self) -> Verdict:
        """See `ServerProtocol.conclude`."""
        verdict: Verdict = self._ask("conclude")
        self._heard.clear()
        self._pending.clear()
        return verdict

    def similarity(self, round: int, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """See `ServerProtocol.similarity`."""
        cosines: list[float] = self._ask("similarity", round, tuple(predictions), tuple(references))
        return cosines

    def take_rows(self) -> list[LedgerRow]:
        """See `ServerProtocol.take_rows`."""
        rows: list[LedgerRow] = self._ask("take_rows")
        return rows

    def close(self) -> None:
        """Kill the actor."""
        ray.kill(self._actor, no_restart=True)

    def _start(self) -> None:
        self._actor = ServerActor.options(**self._options).remote(passed_on(code=self._code), self._files)  # type: ignore[attr-defined]
        self._pending = [self._actor.load.remote(self._spec)]
        for method, arguments in self._heard:
            self._pending.append(getattr(self._actor, method).remote(*arguments))

    def _tell(self, method: str, *arguments: Any) -> None:
        self._heard.append((method, arguments))
        self._pending.append(getattr(self._actor, method).remote(*arguments))

    def _ask(self, method: str, *arguments: Any) -> Any:
        for attempt in range(self._max_restarts + 1):
            try:
                for pending in self._pending:  # the limit is a call's, however many wait
                    ray.get(pending, timeout=self._timeout_seconds)
                answer = ray.get(getattr(self._actor, method).remote(*arguments), timeout=self._timeout_seconds)
                self._pending.clear()
                return answer
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:
                reason = first_line(error)
                logger.warning("the server died (attempt %d of %d): %s", attempt + 1, self._max_restarts + 1, reason)
                ray.kill(self._actor, no_restart=True)
                self._start()
        raise SemconsError(f"the server died {self._max_restarts + 1} times in {method}; see the Ray logs")
