"""FedAvg-LoRA of this package against Flower's FedAvg: the same clients, data and seeds, aggregated by each.

Flower's strategy gets what its clients would return from `fit`: NumPy arrays and numbers of examples. This package's
runs as in `semcons run`. Each starts a round from its own aggregate, so a difference would grow over rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semcons_ray.config import ExperimentConfig, validate_config
from semcons_ray.data.split import read_split
from semcons_ray.federation.adapter_model import AdapterModels
from semcons_ray.federation.algorithms import build_algorithm
from semcons_ray.federation.host import HostSpec
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.store import mark
from semcons_ray.federation.weights import pack, unpack
from semcons_ray.messages import AdapterUpdate, GlobalAdapter
from semcons_ray.runs.experiment import run_experiment

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.invariants.runs import Silent
from tests.tiny import write_data, write_model


def config_in(folder: Path, num_rounds: int) -> ExperimentConfig:
    """Three clients with unequal numbers of examples, and a tiny Llama."""
    return validate_config(
        {
            "num_rounds": num_rounds,
            "algorithm": {"name": "fedavg_lora", "weight_dtype": "float32"},
            "data": {
                "source": str(write_data(folder / "examples.jsonl")),
                "partition": "quantity",
                "examples_per_client": 16,
                "num_test": 6,
            },
            "prompts": {"budget": 6},
            "clients": {"num_clients": 3},
            "model": {"name": str(write_model(folder / "llama")), "dtype": "float32", "max_length": 64},
            "training": {"learning_rate": 5e-3},
            "evaluation": {"num_answers": 3},
            "resources": {"fleet": "local", "device": "cpu"},
        },
        where="benchmark",
    )


def flower_rounds(config: ExperimentConfig, run: Path, state: Path) -> list[dict[str, np.ndarray]]:
    """The aggregate of each round by Flower's strategy."""
    import flwr.common
    from flwr.server.client_proxy import ClientProxy
    from flwr.server.strategy import FedAvg

    class Proxy(ClientProxy):
        def get_properties(self, *_: Any) -> Any: ...
        def get_parameters(self, *_: Any) -> Any: ...
        def fit(self, *_: Any) -> Any: ...
        def evaluate(self, *_: Any) -> Any: ...
        def reconnect(self, *_: Any) -> Any: ...

    split = read_split(run / "data.parquet")
    ranks = config.client_ranks()
    cohort = Cohort(config.clients.num_clients, 1.0, config.seed)
    algorithm = build_algorithm(config.algorithm, cohort, ranks, config.num_rounds)
    models = AdapterModels(
        model=config.model,
        device="cpu",
        threads=1,
        ranks=ranks,
        training=config.client_training(),
        generation=config.client_generation(),
        clients=range(config.clients.num_clients),
    )
    host = HostSpec(
        models=models,
        algorithm=algorithm,
        private=split.private,
        generation=config.client_generation(),
        public_prompts=b"",
        test=split.test,
        num_answers=0,
        seed=config.seed,
        state=state,
        mark=mark(state),
    ).build("flower")
    strategy = FedAvg()
    aggregates: list[dict[str, np.ndarray]] = []
    for round in range(1, config.num_rounds + 1):
        downlink = b""
        if aggregates:
            tensors = {key: torch.from_numpy(value) for key, value in aggregates[-1].items()}
            downlink = GlobalAdapter(round_number=round - 1, tensors=pack(tensors, "float32")).encode()
        results = []
        for client_id in range(config.clients.num_clients):
            update = AdapterUpdate.decode(host.visit(client_id, round, downlink, evaluate=False).uplink)
            sent = {key: value.numpy() for key, value in sorted(unpack(update.tensors).items())}
            result = flwr.common.FitRes(
                status=flwr.common.Status(flwr.common.Code.OK, ""),
                parameters=flwr.common.ndarrays_to_parameters(list(sent.values())),
                num_examples=update.num_examples,
                metrics={},
            )
            results.append((Proxy(str(client_id)), result))
        parameters, _ = strategy.aggregate_fit(round, results, [])
        assert parameters is not None
        aggregates.append(dict(zip(sent, flwr.common.parameters_to_ndarrays(parameters), strict=True)))
    return aggregates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = config_in(folder, args.rounds)
        run_experiment(config, folder / "run", Silent())
        theirs = flower_rounds(config, folder / "run", folder / "state")[-1]
        ours = unpack((folder / "run" / "state" / f"server_{args.rounds:03d}").read_bytes())
        examples = [len(share) for share in read_split(folder / "run" / "data.parquet").private]
    import flwr

    result = {
        "flwr": flwr.__version__,
        "rounds": args.rounds,
        "private_examples": examples,
        "tensors": len(ours),
        "largest_difference": max(float(np.abs(theirs[key] - value.numpy()).max()) for key, value in ours.items()),
        "largest_value": max(float(value.abs().max()) for value in ours.values()),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
