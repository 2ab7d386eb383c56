"""The job in Flower: the server, and the simulation; run.py calls it in an environment with flwr[simulation].

    python simulate.py JOB.json FOLDER

It writes the last average to FOLDER in PEFT's format, and to FOLDER/rounds.json when each round ended (unix seconds;
round 0: when the base model was measured) with the NLL of the test set.
"""

import json
import sys
import time
from pathlib import Path

import client_app
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import get_peft_model_state_dict

job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
out = Path(sys.argv[2])
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """FedAvg, with the average measured on the server after each round."""
    model, _ = client_app.model_of(job)
    rounds = []

    def measured(round: int, arrays: ArrayRecord) -> MetricRecord:
        nll = client_app.evaluate(job, arrays)
        rounds.append({"round": round, "ended_at": time.time(), "nll": nll})
        return MetricRecord({"nll": nll})

    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=job["clients"], min_train_nodes=job["clients"])
    strategy.start(
        grid,
        ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=job["rounds"],
        train_config=ConfigRecord(job),
        evaluate_fn=measured,
    )
    model.save_pretrained(out)  # the last average, since it was measured last
    (out / "rounds.json").write_text(json.dumps(rounds), encoding="utf-8")


run_simulation(
    server_app,
    client_app.app,
    num_supernodes=job["clients"],
    backend_config={
        "init_args": {"address": "local", "num_cpus": job["workers"] * job["threads"], "include_dashboard": False},
        "client_resources": {"num_cpus": job["threads"], "num_gpus": 0},
    },
)
