"""What algorithms keep of the server."""

import pytest

from semcons_ray.errors import RunFolderError
from semcons_ray.federation.algorithms.fedadam import FedAdam
from semcons_ray.federation.algorithms.flora import Flora
from semcons_ray.federation.algorithms.semantic_consensus import SemanticConsensus
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.server import ServerState
from semcons_ray.messages import NO_LABELS

COHORT = Cohort(2, 1.0, 0)


@pytest.mark.parametrize("algorithm", [SemanticConsensus(COHORT), FedAdam(COHORT, (8, 8)), Flora(COHORT, (8, 8))])
@pytest.mark.parametrize("state", [NO_LABELS.encode("none"), ServerState(b"").encode()[:-1]])
def test_a_state_of_another_version_or_a_damaged_one_is_named_in_one_line(algorithm: object, state: bytes) -> None:
    with pytest.raises(RunFolderError, match=r"the server's state, in state/ .*; start the run again in a new folder"):
        algorithm.downlinks(2, state, [0, 1])  # type: ignore[attr-defined]
