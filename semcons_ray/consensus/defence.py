"""placeholder"""
from dataclasses import dataclass
from semcons_ray.consensus.evidence import Evidence, Ruling, no_defence
@dataclass(frozen=True)
class Independent:
    max_wins: float = 1.0
    def __call__(self, evidence: Evidence) -> Ruling:
        return no_defence(evidence)
