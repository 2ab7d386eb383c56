"""`semcons cost`: what a round sends if clients exchange LoRA weights, and what it sends if they exchange text.

Analytic: every size follows from the settings, and nothing is run. Sizes are bytes, with kB = 1000 B.

LoRA on a linear map from d_in to d_out adds rank * (d_in + d_out) parameters (Hu et al., arXiv:2106.09685, section
4.1), so all that counts of a model is the sum of d_in + d_out over its layers, by the name of the linear map: its LoRA
parameters per unit of rank. Text does not depend on the model (Abourayya et al., arXiv:2605.11857).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from semcons_ray.config import load_config
from semcons_ray.errors import ConfigError, ModelError
from semcons_ray.modeling.packaged import PREFIX, resolve_model

ALL_LINEAR = "all-linear"
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

# Layers, hidden size, query width (heads * head size), key/value width, feed-forward width: the published config.json.
SHAPES = {
    "llama-3.1-8b": (32, 4096, 4096, 1024, 14336),
    "llama-3.1-70b": (80, 8192, 8192, 1024, 28672),
    "llama-3.1-405b": (126, 16384, 16384, 1024, 53248),
    "llama-3.2-1b": (16, 2048, 2048, 512, 8192),
    "llama-3.2-3b": (28, 3072, 3072, 1024, 8192),
    "qwen2.5-0.5b": (24, 896, 896, 128, 4864),
    "qwen2.5-1.5b": (28, 1536, 1536, 256, 8960),
    "qwen2.5-3b": (36, 2048, 2048, 256, 11008),
    "qwen2.5-7b": (28, 3584, 3584, 512, 18944),
    "qwen2.5-14b": (48, 5120, 5120, 1024, 13824),
    "qwen2.5-32b": (64, 5120, 5120, 1024, 27648),
    "qwen2.5-72b": (80, 8192, 8192, 1024, 29568),
    "qwen3-0.6b": (28, 1024, 2048, 1024, 3072),
    "qwen3-1.7b": (28, 2048, 2048, 1024, 6144),
    "qwen3-4b": (36, 2560, 4096, 1024, 9728),
    "qwen3-8b": (36, 4096, 4096, 1024, 12288),
    "qwen3-14b": (40, 5120, 5120, 1024, 17408),
    "qwen3-32b": (64, 5120, 8192, 1024, 25600),
    "gemma-2-2b": (26, 2304, 2048, 1024, 9216),
    "gemma-2-9b": (42, 3584, 4096, 2048, 14336),
    "gemma-2-27b": (46, 4608, 4096, 2048, 36864),
    "gemma-3-270m": (18, 640, 1024, 256, 2048),
    "gemma-3-1b": (26, 1152, 1024, 256, 6912),
    "gemma-3-4b": (34, 2560, 2048, 1024, 10240),
    "gemma-3-12b": (48, 3840, 4096, 2048, 15360),
    "gemma-3-27b": (62, 5376, 4096, 2048, 21504),
    "mistral-7b": (32, 4096, 4096, 1024, 14336),
    "smollm2-135m": (30, 576, 576, 192, 1536),
    "smollm2-360m": (32, 960, 960, 320, 2560),
    "smollm2-1.7b": (24, 2048, 2048, 2048, 8192),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes between one client and the server: each round up and down, and down once before the first."""

    uplink_bytes: int
    downlink_bytes: int
    once_bytes: int

    @property
    def round_bytes(self) -> int:
        """Bytes of a round, both ways."""
        return self.uplink_bytes + self.downlink_bytes


@dataclass(frozen=True)
class Cost:
    """Weights against text; `parameters` is the size of an adapter."""

    parameters: int
    weights: Traffic
    text: Traffic
    clients: int
    rounds: int

    @property
    def ratio(self) -> float:
        """Bytes of weights for a byte of text in a round."""
        return self.weights.round_bytes / self.text.round_bytes

    @property
    def total_ratio(self) -> float:
        """Bytes of weights for a byte of text over the whole run, what is sent once included."""
        return self.total_bytes(self.weights) / self.total_bytes(self.text)

    def total_bytes(self, traffic: Traffic) -> int:
        """Bytes of all clients over all rounds."""
        return self.clients * (self.rounds * traffic.round_bytes + traffic.once_bytes)


def estimate(
    linear_maps: Mapping[str, int],
    *,
    targets: Sequence[str] | str = ALL_LINEAR,
    rank: int = 16,
    dtype: str = "float16",
    prompts: int = 500,
    tokens: int = 100,
    bytes_per_token: float = 4.0,
    clients: int = 1,
    rounds: int = 1,
) -> Cost:
    """Bytes of federated averaging of LoRA adapters, and of semantic consensus, with every client in every round.

    Weights: an adapter goes up and the averaged one comes down. Text: an answer a prompt goes up, and a pseudo-label a
    prompt comes down; the public prompts, taken to be as long as the answers, come down once.

    Args:
        linear_maps: LoRA parameters per unit of rank by name of the linear map, see `read_linear_maps`.
        targets: Names of the maps that get an adapter ("q" is short for "q_proj"), or "all-linear".
        rank: LoRA rank.
        dtype: What a parameter is sent as, a key of `DTYPE_BYTES`.
        prompts: Public prompts.
        tokens: Tokens of an answer.
        bytes_per_token: Bytes that a token's text comes to.
        clients: Number of clients.
        rounds: Number of rounds.

    Raises:
        ConfigError: A target or dtype is unknown, or a number is not positive.
    """
    numbers = {"rank": rank, "prompts": prompts, "tokens": tokens, "clients": clients, "rounds": rounds}
    for name, value in {**numbers, "bytes-per-token": bytes_per_token}.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"--{name} must be a positive number, not {value}")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"--dtype {dtype} is unknown; it is one of {', '.join(DTYPE_BYTES)}")
    parameters = rank * sum(linear_maps[name] for name in _select(linear_maps, targets))
    adapter_bytes = parameters * DTYPE_BYTES[dtype]
    text_bytes = math.ceil(prompts * tokens * bytes_per_token)
    return Cost(
        parameters=parameters,
        weights=Traffic(uplink_bytes=adapter_bytes, downlink_bytes=adapter_bytes, once_bytes=0),
        text=Traffic(uplink_bytes=text_bytes, downlink_bytes=text_bytes, once_bytes=text_bytes),
        clients=clients,
        rounds=rounds,
    )


def read_linear_maps(model: str) -> dict[str, int]:
    """LoRA parameters per unit of rank, by name of the linear map, summed over the layers.

    Args:
        model: A key of `SHAPES`, a config.json or a folder with one, `packaged:NAME`, or a hub id. For all but the
            first the model is built without memory for its weights, and its linear maps are those that PEFT would
            adapt: of the text part, without the output embedding.

    Raises:
        ModelError: The name is unknown, or the config cannot be read or is not of a dense causal language model.
    """
    if model.lower() in SHAPES:
        layers, hidden, queries, keys, feed_forward = SHAPES[model.lower()]
        return {
            "q_proj": layers * (hidden + queries),
            "k_proj": layers * (hidden + keys),
            "v_proj": layers * (hidden + keys),
            "o_proj": layers * (queries + hidden),
            "gate_proj": layers * (hidden + feed_forward),
            "up_proj": layers * (hidden + feed_forward),
            "down_proj": layers * (feed_forward + hidden),
        }
    path = Path(model).expanduser()
    if path.exists():
        return _build_linear_maps(str(path))
    if model.startswith(PREFIX):
        return _build_linear_maps(resolve_model(model))
    if "/" not in model or path.suffix == ".json":
        raise ModelError(
            f"--model {model}: no such file, and none of {', '.join(SHAPES)}; a hub id has the form owner/name"
        )
    return _build_linear_maps(model)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `semcons cost`; the defaults are the worked example of the method's page."""
    defaults = load_config(None)
    parser.formatter_class = argparse.HelpFormatter  # wraps
    parser.description = (
        "Bytes that federated averaging of LoRA adapters sends, against those of semantic consensus, which sends text. "
        "Computed from the arguments; nothing is run."
    )
    parser.epilog = "Example: semcons cost --model qwen2.5-7b --targets q,k,v,o --rank 8 --prompts 1000 --clients 20"
    parser.add_argument(
        "--model",
        default="llama-3.1-405b",
        metavar="NAME",
        help=f"One of {', '.join(SHAPES)}; or a config.json, a folder with one, or a hub id. Default: %(default)s.",
    )
    parser.add_argument(
        "--targets",
        default="q,v",
        metavar="LIST",
        help="Linear maps that get an adapter, with commas between: of q, k, v, o, gate, up, down, or by their names "
        "in the model; all-linear takes all. Default: %(default)s.",
    )
    parser.add_argument("--rank", type=int, default=16, metavar="R", help="LoRA rank. Default: %(default)s.")
    parser.add_argument(
        "--dtype", choices=DTYPE_BYTES, default="float16", help="What a weight is sent as. Default: %(default)s."
    )
    parser.add_argument("--prompts", type=int, default=500, metavar="P", help="Public prompts. Default: %(default)s.")
    parser.add_argument(
        "--tokens",
        type=int,
        default=100,
        metavar="T",
        help="Tokens of an answer; a public prompt is taken to be as long. Default: %(default)s.",
    )
    parser.add_argument(
        "--bytes-per-token",
        type=float,
        default=4.0,
        metavar="B",
        help="Bytes a token: 4 is an int32 token id, and about what English text comes to in UTF-8. "
        "Default: %(default)s.",
    )
    parser.add_argument(
        "--clients",
        type=int,
        default=defaults.clients.num_clients,
        metavar="C",
        help="Clients, all of them in every round; for the total. Default: %(default)s.",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=defaults.num_rounds,
        metavar="N",
        help="Rounds; for the total. Default: %(default)s.",
    )


def run(args: argparse.Namespace) -> int:
    """Print the comparison on stdout.

    Raises:
        ModelError: See `read_linear_maps`.
        ConfigError: See `estimate`.
    """
    cost = estimate(
        read_linear_maps(args.model),
        targets=ALL_LINEAR if args.targets == ALL_LINEAR else args.targets.split(","),
        rank=args.rank,
        dtype=args.dtype,
        prompts=args.prompts,
        tokens=args.tokens,
        bytes_per_token=args.bytes_per_token,
        clients=args.clients,
        rounds=args.rounds,
    )
    console = Console(highlight=False, markup=False)
    adapter = f"LoRA of rank {args.rank} on {args.targets}, {cost.parameters:,} parameters in {args.dtype}"
    answers = f"{args.prompts:,} prompts, {args.tokens:,} tokens an answer, {args.bytes_per_token:g} bytes a token"
    console.print(f"weights: {args.model}, {adapter}")
    console.print(f"text: {answers}")
    console.print(_table(cost))
    console.print(
        "Analytic, not measured. Weights: one adapter up and the average of all down, as in FedAvg. Text: the answers "
        "up, as many pseudo-labels down, and the public prompts once. Left out: framing and prompt ids (at most 10 "
        "bytes a prompt), compression, and abstention, which sends fewer pseudo-labels. What a run really sent is in "
        "its ledger."
    )
    return 0


def _table(cost: Cost) -> Table:
    weights, text = cost.weights, cost.text
    rows = [
        ("up, a client and round", weights.uplink_bytes, text.uplink_bytes),
        ("down, a client and round", weights.downlink_bytes, text.downlink_bytes),
        ("both, a client and round", weights.round_bytes, text.round_bytes),
        ("public prompts, once a client", weights.once_bytes, text.once_bytes),
        (f"total, {cost.clients:,} clients, {cost.rounds:,} rounds", cost.total_bytes(weights), cost.total_bytes(text)),
    ]
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for heading in ("weights", "text", "ratio"):
        table.add_column(heading, justify="right")
    for label, left, right in rows:
        table.add_row(label, _si(left), _si(right), f"{left / right:,.1f}x" if left else "-")
    return table


def _select(linear_maps: Mapping[str, int], targets: Sequence[str] | str) -> set[str]:
    if targets == ALL_LINEAR:
        return set(linear_maps)
    chosen = set()
    for target in [targets] if isinstance(targets, str) else targets:
        name = next((name for name in (target.strip(), f"{target.strip()}_proj") if name in linear_maps), None)
        if name is None:
            raise ConfigError(f"--targets: no linear map '{target}'; the model has {', '.join(linear_maps)}")
        chosen.add(name)
    return chosen


def _build_linear_maps(source: str) -> dict[str, int]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(source).get_text_config(decoder=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many kinds; all of them mean the same to the user
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"--model {source}: {lines[0]} Give a built-in name, or the config.json of a causal language model."
        ) from error
    sums: dict[str, int] = {}
    for path, module in model.named_modules():
        if path.endswith(".experts"):  # not linear maps but stacked weights, which PEFT adapts in ways of its own
            raise ModelError(f"--model {source} is a mixture of experts; only dense models are counted")
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not model.get_output_embeddings():
            name = path.rpartition(".")[2]
            sums[name] = sums.get(name, 0) + sum(module.weight.shape)
    return sums


def _si(size: float) -> str:
    """Bytes in decimal units, to a tenth."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:,.1f} TB"
