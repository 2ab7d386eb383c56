"""The bytes that a round sends if clients exchange LoRA weights, and if they exchange text.

Every size is computed from the arguments; nothing is run. Sizes are bytes, with kB = 1000 B.

LoRA on a linear map from d_in to d_out adds rank * (d_in + d_out) parameters (Hu et al., arXiv:2106.09685, section
4.1). So all that matters of a model is the sum of d_in + d_out over its layers, by the name of the linear map: its LoRA
parameters per unit of rank. Text does not depend on the model (Abourayya et al., arXiv:2605.11857).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from semcons_ray.errors import ConfigError, ModelError
from semcons_ray.metering.units import format_quantity
from semcons_ray.modeling.packaged import PREFIX, resolve_model
from semcons_ray.modeling.shapes import SHAPES as SHAPES  # for the command line, too

if TYPE_CHECKING:  # the rest of the command line starts without matplotlib and transformers
    from matplotlib.figure import Figure as Canvas
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
# Bytes a token. With SmolLM2's tokenizer, the packaged data has 4.2 for answers and 4.0 for questions; zstd makes that
# 1.7 in a message of 500 questions, 2.5 in one of 500 (very short) answers. Ids: 3 bytes are enough for every
# vocabulary.
ENCODING_BYTES = {"utf-8": 4.0, "utf-8+zstd": 1.7, "int32-ids": 4.0, "int24-ids": 3.0}
FIGURE_TARGETS = ("q,v", "q,k,v,o", ALL_LINEAR)


@dataclass(frozen=True)
class Traffic:
    """Bytes between one client and the server: uplink and downlink of each round, and downlink once before round 1."""

    uplink_bytes: int
    downlink_bytes: int
    once_bytes: int

    @property
    def round_bytes(self) -> int:
        """Bytes of a round, both ways."""
        return self.uplink_bytes + self.downlink_bytes


@dataclass(frozen=True)
class Cost:
    """The traffic of weights against that of text.

    Attributes:
        parameters: Number of parameters of an adapter.
        weights: Traffic of a client that exchanges adapters.
        text: Traffic of a client that exchanges answers and pseudo-labels.
        clients: Number of clients.
        rounds: Number of rounds.
    """

    parameters: int
    weights: Traffic
    text: Traffic
    clients: int
    rounds: int

    @property
    def ratio(self) -> float:
        """Bytes of weights for each byte of text, in a round."""
        return self.weights.round_bytes / self.text.round_bytes

    @property
    def total_ratio(self) -> float:
        """Bytes of weights for each byte of text, over the whole run, including what is sent once."""
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
    samples: int = 1,
    clients: int = 1,
    rounds: int = 1,
) -> Cost:
    """Bytes of federated averaging of LoRA adapters, and of semantic consensus, if every client is in every round.

    Weights: an adapter goes up, and the average comes down. Text: for each prompt answers go up and a pseudo-label
    comes down; the public prompts, assumed to be as long as the answers, come down once.

    Args:
        linear_maps: LoRA parameters per unit of rank by name of the linear map, see `read_linear_maps`.
        targets: Names of the maps that get an adapter ("q" is short for "q_proj"), or "all-linear".
        rank: LoRA rank.
        dtype: Type in which a parameter is sent, a key of `DTYPE_BYTES`.
        prompts: Number of public prompts.
        tokens: Tokens of an answer.
        bytes_per_token: Bytes of a token when it is sent.
        samples: Answers to a prompt that a client sends.
        clients: Number of clients.
        rounds: Number of rounds.

    Raises:
        ConfigError: A target or dtype is unknown, or a number is not positive.
    """
    numbers = {"rank": rank, "prompts": prompts, "tokens": tokens, "clients": clients, "rounds": rounds}
    for name, value in {**numbers, "samples": samples, "bytes-per-token": bytes_per_token}.items():
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
        text=Traffic(uplink_bytes=samples * text_bytes, downlink_bytes=text_bytes, once_bytes=text_bytes),
        clients=clients,
        rounds=rounds,
    )


def read_linear_maps(model: str) -> dict[str, int]:
    """LoRA parameters per unit of rank, by name of the linear map, summed over the layers.

    Args:
        model: A key of `SHAPES`, a config.json or a folder with one, `packaged:NAME`, or a hub id. All but the first
            are built without memory for weights, and their linear maps are those that PEFT would adapt: of the text
            part, without the output embedding. In a mixture of experts, each expert's weight is a linear map with an
            adapter of its own, as with PEFT's `target_parameters`.

    Raises:
        ModelError: The name is unknown, or the config cannot be read or is not of a causal language model.
    """
    if model.lower() in SHAPES:
        return SHAPES[model.lower()].linear_maps
    return _sum_linear_maps(_build(model))


def count_parameters(model: str) -> int:
    """Number of parameters of a model, see `read_linear_maps` for its name; for a built-in one to 0.1%.

    Raises:
        ModelError: See `read_linear_maps`.
    """
    if model.lower() in SHAPES:
        return SHAPES[model.lower()].parameters
    return sum(parameter.numel() for parameter in _build(model).parameters())


def split_targets(targets: str) -> list[str] | str:
    """Targets as on the command line, separated by commas, in the form that `estimate` takes."""
    return ALL_LINEAR if targets == ALL_LINEAR else targets.split(",")


def draw_figure(path: Path, model: str, targets: str, **settings: Any) -> None:
    """Draw the bytes that a client sends and gets in a run over model size: LoRA weights of built-in models, and text.

    Args:
        path: File to write, .svg or .png.
        model: The model for which the ratio is shown.
        targets: Its targets, as on the command line.
        settings: The other arguments of `estimate`.

    Raises:
        ConfigError: The file has another ending.
        ModelError: See `read_linear_maps`.
    """
    from semcons_ray.reporting.drawing import BLUE, CLIENT_COLOURS, INK, MARKERS, log_axis, place_legend, save

    marked = estimate(read_linear_maps(model), targets=split_targets(targets), **settings)
    size, clients = count_parameters(model) / 1e9, settings["clients"]
    shapes = sorted(SHAPES.values(), key=lambda shape: shape.parameters)

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        for position, names in enumerate(FIGURE_TARGETS):
            costs = [estimate(shape.linear_maps, targets=split_targets(names), **settings) for shape in shapes]
            axes.plot(
                [shape.parameters / 1e9 for shape in shapes],
                [cost.total_bytes(cost.weights) / clients for cost in costs],
                color=CLIENT_COLOURS[position + 1],
                marker=MARKERS[position],
                linewidth=1,
                label=f"LoRA on {names}",
            )
        text, weights = (marked.total_bytes(traffic) / clients for traffic in (marked.text, marked.weights))
        axes.axhline(text, color=BLUE, linewidth=2.5, label="text")
        axes.plot(size, weights, color=INK, marker="D")
        axes.annotate("", (size, weights), (size, text), arrowprops={"arrowstyle": "<->", "color": INK})
        left = size < 7  # the middle of the axis
        axes.annotate(
            f"{Path(model.removesuffix('/config.json')).name}\n{targets}: {marked.total_ratio:,.1f}x",
            (size, text**0.7 * weights**0.3),
            xytext=(6 if left else -6, 0),
            textcoords="offset points",
            ha="left" if left else "right",
            va="center",
        )
        axes.set_title(
            f"LoRA of rank {settings['rank']} in {settings['dtype']}; {settings['prompts']:,} prompts x "
            f"{settings['tokens']:,} tokens x {settings['bytes_per_token']:g} bytes",
            fontsize=10,
            loc="left",
        )
        axes.set_xlabel("parameters of the model (billions)")
        axes.set_ylabel(f"bytes a client, {settings['rounds']:,} rounds, both ways")
        log_axis(axes, "x")
        log_axis(axes, "y", "B")
        place_legend(canvas, axes, 4)

    save(path, draw)


def cost_table(cost: Cost) -> Table:
    """A table of weights against text, for rich to print."""
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
        sizes = [format_quantity(size, "B") for size in (left, right)]
        table.add_row(label, *sizes, f"{left / right:,.1f}x" if left else "-")
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


def _build(model: str) -> PreTrainedModel:
    """The text part of a model that is not built in, without memory for its weights."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

    path, source = Path(model).expanduser(), model
    if path.exists():
        source = str(path)
    elif model.startswith(PREFIX):
        source = resolve_model(model)
    elif "/" not in model or path.suffix == ".json":
        raise ModelError(
            f"--model {model}: no such file, and none of {', '.join(SHAPES)}; a hub id has the form owner/name"
        )
    try:
        config = AutoConfig.from_pretrained(source)
        text = config.get_text_config(decoder=True)
        # Of some models with vision, transformers has the text part only without its output embedding.
        bare = type(text) is not type(config) and type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING
        with torch.device("meta"):
            built: PreTrainedModel = (AutoModel if bare else AutoModelForCausalLM).from_config(text)
    except Exception as error:  # transformers raises many kinds; all of them mean the same to the user
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"--model {source}: {lines[0]} Give a built-in name, or the config.json of a causal language model."
        ) from error
    return built


def _sum_linear_maps(built: PreTrainedModel) -> dict[str, int]:
    import torch
    from transformers.pytorch_utils import Conv1D

    sums: Counter[str] = Counter()
    for path, module in built.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not built.get_output_embeddings():
            sums[name] += sum(module.weight.shape)
        elif name == "experts":  # their weights are stacked: E experts by d_in by d_out, or d_out by d_in
            for stack, weight in module.named_parameters(recurse=False):
                if weight.ndim == 3:
                    sums[stack] += weight.shape[0] * sum(weight.shape[1:])
    return dict(sums)
