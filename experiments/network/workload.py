"""A tiny model and data for runs whose messages are large and whose computing is short."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from semcons_ray.config import dump_yaml
from semcons_ray.modeling.packaged import CHATML

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.tiny import write_embedder, write_model

NUM_WORDS, WORD_LETTERS = 500, 40
ROWS = 800
PROMPTS, ANSWER_TOKENS = 400, 24
ROUNDS = 5
WIDTH = {"semantic_consensus": 64, "fedavg_lora": 256}
RANK = {"semantic_consensus": 8, "fedavg_lora": 96}
"""Width of the model and rank of the adapter: answers are quick, and an adapter has a megabyte."""


def write_config(folder: Path, algorithm: str, num_clients: int) -> Path:
    """Write model, embedder, data and settings of a run; returns the path of the settings."""
    inputs = folder / f"{algorithm}_inputs"
    model, embedder, data = inputs / "model", inputs / "embedder", inputs / "rows.jsonl"
    if not inputs.exists():
        words = _words()
        write_model(model, tokenizer=_tokenizer(words), width=WIDTH[algorithm])
        write_embedder(embedder)
        draw = random.Random(0)
        rows = [{"prompt": " ".join(draw.sample(words, 3)), "response": draw.choice(words)} for _ in range(ROWS)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "num_rounds": ROUNDS,
        "data": {"source": str(data), "examples_per_client": 16, "num_test": 4, "partition": "iid"},
        "clients": {"num_clients": num_clients},
        "model": {"name": str(model), "dtype": "float32", "max_length": 64, "lora": {"rank": RANK[algorithm]}},
        "training": {"local_steps": 4},
        "algorithm": {"name": algorithm, "compression": "none"},
        "evaluation": {"every": ROUNDS, "num_answers": 0, "metrics": ["nll"]},
        "server": {"embedding_model": str(embedder)},
        "resources": {"device": "cpu"},
    }
    if algorithm == "semantic_consensus":
        settings["algorithm"]["first_exchange"] = 1
        settings["prompts"] = {"budget": PROMPTS, "selection": "random"}
        settings["generation"] = {"max_new_tokens": ANSWER_TOKENS, "batch_size": PROMPTS}
    path = folder / f"{algorithm}_{num_clients}.yaml"
    path.write_text(dump_yaml(settings), encoding="utf-8")
    return path


def _words() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=WORD_LETTERS)) for _ in range(NUM_WORDS)]


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A token for each word: of a random model, whose answers are random words, each token is many bytes."""
    marks = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate([*marks, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=marks[0], eos_token=marks[2], unk_token="<unk>",
        additional_special_tokens=[marks[1]],
    )  # fmt: skip
    fast.chat_template = CHATML
    return fast
