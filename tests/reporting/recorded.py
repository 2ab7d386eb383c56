"""Finished runs as a replay reads them, made from rows of a ledger."""

from collections.abc import Mapping, Sequence

import pandas as pd

from semcons_ray.config import validate_config
from semcons_ray.reporting.replay import Recorded
from semcons_ray.timeline.devices import Model

TEXT = (
    {"stage": "fine_tune", "tokens": 3000, "downlink_bytes": 1000},
    {"stage": "generate", "tokens": 500, "uplink_bytes": 1000},
)
WEIGHTS = (
    {"stage": "fine_tune", "tokens": 1000, "downlink_bytes": 5_000_000},
    {"stage": "encode", "uplink_bytes": 5_000_000},
)
"""What a visit of consensus, and of averaging, has in the ledger."""


def recorded(algorithm: str, rows: Sequence[Mapping[str, object]]) -> Recorded:
    config = validate_config(
        {"num_rounds": 2, "clients": {"num_clients": 2}, "algorithm": {"name": algorithm}}, where="test"
    )
    every = [{"tokens": 0, "uplink_bytes": 0, "downlink_bytes": 0, **row} for row in rows]
    who = [{"round": round, "client_id": client} for round in (1, 2) for client in (0, 1)]
    ledger = pd.DataFrame([{**row, **one} for row in every for one in who])
    return Recorded(
        config=config,
        models={config.model.name: Model(parameters=134_515_008, layers=30)},
        ledger=ledger,
        prompt_tokens=0,
        example_tokens=50.0,
        adapter=305_280.0,
        losses=pd.Series({1: 2.0, 2: 1.0}),
        num_rounds=2,
    )
