"""How long it takes to let 10,000 clients' 100 rounds pass in virtual time, on one core, and how much memory."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import pandas as pd

from semcons_ray.config import FederationConfig, validate_config
from semcons_ray.metering.environment import describe_environment
from semcons_ray.reporting.replay import Recorded, replay
from semcons_ray.timeline.devices import Model

FEDERATIONS = {
    "synchronous": {},
    "deadline": {"policy": "deadline", "policy_options": {"hours": 0.02}},
    "semi_async": {"policy": "semi_async", "policy_options": {"buffer_size": 2500}},
}


def recorded(num_clients: int, num_rounds: int) -> Recorded:
    """A run whose ledger has a row of training and one of answers for each client and round, of drawn sizes."""
    rng, count = np.random.default_rng(0), num_clients * num_rounds
    rounds, clients = np.repeat(np.arange(1, num_rounds + 1), num_clients), np.tile(np.arange(num_clients), num_rounds)
    visits = pd.DataFrame({"round": rounds, "client_id": clients})
    trains = visits.assign(
        stage="fine_tune", tokens=rng.integers(2000, 4000, count), uplink_bytes=0, downlink_bytes=2000
    )
    answers = visits.assign(
        stage="generate",
        tokens=rng.integers(200, 400, count),
        uplink_bytes=rng.integers(1500, 2500, count),
        downlink_bytes=0,
    )
    ledger = pd.concat([trains, answers])
    settings = {"num_rounds": num_rounds, "clients": {"num_clients": num_clients}, "resources": {"fleet": "local"}}
    config = validate_config(settings, where="benchmark")
    models = {config.model.name: Model(parameters=134_515_008, layers=30)}
    return Recorded(
        config,
        models,
        ledger,
        prompt_tokens=1000,
        example_tokens=60.0,
        adapter=0.0,
        losses=pd.Series({num_rounds: 1.0}),
        num_rounds=num_rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    run = recorded(args.clients, args.rounds)
    found: dict[str, object] = {"clients": args.clients, "rounds": args.rounds, "policies": {}}
    for name, policy in FEDERATIONS.items():
        federation = FederationConfig(
            devices={"laptop-cpu": 3, "raspberry-pi-5": 1, "rtx-4090": 2, "macbook-m4": 3},
            links={"fibre": 3, "dsl": 3, "4g": 2, "cable": 1},
            **policy,
        )
        began, used = time.perf_counter(), time.process_time()
        done = replay(run, federation)
        seconds = time.perf_counter() - began
        row = {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(time.process_time() - used, 2),
            "visits": len(done.visits),
            "microseconds a visit": round(1e6 * seconds / len(done.visits), 1),
            "virtual_hours": round(float(done.totals["hours"]), 3),
        }
        found["policies"][name] = row  # type: ignore[index]
        print(name, row, flush=True)
    found["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    found["environment"] = describe_environment()
    Path(__file__).with_name("results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(found["peak_gib"], "GiB at the peak")


if __name__ == "__main__":
    main()
