"""The same layers in fewer kernels, for GPUs.

A small model, or a small batch, keeps a GPU waiting: to launch a kernel takes the processor longer than it takes the
GPU to compute it. Results differ by rounding only, and are the same bits each time.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor
from torch.nn.functional import rms_norm

ROUNDING = 2**-6
"""How far two ways to compute a norm in bfloat16 may be apart, relative to its values."""


def fuse(model: Any) -> None:
    """Let the layers of a PEFT model that can be computed so have fewer kernels; the others stay as they are."""
    for module in model.modules():
        if _is_plain_lora(module):
            module.forward = partial(lora_linear, module)
        elif type(module).__name__.endswith("RMSNorm") and _is_plain_norm(module):
            module.forward = partial(norm, module)


def lora_linear(module: Any, x: Tensor) -> Tensor:
    """What PEFT's layer gives for `x`, (..., inputs), whose update is added in the product that makes it.

    In place, since the product would begin with a copy; in two dimensions, since what is a view would be copied, too.
    """
    rows = x.flatten(0, -2)
    result = module.base_layer(rows)
    down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
    result.addmm_(module.lora_dropout["default"](rows) @ down.T, up.T, alpha=module.scaling["default"])
    whole: Tensor = result.view(*x.shape[:-1], -1)
    return whole


def norm(module: Any, x: Tensor) -> Tensor:
    """What an RMSNorm of transformers gives."""
    return rms_norm(x, module.weight.shape, module.weight, _epsilon(module))


def _is_plain_lora(module: Any) -> bool:
    """Whether it is PEFT's layer on a plain one, with one adapter of its dtype, and adds what PEFT says."""
    if type(module) is not LoraLinear or type(module.base_layer) is not torch.nn.Linear or module.lora_variant:
        return False
    weights = (module.base_layer.weight, module.lora_A["default"].weight, module.lora_B["default"].weight)
    return len({weight.dtype for weight in weights}) == 1 and module.lora_B["default"].bias is None


def _epsilon(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", None) or module.eps)


@torch.no_grad()
def _is_plain_norm(module: Any) -> bool:
    """Whether it gives what torch's own does: some families' add 1 to the weights, or have gates."""
    weight = getattr(module, "weight", None)
    known = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    if not known or weight is None or weight.shape[1:] or not len(weight):
        return False
    if len(signature(module.forward).parameters) > 1:
        return False
    x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
    return torch.allclose(norm(module, x).float(), module(x).float(), rtol=ROUNDING, atol=1e-3)
