"""AdamW with its schedule, and the scale of a loss whose gradients are float16."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from semcons_ray.config import TrainingConfig
from semcons_ray.modeling.device import to_device, to_host

LOSS_SCALE, GROWTH_STEPS = 2.0**16, 2000
"""See `LossScale`; the numbers are torch.amp.GradScaler's."""


@dataclass
class LossScale:
    """The factor by which a loss is multiplied before its backward pass, so that small float16 gradients are not 0.

    It is halved when a gradient overflows, and doubled after `GROWTH_STEPS` steps without that, as torch.amp.GradScaler
    does. Each call of `fine_tune` begins with `LOSS_SCALE`, so that a visit depends on nothing but its arguments.

    Attributes:
        factor: The factor, a power of 2.
        steps: Steps since it changed.
    """

    factor: float
    steps: int = 0

    def keeps(self, fits: bool) -> bool:
        """Whether the gradients of a step are to be used; `fits`: no gradient has overflowed.

        Where even a factor of 1 is too large, they are used as they are, and the client is told to have diverged.
        """
        used = fits or self.factor <= 1
        self.steps += 1
        if not used or self.steps == GROWTH_STEPS:
            self.factor, self.steps = self.factor * (2 if used else 0.5), 0
        return used


class AdamW:
    """AdamW with clipped gradients.

    Args:
        masters: Float32 master weights to update.
        training: Settings of the local update.
        state: What `state` returned earlier; empty: a new optimizer.
        num_steps: Number of steps of this call of `fine_tune`, over which the learning rate changes.
    """

    def __init__(
        self, masters: list[torch.nn.Parameter], training: TrainingConfig, state: dict[str, Tensor], num_steps: int
    ) -> None:
        self._masters = masters
        self._max_grad_norm = training.max_grad_norm
        # Of all weights together: on a GPU in one kernel for many, on a CPU with the bits of one after another.
        on_gpu = masters[0].is_cuda
        self._adamw = torch.optim.AdamW(
            masters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=on_gpu, foreach=not on_gpu
        )
        if state:
            groups = self._adamw.state_dict()["param_groups"]
            values = to_device([*state.values()], masters[0].device)
            known = _unflatten(dict(zip(state, values, strict=True)))
            self._adamw.load_state_dict({"state": known, "param_groups": groups})
        self._schedule = schedule(self._adamw, training, num_steps)

    def step(self) -> None:
        """Clip the gradients and take a step."""
        torch.nn.utils.clip_grad_norm_(self._masters, self._max_grad_norm)
        self._adamw.step()
        self._schedule.step()

    def state(self) -> dict[str, Tensor]:
        """State on the CPU, by index of the master weight and name."""
        return _flatten(self._adamw.state_dict()["state"])


def schedule(adamw: torch.optim.AdamW, training: TrainingConfig, num_steps: int) -> LRScheduler:
    """The learning-rate schedule that transformers has under the name `training.lr_scheduler_type`.

    As with transformers, the rate of the first warm-up step is 0. So that something is learnt in a round of one step,
    the last is no warm-up step.
    """
    warmup = max(0, min(math.ceil(training.warmup_ratio * num_steps), num_steps - 1))
    made: LRScheduler = get_scheduler(
        training.lr_scheduler_type, adamw, num_warmup_steps=warmup, num_training_steps=num_steps
    )
    return made


def _flatten(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    flat = {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}
    return dict(zip(flat, to_host([*flat.values()]), strict=True))


def _unflatten(flat: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return state
