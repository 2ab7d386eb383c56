"""Base weights in 8 or 4 bits, by bitsandbytes; adapters are not quantised.

8 bit is LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), 4 bit is NF4 (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314) without its double quantisation, paged optimizer or float32 layer norms. Embeddings, norms and the
output embedding keep the model's dtype.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from semcons_ray.config import Quantization
from semcons_ray.errors import ModelError, first_line

EXTRA = "pip install --no-deps 'bitsandbytes>=0.50'"


def check_quantization(quantization: Quantization) -> None:
    """Check that bitsandbytes is installed, if the setting needs it.

    Raises:
        ModelError: It is needed and not installed.
    """
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"model.quantization {quantization} needs bitsandbytes ({EXTRA}), or set it to none")


def loading_options(quantization: Quantization, *, dtype: str, device: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` besides the dtype.

    Raises:
        ModelError: bitsandbytes is missing, or does not work on this platform or device.
    """
    # Tensor by tensor to the GPU, so that the host never holds the whole model.
    placed: dict[str, Any] = {"device_map": {"": device}} if torch.device(device).type == "cuda" else {}
    if quantization == "none":
        return placed
    check_quantization(quantization)
    try:
        import bitsandbytes
        from transformers import BitsAndBytesConfig
    except Exception as error:  # a library built for another platform fails in many ways
        raise ModelError(
            f"model.quantization {quantization}: bitsandbytes does not start here ({first_line(error)}); set it to none"
        ) from error
    kind = torch.device(device).type
    if kind not in bitsandbytes.supported_torch_devices:
        raise ModelError(f"model.quantization {quantization}: bitsandbytes does not know {kind}; set it to none")
    # It warns of bfloat16 inputs at every product.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_trainable(model: torch.nn.Module) -> None:
    """Keep 4-bit layers in the one layout that gradients pass through.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a layer at its first inference, for a kernel without a backward
    pass, and leaves it so. A client that answered before it trained would then train only its last adapters.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
