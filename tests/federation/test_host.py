"""What a host makes of clients that fail."""

from pathlib import Path

import pytest

from semcons_ray.errors import ClientError, MessageError
from semcons_ray.federation.host import ClientHost
from semcons_ray.federation.store import ClientStore
from semcons_ray.messages import PseudoLabels
from semcons_ray.metering.ledger import Ledger


class Idle:
    """A client that is never asked for anything."""

    has_trained = False

    def restore(self, tensors: dict[str, object]) -> None:
        assert not tensors


class Reading:
    """An algorithm that reads what it is sent, and no more."""

    def visit(self, client: Idle, round: int, downlink: bytes) -> bytes:
        PseudoLabels.decode(downlink)
        return b""

    def adopt(self, client: Idle, round: int, downlink: bytes) -> None:
        self.visit(client, round, downlink)


def test_a_message_that_is_none_is_the_failure_of_the_client_that_got_it(tmp_path: Path) -> None:
    host = ClientHost({3: Idle()}, Reading(), ClientStore(tmp_path), Ledger("worker-0", "n"))  # type: ignore[arg-type,dict-item]
    for asked in (lambda: host.visit(3, 2, b"nonsense", False), lambda: host.measure(3, 2, b"nonsense")):
        with pytest.raises(ClientError, match=r"^client 3, round 2, worker-0: .*PseudoLabels") as failure:
            asked()
        assert isinstance(failure.value.__cause__, MessageError)
    assert not any(tmp_path.iterdir())
