"""The job in Flower: what a client does, in plain transformers and PEFT. A module, so that a process keeps its
caches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

app = ClientApp()


@cache
def load(folder: str, rank: int, alpha: float, threads: int) -> tuple[Any, Any]:
    """The base model with a LoRA adapter, and its tokenizer: once in a process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora), AutoTokenizer.from_pretrained(folder)


def model_of(job: Mapping[str, Any]) -> tuple[Any, Any]:
    """See `load`."""
    return load(job["model"], job["rank"], job["alpha"], job["threads"])


@cache
def texts(data: str) -> dict[str, list[Any]]:
    """Who has which examples: `private`, by client, and `test`."""
    shares: dict[str, list[Any]] = json.loads(Path(data).read_text(encoding="utf-8"))
    return shares


def batches(job: Mapping[str, Any], examples: list[dict[str, str]], *, size: int, shuffle: bool) -> DataLoader[Any]:
    """Padded batches of which the responses, with the end of the turn, are learnt."""
    _, tokenizer = model_of(job)
    encoded = []
    for example in examples:
        question = [{"role": "user", "content": example["prompt"]}]
        asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(asked + example["response"] + tokenizer.eos_token)["input_ids"]
        begin = len(tokenizer(asked)["input_ids"])
        encoded.append({"input_ids": ids, "labels": [-100] * begin + ids[begin:]})
    return DataLoader(encoded, size, shuffle=shuffle, collate_fn=DataCollatorForSeq2Seq(tokenizer))


@torch.no_grad()
def evaluate(job: Mapping[str, Any], arrays: ArrayRecord) -> float:
    """NLL of the test set's responses with this adapter, nats a token."""
    model, _ = model_of(job)
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    model.eval()
    nats = tokens = 0.0
    for batch in batches(job, texts(job["data"])["test"], size=job["eval_batch_size"], shuffle=False):
        learnt = int((batch["labels"] != -100).sum())
        nats += float(model(**batch).loss) * learnt
        tokens += learnt
    return nats / tokens


@app.train()
def train(message: Message, context: Context) -> Message:
    """Go on from the average for an epoch, and send the adapter back."""
    job: Mapping[str, Any] = message.content["config"]
    examples = texts(job["data"])["private"][int(context.node_config["partition-id"])]
    model, _ = model_of(job)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["learning_rate"], weight_decay=0.0, fused=True)
    model.train()
    for batch in batches(job, examples, size=job["batch_size"], shuffle=True):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(
        RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": len(examples)})}), reply_to=message
    )
