"""Tiny models of real architectures, with a tokenizer trained on the spot; data files; the shapes of a large one."""

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import StaticEmbedding
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from semcons_ray.modeling.packaged import CHATML
from tests.experiments.scripts import load_script

write_hollow = load_script("gpu", "shapes.py").write_hollow

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip


def examples() -> list[dict[str, str]]:
    """432 questions and answers in three categories."""
    rows = []
    for i, left in enumerate(NUMBERS):
        for j, right in enumerate(NUMBERS):
            rows.append({"prompt": f"add {left} and {right}", "response": f"it is {i + j}", "category": "add"})
            rows.append(
                {"prompt": f"which is more, {left} or {right}?", "response": NUMBERS[max(i, j)], "category": "more"}
            )
            rows.append({"prompt": f"spell {left} {right}", "response": " ".join(left + right), "category": "spell"})
    return rows


def write_data(path: Path) -> Path:
    """The examples as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in examples()), encoding="utf-8")
    return path


def train_tokenizer(
    marks: tuple[str, ...] = ("<|pad|>", "<|im_start|>", "<|im_end|>"),
    *,
    eos: str | None = "<|im_end|>",
    bos: str | None = None,
    template: str | None = None,
    frame: str | None = None,
    spaces: str = "bytes",
    texts: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer of the examples; the first mark pads.

    Args:
        marks: Special tokens, from id 0 on.
        template: Its chat template.
        frame: What it puts around a text, such as "<s> $A </s>".
        spaces: "bytes", as GPT-2 and Llama 3 have it, or "prepended", as Llama 2 has it: a space before every text.
        texts: More to train on.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    if spaces == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [*"▁:?,.\n", *map(chr, range(ord("A"), ord("Z") + 1)), *map(chr, range(ord("a"), ord("z") + 1))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(marks), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*(row["prompt"] + " " + row["response"] for row in examples()), *texts], trainer)
    if frame:
        ids = [(mark, tokenizer.token_to_id(mark)) for mark in frame.split() if mark != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=marks[0], eos_token=eos, bos_token=bos)
    fast.chat_template = template
    return fast


def write_model(
    folder: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    width: int = 32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **config: Any,
) -> Path:
    """A random model with its tokenizer, as save_pretrained writes them; "gemma3" has no chat template.

    Args:
        architecture: A model type of transformers, or "gemma3" for its model of text.
        config: Settings of its configuration, over those of `SHAPE` and of the tokenizer.
    """
    tokenizer = tokenizer or train_tokenizer(template=None if architecture == "gemma3" else CHATML)
    tokenizer.save_pretrained(folder)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build_model(architecture, **{**SHAPE, "hidden_size": width, **ids, **config}).save_pretrained(folder)
    return folder


def write_embedder(folder: Path, *, width: int = 8) -> str:
    """An embedding model that adds up a random vector of each token; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        static = StaticEmbedding(train_tokenizer(), embedding_dim=width)
    SentenceTransformer(modules=[static], device="cpu").save(str(folder))
    return str(folder)


def build_model(architecture: str, **config: Any) -> PreTrainedModel:
    """A random causal language model of one of transformers' families."""
    if architecture == "gemma3":
        architecture, config = "gemma3_text", {"head_dim": 8, **config}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **config))


def write_llama_8b(folder: Path) -> Path:
    """Llama 3.1 8B as far as its size goes."""
    write_hollow(
        folder, "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "tokenizer.json").write_bytes(bytes(9_085_657))
    return folder
