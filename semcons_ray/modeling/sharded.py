"""A language model whose memory is divided among the ranks of a process group, by DeepSpeed's ZeRO.

Every rank runs the same calls in the same order, takes its part of each batch, and ends with the same adapter, loss and
answers; together they act as one `LanguageModel`.

With ZeRO-3 each of N ranks holds 1/N of the base weights, and a layer's weights are gathered while it is computed. The
adapter is not divided: it is whole on every rank, since it is a thousandth of the base. Its gradients are summed over
the ranks, and every rank takes the same step of the plain optimizer. So whatever algorithms do to gradients, LoRA ranks
and frozen adapters works as with an undivided model.

With ZeRO-2 every rank holds the whole base, and DeepSpeed divides only gradients and optimizer state of the adapter.
These are small beside the base, so the gain is that the ranks work in parallel.

Source: S. Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from semcons_ray.config import GenerationConfig, ShardingConfig, TrainingConfig
from semcons_ray.errors import ConfigError
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.language_model import LanguageModel, Value
from semcons_ray.modeling.masters import Parameters
from semcons_ray.modeling.optimizer import AdamW, schedule

INSTALL = "pip install --no-deps -r requirements-deepspeed.lock"


def import_deepspeed() -> Any:
    """Import DeepSpeed.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(f"sharding.models needs DeepSpeed ({error}): {INSTALL}") from error
    # Else it compiles C++ code for minutes, for a CPU collective that is not used here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ShardedLanguageModel(LanguageModel):
    """One rank's part of a `LanguageModel`; the process group must have been joined.

    Args:
        name: See `LanguageModel`.
        sharding: The ZeRO stage, and whether what it divides is kept in host memory.
        device: See `LanguageModel`.
        settings: The other arguments of `LanguageModel`.

    Raises:
        ConfigError: DeepSpeed is not installed.
        ModelError: See `LanguageModel`.
    """

    def __init__(self, name: str, *, sharding: ShardingConfig, device: str, **settings: Any) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self._sharding = sharding
        self._deepspeed = import_deepspeed()
        super().__init__(name, device=device, **settings)

    @property
    def writes(self) -> bool:
        """Whether this rank writes clients' files: only the first does."""
        return self.rank == 0

    def held_parameters(self) -> int:
        """How many of the base model's parameters this rank holds between calls."""
        parameters = [value for key, value in self.model.named_parameters() if key not in self._parameters]
        return sum(value.numel() + getattr(value, "ds_tensor", torch.empty(0)).numel() for value in parameters)

    def export_adapter(self, adapter: Adapter, folder: Path) -> None:
        """See `LanguageModel.export_adapter`; only the first rank writes."""
        if self.writes:
            super().export_adapter(adapter, folder)

    _alone = False

    def of_all_ranks(self, value: Value) -> list[Value]:
        """See `LanguageModel.of_all_ranks`."""
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def _load_base(self, name: str, dtype: torch.dtype, **options: Any) -> Any:
        if self._sharding.zero_stage == 2:
            return super()._load_base(name, dtype, **options)
        from transformers.integrations import HfDeepSpeedConfig

        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # must be given; nothing here depends on it
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "zero_optimization": {
                "stage": 3,
                # All is divided, and only the matrix at work is gathered: memory before speed.
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            },
        }
        if self._sharding.cpu_offload:
            settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        while_it_lives = HfDeepSpeedConfig(settings)  # from_pretrained divides each layer as it is made
        base = super()._load_base(name, dtype)  # and puts its part where it is to be, which the options would forbid
        del while_it_lives
        self._engine, *_ = self._deepspeed.initialize(model=base, config=settings)
        return self._engine.module

    def _optimizer(
        self, masters: list[torch.nn.Parameter], training: TrainingConfig, state: dict[str, Tensor], num_steps: int
    ) -> AdamW:
        if self._sharding.zero_stage == 2:
            return ZeroAdamW(self._deepspeed, masters, training, num_steps, cpu_offload=self._sharding.cpu_offload)
        return super()._optimizer(masters, training, state, num_steps)

    def _share(self, batch: list[int]) -> tuple[list[int], float]:
        mine = batch[self.rank :: self.num_ranks]
        return (mine, 1.0) if mine else (batch[:1], 0.0)  # all must take part in gathering the weights

    def _reduced(self, total: Tensor, masters: Parameters) -> Tensor:
        grads = [master.grad for master in masters.values() if master.grad is not None]
        if self._sharding.zero_stage == 2:
            grads = []  # the optimizer's work
        flat = torch.cat([total.double().reshape(1), *(grad.double().flatten() for grad in grads)])
        dist.all_reduce(flat)
        for grad, summed in zip(grads, torch.split(flat[1:], [grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))
        return flat[0]

    def _gathered(self, nll: Tensor) -> list[float]:
        dist.all_reduce(nll)
        return super()._gathered(nll)

    def _written(
        self, texts: Sequence[list[int]], generation: GenerationConfig, draws: NDArray[np.float64]
    ) -> list[list[list[int]]]:
        mine, _ = self._share([*range(len(texts))])
        parts = self.of_all_ranks(super()._written([texts[i] for i in mine], generation, draws[:, mine]))
        return [
            [parts[i % self.num_ranks][sample][i // self.num_ranks] for i in range(len(texts))]
            for sample in range(len(draws))
        ]

    def _goes_on(self, unfinished: bool) -> bool:
        if self._sharding.zero_stage == 2:
            return unfinished
        anywhere = torch.tensor(int(unfinished), device=self.device)  # ranks gather weights from each other
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return bool(anywhere)

    @contextmanager
    def _seeded(self, generators: Sequence[np.random.Generator]) -> Iterator[None]:
        with super()._seeded(generators):
            # Drawn alike, the parts of a batch would get the same dropout masks.
            torch.manual_seed(torch.initial_seed() + self.rank)
            yield


class ZeroAdamW(AdamW):
    """`AdamW` whose gradients and state are divided among the ranks by DeepSpeed's ZeRO-2, which also sums
    gradients."""

    def __init__(
        self,
        deepspeed: Any,
        masters: list[torch.nn.Parameter],
        training: TrainingConfig,
        num_steps: int,
        *,
        cpu_offload: bool,
    ) -> None:
        self._masters = masters
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": training.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # else C++ code is compiled
            "zero_optimization": {"stage": 2},
        }
        if cpu_offload:
            settings["zero_optimization"] = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
        adamw = torch.optim.AdamW(masters, lr=training.learning_rate, weight_decay=training.weight_decay)
        self._schedule = schedule(adamw, training, num_steps)
        self._engine, *_ = deepspeed.initialize(model=torch.nn.ParameterList(masters), optimizer=adamw, config=settings)

    @torch.enable_grad()
    def step(self) -> None:
        """Sum the gradients over the ranks, clip them and take a step."""
        # DeepSpeed gets gradients only from a backward pass. So it goes through the sum of each master weight times its
        # gradient, and times the number of ranks, since DeepSpeed takes the mean over ranks.
        grads = [master.grad for master in self._masters]
        pairs = [(master, grad) for master, grad in zip(self._masters, grads, strict=True) if grad is not None]
        products = [(master * grad).sum() for master, grad in pairs]
        for master in self._masters:
            master.grad = None
        self._engine.backward(dist.get_world_size() * torch.stack(products).sum())
        self._engine.step()
        self._schedule.step()

    def state(self) -> dict[str, Tensor]:
        """Empty: the settings refuse `training.keep_optimizer` with ZeRO-2."""
        return {}
