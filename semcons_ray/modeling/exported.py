"""Base models and exported adapters as plain transformers and PEFT load them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from semcons_ray.config import Quantization
from semcons_ray.errors import ModelError, first_line
from semcons_ray.messages import Prompt
from semcons_ray.modeling.chat import ChatFormat
from semcons_ray.modeling.quantization import loading_options


def load_base(name: str, *, dtype: str, device: str, quantization: Quantization = "none") -> Any:
    """Load a causal language model without an adapter.

    Args:
        name: A folder or hub id.
        dtype: Type of the weights: "bfloat16", "float16" or "float32".
        device: A torch device.
        quantization: Bits of the weights.

    Raises:
        ModelError: It cannot be loaded.
    """
    options = loading_options(quantization, dtype=dtype, device=device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), trust_remote_code=False, **options
        )
    except Exception as error:  # transformers raises many kinds; all of them mean the same to the user
        raise ModelError(f"cannot load model {name}: {first_line(error)}") from error
    return (model if options else model.to(device)).eval()


@contextmanager
def with_adapter(base: Any, folder: Path) -> Iterator[Any]:
    """A model with the adapter in `folder`; after the block, `base` is without it again.

    Raises:
        ModelError: It cannot be loaded.
    """
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # whatever PEFT and safetensors raise for a damaged file
        raise ModelError(f"cannot load the adapter {folder}: {first_line(error)}") from error
    try:
        yield model.eval()
    finally:
        model.unload()


@torch.no_grad()
def response_nll(model: Any, chat: ChatFormat, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
    """Mean negative log-likelihood (nats a token) of the response of each pair, its end included, (N,).

    One pair at a time: for the few texts of an audit.
    """
    means = []
    for prompt, response in pairs:
        text = chat.encode(prompt, response)
        begin, end = text.learnt[-1]
        ids = torch.tensor([text.ids], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, begin - 1 : end - 1]
        means.append(float(torch.nn.functional.cross_entropy(logits.float(), ids[0, begin:end])))
    return means
