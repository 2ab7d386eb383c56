"""Median seconds of a no-op round in Flower's simulation; run.py calls it in an environment of its own.

python flower_round.py NUM_CLIENTS
"""

import json
import logging
import statistics
import sys
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

NUM_TEXTS, WARM_UP, ROUNDS = 64, 5, 20
clients = int(sys.argv[1])
client_app = ClientApp()
server_app = ServerApp()


@client_app.query()
def answer(message: Message, context: object) -> Message:
    texts = [f"client {message.metadata.dst_node_id} answers prompt {i} at some length" for i in range(NUM_TEXTS)]
    return Message(RecordDict({"answers": ConfigRecord({"texts": texts})}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: object) -> None:
    seconds = []
    nodes: list[int] = []
    while len(nodes) < clients:
        nodes = list(grid.get_node_ids())
        time.sleep(0.1)
    for round in range(WARM_UP + ROUNDS):
        began = time.perf_counter()
        content = RecordDict({"prompt": ConfigRecord({"payload": b"x" * 4096})})
        messages = [Message(content, dst_node_id=node, message_type="query") for node in nodes]
        replies = list(grid.send_and_receive(messages))
        if len(replies) != clients or any(reply.has_error() for reply in replies):
            raise SystemExit("Flower lost answers")
        if round >= WARM_UP:
            seconds.append(time.perf_counter() - began)
    print("\n" + json.dumps({"flower_seconds": statistics.median(seconds)}), flush=True)


logging.getLogger("flwr").setLevel(logging.ERROR)
run_simulation(
    server_app,
    client_app,
    num_supernodes=clients,
    backend_config={
        "init_args": {"num_cpus": 2, "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0},
    },
)
