"""vLLM as a generation engine: one base model, an adapter for each request, and all clients' prompts in one batch.

vLLM runs inside this process, and only one thread uses it: the thread accepts requests, steps the batch, and hands
answers out. So a client's prompts join the batch of those that came before, no request has to pass between processes,
and when the process ends, nothing of the engine is left behind.

Each prompt has a random stream of its own, so the rest of the batch does not change what is drawn. It may change the
last bits of a logit, since matrix products of other shapes add up in another order. Where that tips a draw, or a tie
between two tokens, answers differ from run to run. With transformers they never do.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import resource
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from semcons_ray.errors import ConfigError, EngineError, ModelError, first_line
from semcons_ray.modeling.engine import EngineReply, EngineRequest, Told

logger = logging.getLogger(__name__)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Maximum LoRA ranks with which vLLM can be started."""

SHARED_MEMORY = Path("/dev/shm")

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are placed by the system: clients work on the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def check_installed() -> None:
    """Check that vLLM is installed.

    Raises:
        ConfigError: It is not; the message says how to install it.
    """
    if find_spec("vllm") is None:
        raise ConfigError(
            "generation.engine is vllm, but vLLM is not installed: `make vllm`, or pip install vllm==0.32.0 where "
            "there is a GPU; or set generation.engine to transformers"
        )


def room_for_rank(rank: int) -> int:
    """The smallest of `RANKS` that is enough for an adapter of this rank.

    Raises:
        ConfigError: None is.
    """
    if rank > RANKS[-1]:
        raise ConfigError(f"model.lora.rank is {rank}, and generation.engine vllm takes ranks up to {RANKS[-1]}")
    return next(room for room in RANKS if room >= rank)


@dataclass(frozen=True)
class EngineSpec:
    """Everything that an engine is built from; it is sent to its process once.

    Attributes:
        name: Its name in the ledger.
        model: Name of the model, as for `resolve_model`.
        dtype: Type of weights, adapters and the key-value cache.
        threads: CPU threads.
        gpus: Share of a GPU; 0 on a CPU.
        max_length: Most tokens of a prompt with its answer.
        max_rank: Highest rank of an adapter.
        max_adapters: Most adapters in the batch at a time.
        cache_bytes: Size of the key-value cache.
        stops: Whether requests name texts that end answers, for which it needs the model's tokenizer.
    """

    name: str
    model: str
    dtype: str
    threads: int
    gpus: float
    max_length: int
    max_rank: int
    max_adapters: int
    cache_bytes: int
    stops: bool = False

    def build(self, gpus: str) -> VllmEngine:
        """Load the model.

        Args:
            gpus: UUIDs of the GPUs on which it will compute, separated by commas, for the ledger.

        Raises:
            ConfigError: vLLM is not installed here.
            ModelError: vLLM cannot load the model.
        """
        return VllmEngine(self, gpus)


@dataclass
class _Job:
    """A request in work: its answers so far, the prompts without one yet by vLLM's id, how likely the first answers
    are, and the time spent on it."""

    request: EngineRequest
    done: Future[EngineReply] = field(default_factory=Future)
    adapter_id: int = 0
    unanswered: dict[str, int] = field(default_factory=dict)
    answers: dict[int, list[int]] = field(default_factory=dict)
    told: dict[int, Told] = field(default_factory=dict)
    busy_seconds: float = 0.0


class VllmEngine:
    """A vLLM engine in this process; see `Engine` for its use.

    Args:
        spec: What it is built from.
        gpus: See `EngineSpec.build`.

    Raises:
        ConfigError: vLLM is not installed here.
        ModelError: vLLM cannot load the model.
    """

    def __init__(self, spec: EngineSpec, gpus: str) -> None:
        check_installed()
        self.spec = spec
        self._gpus = gpus
        self._node = socket.gethostname()
        self._engine = _load(spec)
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._num_adapters = 0
        self._accounted_until = 0.0
        self._failure: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name=spec.name, daemon=True)
        self._thread.start()

    def generate(self, request: EngineRequest) -> EngineReply:
        """See `Engine.generate`."""
        job = _Job(request)
        self._inbox.put(job)
        return job.done.result()

    @property
    def is_broken(self) -> bool:
        """Whether an error has made it unusable; it then answers no request."""
        return self._failure is not None

    def host_bytes(self) -> int:
        """Peak memory of this process in bytes, including whatever else runs in it."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def wait(self) -> None:
        """Wait until it is loaded, which it is already."""

    def close(self) -> None:
        """End the thread; requests in work are finished first."""
        self._inbox.put(None)
        self._thread.join()
        self._engine.engine_core.shutdown()
        del self._engine

    # The thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self.spec.threads)  # each thread has a number of its own
        open_for_more = True
        while open_for_more or self._jobs:
            try:
                job = self._inbox.get(block=not self._jobs)
            except queue.Empty:
                self._step()
                continue
            if job is None:
                open_for_more = False
                continue
            if not self._jobs:
                self._accounted_until = time.time()
            try:
                self._begin(job)
            except Exception as error:
                job.done.set_exception(self._failure or EngineError(f"{self.spec.name}: {first_line(error)}"))
                if job.unanswered:  # vLLM has some of its prompts already
                    self._break(error)

    def _begin(self, job: _Job) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.lora.request import LoRARequest

        if self._failure:
            raise self._failure
        self._num_adapters += 1
        job.adapter_id = self._num_adapters
        with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
            for name, content in job.request.adapter.items():
                Path(folder, name).write_bytes(content)
            adapter = LoRARequest(f"{self.spec.name}-{job.adapter_id}", job.adapter_id, folder)
            self._engine.add_lora(adapter)
        for index, (prompt, seed) in enumerate(zip(job.request.prompts, job.request.seeds, strict=True)):
            sampling = SamplingParams(
                max_tokens=job.request.max_new_tokens,
                temperature=job.request.temperature,
                top_p=job.request.top_p,
                top_k=job.request.top_k,
                seed=seed if job.request.temperature > 0 else None,
                stop_token_ids=list(job.request.ends),
                stop=list(job.request.stop),
                ignore_eos=True,  # ends are named
                detokenize=bool(job.request.stop),
                logprobs=0 if index < job.request.num_told else None,  # 0: of no token but the one that is written
            )
            request_id = f"{job.adapter_id}-{index}"
            job.unanswered[request_id] = index
            self._engine.add_request(request_id, tokens_input(list(prompt)), sampling, lora_request=adapter)
        self._jobs.append(job)
        if not job.unanswered:
            self._finish(job)

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._break(error)
            return
        share = (time.perf_counter() - began) / sum(len(job.unanswered) for job in self._jobs)
        for job in self._jobs:
            job.busy_seconds += share * len(job.unanswered)
        of_adapter = {job.adapter_id: job for job in self._jobs}
        for output in outputs:
            if output.finished:
                job = of_adapter[int(output.request_id.partition("-")[0])]
                index, (written, *_) = job.unanswered.pop(output.request_id), output.outputs
                job.answers[index] = ids = list(written.token_ids)
                if written.logprobs:
                    likely = [found[token].logprob for token, found in zip(ids, written.logprobs, strict=False)]
                    job.told[index] = Told(ids, likely)
                if not job.unanswered:
                    self._finish(job)

    def _break(self, error: Exception) -> None:
        """Fail all requests, now and later: after an error inside vLLM the state of its batch is unknown."""
        logger.error("%s broke", self.spec.name, exc_info=error)
        self._failure = EngineError(f"{self.spec.name} broke: {type(error).__name__}: {first_line(error)}")
        for job in self._jobs:
            job.done.set_exception(self._failure)
        self._jobs.clear()

    def _finish(self, job: _Job) -> None:
        self._jobs.remove(job)
        self._engine.remove_lora(job.adapter_id)
        written = [job.answers[index] for index in range(len(job.request.prompts))]
        ends = set(job.request.ends)
        started_at = self._accounted_until
        self._accounted_until += job.busy_seconds
        job.done.set_result(
            EngineReply(
                answers=[ids[:-1] if ids and ids[-1] in ends else ids for ids in written],
                num_tokens=sum(map(len, written)),
                engine=self.spec.name,
                node=self._node,
                gpus=self._gpus,
                started_at=started_at,
                busy_seconds=job.busy_seconds,
                told=[told for _, told in sorted(job.told.items())],
            )
        )


def _load(spec: EngineSpec) -> Any:
    os.environ.update(_ENVIRONMENT)
    from vllm import EngineArgs, SamplingParams
    from vllm.inputs import tokens_input
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.sample import sampler

    from semcons_ray.modeling.packaged import resolve_model

    if not spec.gpus:  # the ranks of told tokens, which nobody asks for: to compile them in C++ takes half a minute
        sampler.batched_count_greater_than = lambda likely, chosen: (likely >= chosen).sum(-1)
    # Collecting what is left of an earlier engine destroys vLLM's process groups: do it now, not while this one loads.
    gc.collect()
    set_num_threads = torch.set_num_threads
    set_num_threads(spec.threads)
    arguments = EngineArgs(
        model=str(resolve_model(spec.model)),
        dtype=spec.dtype,
        max_model_len=spec.max_length,
        enable_lora=True,
        max_loras=spec.max_adapters,
        max_lora_rank=room_for_rank(spec.max_rank),
        kv_cache_memory_bytes=spec.cache_bytes,
        # With the cache's size given, this only says how much of a GPU must be free at the start.
        gpu_memory_utilization=0.9 * spec.gpus if spec.gpus else 0.9,
        enable_prefix_caching=False,  # an adapter is asked once: nothing that it computed is of use again
        skip_tokenizer_init=not spec.stops,
        generation_config="vllm",
        disable_log_stats=True,
    )
    try:
        engine = LLMEngine.from_engine_args(arguments)
        # What this device has no kernel for shows with the first token only; what is compiled for it, is so now.
        probe = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, logprobs=0)
        engine.add_request("probe", tokens_input([0]), probe)
        while engine.has_unfinished_requests():
            engine.step()
        return engine
    except Exception as error:  # vLLM raises many kinds; all of them mean the same to the user
        logger.exception("vLLM cannot load %s", spec.model)
        raise ModelError(
            f"vLLM cannot load model {spec.model}: {first_line(error)}; set generation.engine to transformers"
        ) from error
    finally:
        torch.set_num_threads = set_num_threads  # vLLM puts a function in its place that does nothing
