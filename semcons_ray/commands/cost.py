"""`semcons cost`: prints the bytes that a round sends if clients exchange LoRA weights, and if they exchange text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from semcons_ray.api.cost import (
    DTYPE_BYTES,
    ENCODING_BYTES,
    SHAPES,
    cost_table,
    draw_figure,
    estimate,
    read_linear_maps,
    split_targets,
)
from semcons_ray.config import DEFAULTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semcons cost` to its parser."""
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
        help="Linear maps that get an adapter, separated by commas: q, k, v, o, gate, up, down, or their names in the "
        "model; all-linear takes all. Default: %(default)s.",
    )
    parser.add_argument("--rank", type=int, default=16, metavar="R", help="LoRA rank. Default: %(default)s.")
    parser.add_argument(
        "--dtype", choices=DTYPE_BYTES, default="float16", help="Type in which weights are sent. Default: %(default)s."
    )
    parser.add_argument(
        "--prompts", type=int, default=500, metavar="P", help="Number of public prompts. Default: %(default)s."
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=100,
        metavar="T",
        help="Tokens of an answer; public prompts are assumed to be as long. Default: %(default)s.",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="Answers to a prompt that a client sends. Default: %(default)s.",
    )
    parser.add_argument(
        "--encoding",
        choices=ENCODING_BYTES,
        default="utf-8",
        help="How tokens are sent: "
        + ", ".join(f"{name} ({size:g} bytes a token)" for name, size in ENCODING_BYTES.items())
        + "; for text these are typical of English. Default: %(default)s.",
    )
    parser.add_argument(
        "--bytes-per-token", type=float, metavar="B", help="Bytes a token, if they are not those of --encoding."
    )
    parser.add_argument(
        "--clients",
        type=int,
        default=DEFAULTS.clients.num_clients,
        metavar="C",
        help="Number of clients, for the total; all take part in every round. Default: %(default)s.",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=DEFAULTS.num_rounds,
        metavar="N",
        help="Number of rounds, for the total. Default: %(default)s.",
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="A .svg or .png file into which to draw the total over model size, for the built-in models.",
    )


def run(args: argparse.Namespace) -> int:
    """Print the comparison on stdout.

    Raises:
        ModelError: See `read_linear_maps`.
        ConfigError: See `estimate`.
    """
    settings: dict[str, Any] = {name: getattr(args, name) for name in ("rank", "dtype", "prompts", "tokens", "samples")}
    settings |= {"clients": args.clients, "rounds": args.rounds}
    settings["bytes_per_token"] = (
        ENCODING_BYTES[args.encoding] if args.bytes_per_token is None else args.bytes_per_token
    )
    encoding = args.encoding if args.bytes_per_token is None else "as given"
    cost = estimate(read_linear_maps(args.model), targets=split_targets(args.targets), **settings)
    console = Console(highlight=False, markup=False)
    adapter = f"LoRA of rank {args.rank} on {args.targets}, {cost.parameters:,} parameters in {args.dtype}"
    samples = f"{args.samples:,} answers to each, " if args.samples > 1 else ""
    answers = f"{args.prompts:,} prompts, {samples}{args.tokens:,} tokens an answer"
    console.print(f"weights: {args.model}, {adapter}")
    console.print(f"text: {answers}, {settings['bytes_per_token']:g} bytes a token ({encoding})")
    console.print(cost_table(cost))
    console.print(
        "Analytic, not measured. Weights: one adapter up and the average of all down, as in FedAvg. Text: the answers "
        "up, a pseudo-label a prompt down, and the public prompts once. Left out: framing, prompt ids and counts of "
        "draws (at most 10 bytes a prompt), and abstention, which sends fewer pseudo-labels. What a run really sent is "
        "in its ledger."
    )
    if args.figure:
        draw_figure(args.figure, args.model, args.targets, **settings)
        console.print(f"figure: {args.figure}", soft_wrap=True)
    return 0
