"""An experiment's settings as a whole: what fits together, what has an effect, and settings by dotted key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from semcons_ray.config.base import Settings
from semcons_ray.config.endpoints import JudgeConfig
from semcons_ray.config.keys import describe_error, merge_settings, setting_keys
from semcons_ray.config.per_client import PerClient, models_of
from semcons_ray.config.sections import (
    DEFAULT_METRICS,
    DEFAULT_MIN_VOTES,
    OWN_SECTIONS,
    POLYNOMIAL_END,
    AlgorithmConfig,
    ClientsConfig,
    DataConfig,
    EnergyConfig,
    EvaluationConfig,
    FailuresConfig,
    FederationConfig,
    GenerationConfig,
    ModelConfig,
    PromptsConfig,
    ResourcesConfig,
    ServerConfig,
    ShardingConfig,
    TrackingConfig,
    TrainingConfig,
    takes_options,
)
from semcons_ray.errors import ConfigError
from semcons_ray.parts import BUILT_IN, ON_WORKERS, STORED, Kind, PartName, check_options, part_names, resolve


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
    federation: FederationConfig = FederationConfig()

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> ExperimentConfig:
        if (info.context or {}).get(STORED):
            return self
        for client, own in self.clients.overrides.items():
            self._check_own_keys(client, own)
        shared = (info.context or {}).get("shared", {})
        self._check_kinds(is_shared=has_setting(shared, ["clients", "models"]))
        for key, needs in without_effect(self):
            if not has_setting(shared, key.split(".")):
                raise ValueError(f"{key} {setting_value(self, key)} has no effect: it needs {needs}")
        self._check_options()
        if self.resources.fleet == "ray":
            self._check_workers_find()
        per_round = max(1, int(self.clients.participation * self.clients.num_clients + 0.5))
        # One client alone may be run as it is: it trains, and no prompt gives a pseudo-label.
        if self.algorithm.elects and self.algorithm.min_votes > max(per_round, DEFAULT_MIN_VOTES):
            raise ValueError(
                f"algorithm.min_votes is {self.algorithm.min_votes}, but {per_round} of clients.num_clients = "
                f"{self.clients.num_clients} take part in a round, so there would never be a pseudo-label"
            )
        if self.prompts.sentinels > self.prompts.budget:
            raise ValueError(f"prompts.sentinels {self.prompts.sentinels} is over prompts.budget {self.prompts.budget}")
        if self.algorithm.elects and self.algorithm.competence == "sentinels" and not self.prompts.sentinels:
            raise ValueError("algorithm.competence sentinels needs prompts.sentinels over 0: known answers")
        if self.evaluation.num_answers > self.data.num_test:
            raise ValueError(
                f"evaluation.num_answers is {self.evaluation.num_answers}, but data.num_test is {self.data.num_test}"
            )
        if self.training.lr_scheduler_type == "polynomial" and self.training.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"training.learning_rate is {self.training.learning_rate}; training.lr_scheduler_type polynomial needs "
                f"one over {POLYNOMIAL_END}, at which it ends"
            )
        if not self.evaluation.num_answers and self.evaluation.metrics != DEFAULT_METRICS:
            on_answers = [name for name in self.evaluation.metrics if _is_of_answers(name)]
            if on_answers:
                raise ValueError(
                    f"evaluation.metrics {', '.join(on_answers)} needs answers, and evaluation.num_answers is 0"
                )
        if left_out := [name for name in self.clients.mix if name not in self.clients_with()]:
            raise ValueError(
                f"clients.mix gives {', '.join(left_out)} no client of clients.num_clients = {self.clients.num_clients}"
            )
        name, ranks = self.algorithm.name, self.clients.lora_ranks
        if max(ranks, default=0) > self.model.lora.rank:
            raise ValueError(
                f"clients.lora_ranks goes up to {max(ranks)}, over model.lora.rank = {self.model.lora.rank}"
            )
        if not self.algorithm.any_models and len(self.clients_with()) > 1:
            what = "tokenizer" if self.algorithm.exchanges_tokens else "architecture"
            raise ValueError(f"algorithm.name {name} needs one {what}, and clients.mix gives clients several models")
        if not self.algorithm.is_so("any_ranks") and len(set(self.lora_ranks)) > 1:
            raise ValueError(
                f"algorithm.name {name} needs equal ranks, and clients.lora_ranks gives several; "
                "flora, flexlora and hetlora take them"
            )
        for key in ("use_dora", "modules_to_save"):
            if getattr(self.model.lora, key):
                self._check_beside_factors(f"model.lora.{key}")
        if self.generation.engine == "vllm" and (objection := self.objection_to_vllm()):
            setting, why = objection
            raise ValueError(f"{setting} needs generation.engine transformers: {why}")
        self._check_sharding()
        if self.training.train_together > 1:
            self._check_together()
        if self.federation.hears_late and not self.algorithm.is_so("can_hear_late"):
            raise ValueError(
                f"federation.policy {self.federation.policy} needs an algorithm.name whose clients can be heard late, "
                f"such as semantic_consensus or fedavg_lora, and not {name}"
            )
        for client, own in self.clients.overrides.items():
            self._check_override(client, own)
        return self

    def _check_kinds(self, *, is_shared: bool) -> None:
        """Check what clients whose models are not adapted here can take part in.

        Settings that several runs share may name models for those of them that have any.
        """
        used = self.other_models
        unused = [name for name in self.clients.models if name not in used]
        if unused and (used or not is_shared):
            raise ValueError(f"clients.models names {', '.join(unused)}, which no client has")
        if not used:
            return
        named = f"{', '.join(used)} of clients.models"
        if not self.algorithm.any_models:
            what = "token probabilities" if self.algorithm.exchanges_tokens else "clients' weights"
            raise ValueError(
                f"algorithm.name {self.algorithm.name} needs {what}, and {named} has none; "
                "semantic_consensus and local_only need none"
            )
        if divided := [name for name in used if name in self.sharding.models]:
            raise ValueError(f"sharding.models names {', '.join(divided)} of clients.models, which is not loaded here")
        if not self.open_models and "multiple_choice" in self.evaluation.metrics:
            raise ValueError(f"evaluation.metrics multiple_choice needs likelihoods, which {named} does not tell")
        for client, own in self.clients.overrides.items():
            for key in _OF_ADAPTERS:
                if (model := self.model_of(client)) in used and has_setting(own, key.split(".")):
                    raise ValueError(
                        f"clients.overrides.{client}.{key} has no effect: client {client} has {model} of "
                        "clients.models, which is not trained here"
                    )

    def _check_options(self) -> None:
        """Check the options of parts, without making them; those of built-in parts are checked if they are given."""
        metrics, trackers = self.evaluation.metric_options, self.tracking.options
        for setting, given, used, where in (
            ("evaluation.metric_options", metrics, self.evaluation.metrics, "evaluation.metrics"),
            ("tracking.options", trackers, (*self.tracking.report_to, "tensorboard"), "tracking.report_to"),
        ):
            if unused := [name for name in given if name not in used]:
                raise ValueError(f"{setting} has options of {', '.join(unused)}, and {where} does not name it")
        algorithm, data, prompts, server = self.algorithm, self.data, self.prompts, self.server
        federation = self.federation
        named: list[tuple[Kind, str | None, dict[str, Any], str]] = [
            ("algorithm", algorithm.name, algorithm.options, "algorithm.options"),
            ("rule", algorithm.rule if algorithm.forms_consensus else None, algorithm.rule_options,
             "algorithm.rule_options"),
            ("competence", algorithm.competence if algorithm.elects else None, algorithm.competence_options,
             "algorithm.competence_options"),
            ("defence", algorithm.defence if algorithm.elects else None, algorithm.defence_options,
             "algorithm.defence_options"),
            ("partition", data.partition, data.partition_options, "data.partition_options"),
            ("reader", data.reader, data.reader_options, "data.reader_options"),
            ("selection", prompts.selection, prompts.selection_options, "prompts.selection_options"),
            ("embedder", server.embedder, server.embedder_options, "server.embedder_options"),
            *(("metric", name, metrics.get(name, {}), f"evaluation.metric_options.{name}")
              for name in self.evaluation.metrics),
            ("availability", federation.availability, federation.availability_options,
             "federation.availability_options"),
            ("policy", federation.policy, federation.policy_options, "federation.policy_options"),
            *(("tracker", name, trackers.get(name, {}), f"tracking.options.{name}")
              for name in self.tracking.report_to),
        ]  # fmt: skip
        for kind, name, options, setting in named:
            if name and (name not in BUILT_IN[kind] or (options and takes_options(kind, name))):
                try:
                    check_options(kind, name, options, setting)
                except ConfigError as error:
                    raise ValueError(str(error)) from error

    def _check_workers_find(self) -> None:
        """Check that workers, which are other processes, can import the parts that they need."""
        for kind, name in named_parts(self):
            if kind in ON_WORKERS and name.startswith("__main__:"):
                raise ValueError(
                    f"{kind} {name} is part of the program that runs, from which no worker can import it: write it "
                    "into a module, or set resources.fleet to local"
                )

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
        for section, key in (("generation", "engine"), ("training", "train_together")):
            if key in own.get(section, {}):
                raise ValueError(f"{where}: {section}.{key} is the same for all clients")
        one_model = self.algorithm.averages_weights and not self.algorithm.is_so("own_models")
        if one_model and (differs := {"max_new_tokens", "stop"} & {*own.get("generation", {})}):
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
        if self.algorithm.is_so("factors_only"):
            raise ValueError(
                f"algorithm.name {self.algorithm.name} knows A and B alone, and {key} trains more than them"
            )
        if self.sharding.models:
            raise ValueError(f"{key} is not for models of sharding.models")
        if self.model.quantization != "none":
            raise ValueError(f"{key} is not for model.quantization {self.model.quantization}")

    def objection_to_vllm(self) -> tuple[str, str] | None:
        """The setting that asks for what vLLM cannot do, with its value, and the reason; None: there is none."""
        algorithm, lora, quantization = self.algorithm, self.model.lora, self.model.quantization
        if algorithm.is_so("outgrows_ranks"):
            return f"algorithm.name {algorithm.name}", "what it adds to the base model outgrows any rank"
        for key in ("use_dora", "modules_to_save"):
            if getattr(lora, key):
                return f"model.lora.{key}", "vllm adds A and B alone"
        if self.sharding.models:
            return "sharding.models", "its ranks answer together"
        if quantization != "none":
            return f"model.quantization {quantization}", "the weights of a vllm engine are whole"
        return None

    def _check_sharding(self) -> None:
        if not self.sharding.models:
            return
        if unknown := [name for name in self.sharding.models if name not in self.clients_with()]:
            raise ValueError(f"sharding.models names {', '.join(unknown)}, which no client has")
        if self.resources.fleet == "local":
            raise ValueError("sharding.models needs resources.fleet ray")
        if self.algorithm.exchanges_tokens:
            name = self.algorithm.name
            raise ValueError(f"algorithm.name {name} needs models that are whole, and sharding.models divides them")
        if self.evaluation.lm_eval.tasks:
            raise ValueError("evaluation.lm_eval.tasks needs models that are whole, and sharding.models divides them")
        if self.model.quantization != "none":
            raise ValueError(f"model.quantization {self.model.quantization} is not for models of sharding.models")
        if self.sharding.zero_stage == 2 and self.algorithm.is_so("adjusts_gradients"):
            raise ValueError(f"algorithm.name {self.algorithm.name} needs sharding.zero_stage 3")
        if self.sharding.zero_stage == 2 and self.training.keep_optimizer:
            raise ValueError("training.keep_optimizer needs sharding.zero_stage 3")

    def _check_together(self) -> None:
        """Check that each row of a batch can have an adapter of its own, and numbers that are its client's."""
        key = f"training.train_together {self.training.train_together}"
        if self.sharding.models:
            raise ValueError(f"{key} is not for models of sharding.models; set it to 1")
        if self.model.lora.dropout:
            raise ValueError(f"{key} needs model.lora.dropout 0: dropout is drawn for a client's own batches")
        for name in ("use_dora", "modules_to_save"):
            if getattr(self.model.lora, name):
                raise ValueError(f"{key} knows A and B alone, and model.lora.{name} trains more than them")

    def of_client(self, client: int) -> ExperimentConfig:
        """The settings as they are for one client: its own of `clients.overrides` in place of the common ones."""
        own = self.clients.overrides.get(client, {})
        return self.model_copy(update={name: _laid_over(getattr(self, name), own[name]) for name in own})

    def client_training(self) -> PerClient[TrainingConfig]:
        """Settings of each client's local update."""
        own = {client: self.of_client(client).training for client in self.clients.overrides}
        return PerClient(self.training, own)

    def client_generation(self) -> PerClient[GenerationConfig]:
        """Settings of each client's answers."""
        own = {client: self.of_client(client).generation for client in self.clients.overrides}
        return PerClient(self.generation, own)

    @property
    def gives_answers(self) -> bool:
        """Whether clients answer prompts: the public ones, or some of the test set."""
        return self.algorithm.learns_prompts or self.evaluation.num_answers > 0

    @property
    def lora_ranks(self) -> tuple[int, ...]:
        """LoRA ranks that clients have in turn: client c that at place c modulo their number."""
        return (self.clients.lora_ranks or (self.model.lora.rank,))[: self.clients.num_clients]

    def client_ranks(self) -> tuple[int, ...]:
        """LoRA rank of each client, shape (C,)."""
        ranks, count = self.lora_ranks, self.clients.num_clients
        return (ranks * (count // len(ranks) + 1))[:count]

    def clients_with(self) -> Mapping[str, range]:
        """Ids of the clients that have each model, by its name, in the mix's order."""
        return models_of(tuple(self.clients.mix.items()) or ((self.model.name, 1.0),), self.clients.num_clients)

    def client_models(self) -> tuple[str, ...]:
        """Model name of each client, shape (C,)."""
        return tuple(name for name, clients in self.clients_with().items() for _ in clients)

    def model_of(self, client: int) -> str:
        """Name of the client's model."""
        return next(name for name, clients in self.clients_with().items() if client in clients)

    @property
    def open_models(self) -> tuple[str, ...]:
        """Names of the clients' models that are adapted here, each once; the others are of `clients.models`."""
        return tuple(name for name in self.clients_with() if name not in self.clients.models)

    @property
    def other_models(self) -> tuple[str, ...]:
        """Names of the clients' models that are of `clients.models`, each once."""
        return tuple(name for name in self.clients_with() if name in self.clients.models)

    @property
    def scored_models(self) -> tuple[str, ...]:
        """Names of the clients' models that tell how likely they find a text."""
        kinds = {name: self.clients.models[name].kind for name in self.other_models}
        return (*self.open_models, *(name for name, kind in kinds.items() if hasattr(resolve("client", kind), "score")))


def _laid_over(section: Settings, values: dict[str, Any]) -> Settings:
    return type(section).model_validate(merge_settings(section.model_dump(), values))


def _is_of_answers(metric: str) -> bool:
    """Whether a metric is measured on generated answers."""
    return bool(getattr(resolve("metric", metric), "of_answers", True))


def _name_is(*names: str) -> Callable[[ExperimentConfig], bool]:
    return lambda config: config.algorithm.name in names


def _rule_is(rule: str) -> Callable[[ExperimentConfig], bool]:
    return lambda config: config.algorithm.forms_consensus and config.algorithm.rule == rule


_OF_ADAPTERS = (
    *setting_keys(TrainingConfig, "training."),
    *(key for key in setting_keys(ModelConfig, "model.") if key not in ("model.name", "model.system_prompt")),
    "generation.batch_size",
    "clients.lora_ranks",
    "algorithm.ema_decay",
    "evaluation.lm_eval.tasks",
)
"""Settings of models that are adapted here."""

_EFFECTS: tuple[tuple[tuple[str, ...], Callable[[ExperimentConfig], bool], str], ...] = (
    (_OF_ADAPTERS, lambda config: bool(config.open_models), "a client whose model is not of clients.models"),
    (("clients.models",), lambda config: bool(config.other_models), "a client that has one of them"),
    (
        ("data.client_test_fraction",),
        lambda config: bool(config.scored_models),
        "a client whose model tells likelihoods",
    ),
    (("algorithm.rule",), lambda config: config.algorithm.forms_consensus, "algorithm.name semantic_consensus"),
    (
        ("algorithm.rule_options",),
        lambda config: config.algorithm.forms_consensus and takes_options("rule", config.algorithm.rule),
        "an algorithm.rule that has options which are no settings of their own",
    ),
    (
        ("algorithm.competence", "algorithm.defence"),
        lambda config: config.algorithm.elects,
        "an algorithm.rule that elects clients' answers",
    ),
    (
        ("algorithm.competence_options",),
        lambda config: config.algorithm.elects and takes_options("competence", config.algorithm.competence),
        "an algorithm.competence that has options",
    ),
    (
        ("algorithm.defence_options",),
        lambda config: config.algorithm.elects and takes_options("defence", config.algorithm.defence),
        "an algorithm.defence that has options",
    ),
    (
        ("algorithm.options",),
        lambda config: takes_options("algorithm", config.algorithm.name),
        "an algorithm.name that has options which are no settings of their own",
    ),
    (
        ("data.partition_options",),
        lambda config: takes_options("partition", config.data.partition),
        "a data.partition that has options which are no settings of their own",
    ),
    (
        ("prompts.selection_options",),
        lambda config: takes_options("selection", config.prompts.selection),
        "a prompts.selection that has options",
    ),
    (
        ("server.embedder_options",),
        lambda config: takes_options("embedder", config.server.embedder),
        "a server.embedder that has options which are no settings of their own",
    ),
    (
        ("server.embedding_model", "server.embedding_batch_size"),
        lambda config: config.server.model is not None,
        "server.embedder sentence_transformers",
    ),
    (("data.reader_options",), lambda config: config.data.reader is not None, "data.reader"),
    (
        ("data.subset", "data.revision", "data.test_subset"),
        lambda config: config.data.reader is None,
        "data.reader to be left out, which takes a source and a split alone",
    ),
    (
        ("algorithm.agreement_threshold", "algorithm.min_votes"),
        lambda config: config.algorithm.elects,
        "algorithm.name semantic_consensus with an algorithm.rule that elects an answer",
    ),
    (("algorithm.plurality_similarity",), _rule_is("plurality"), "algorithm.rule plurality"),
    (("algorithm.trim",), _rule_is("trimmed"), "algorithm.rule trimmed"),
    (("algorithm.num_byzantine",), _rule_is("multi_krum"), "algorithm.rule multi_krum"),
    (
        ("algorithm.pseudo_label_weight", "algorithm.first_exchange"),
        lambda config: config.algorithm.learns_prompts,
        "algorithm.name semantic_consensus or logit_exchange, or algorithm.self_labels",
    ),
    (
        ("generation.temperature",),
        lambda config: config.algorithm.draws_answers,
        "answers that are sampled: algorithm.name semantic_consensus, or algorithm.self_labels",
    ),
    (
        ("algorithm.answer_last_round", "server.embed"),
        lambda config: config.algorithm.forms_consensus and config.algorithm.rule != "own_answer",
        "algorithm.name semantic_consensus with an algorithm.rule other than own_answer",
    ),
    (
        ("generation.top_p", "generation.top_k"),
        lambda config: config.algorithm.draws_answers and config.generation.temperature > 0,
        "answers that are sampled: generation.temperature over 0, and algorithm.name semantic_consensus or "
        "algorithm.self_labels",
    ),
    (
        ("generation.num_samples",),
        lambda config: (
            config.algorithm.forms_consensus
            and config.algorithm.rule != "own_answer"
            and config.generation.temperature > 0
        ),
        "answers that are sampled and sent: generation.temperature over 0, and algorithm.name semantic_consensus with "
        "an algorithm.rule other than own_answer",
    ),
    (
        ("generation.send_confidence",),
        lambda config: (
            config.algorithm.forms_consensus and config.algorithm.rule != "own_answer" and bool(config.scored_models)
        ),
        "answers that are sent, by algorithm.name semantic_consensus with an algorithm.rule other than own_answer, and "
        "a client whose model tells likelihoods",
    ),
    (
        ("prompts.sentinels",),
        lambda config: (
            config.algorithm.elects and (config.algorithm.competence, config.algorithm.defence) != ("equal", "none")
        ),
        "an algorithm.competence or algorithm.defence that goes by known answers, such as sentinels or independent",
    ),
    (("generation.send_draws",), lambda config: config.generation.num_samples > 1, "generation.num_samples over 1"),
    (
        ("generation.stop",),
        lambda config: config.gives_answers,
        "answers: evaluation.num_answers over 0, algorithm.name semantic_consensus or algorithm.self_labels",
    ),
    (
        ("algorithm.ema_decay",),
        lambda config: config.algorithm.keeps_models,
        "an algorithm.name with which each client keeps a model of its own, such as semantic_consensus or local_only",
    ),
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
    (
        ("training.auto_find_batch_size",),
        lambda config: {*config.open_models} > {*config.sharding.models},
        "a model that is whole: ranks of sharding.models would have to run out of memory together",
    ),
    (
        ("training.train_together",),
        lambda config: config.clients.num_clients > 1 and config.algorithm.name != "centralized",
        "clients.num_clients over 1 and an algorithm.name other than centralized",
    ),
    (("sharding.zero_stage", "sharding.cpu_offload"), lambda config: bool(config.sharding.models), "sharding.models"),
    (
        ("evaluation.lm_eval.every", "evaluation.lm_eval.limit"),
        lambda config: bool(config.evaluation.lm_eval.tasks),
        "evaluation.lm_eval.tasks",
    ),
    (
        tuple(f"evaluation.judge.{name}" for name in JudgeConfig.model_fields),
        lambda config: "judge" in config.evaluation.metrics,
        "judge in evaluation.metrics",
    ),
    (
        ("generation.engine",),  # transformers is what any run has that has no engine
        lambda config: config.generation.engine == "transformers"
        or (bool(config.open_models) and config.gives_answers),
        "answers of a client whose model is not of clients.models: evaluation.num_answers over 0, algorithm.name "
        "semantic_consensus or algorithm.self_labels",
    ),
    (
        ("resources.engine_threads", "resources.engine_gpus", "resources.engine_cache_gib"),
        lambda config: config.generation.engine != "transformers",
        "generation.engine vllm",
    ),
    (
        ("resources.engine_replicas",),
        lambda config: config.generation.engine != "transformers" and config.resources.fleet == "ray",
        "generation.engine vllm and resources.fleet ray",
    ),
    (
        tuple(f"federation.{name}" for name in FederationConfig.model_fields if name != "devices"),
        lambda config: bool(config.federation.devices),
        "federation.devices, with which a run has a virtual clock",
    ),
    (
        ("federation.availability_options",),
        lambda config: takes_options("availability", config.federation.availability),
        "a federation.availability that has options",
    ),
    (
        ("federation.policy_options",),
        lambda config: takes_options("policy", config.federation.policy),
        "a federation.policy that has options",
    ),
    (("resources.ray_address",), lambda config: config.resources.fleet == "ray", "resources.fleet ray"),
)
"""Settings that have an effect only under a condition: their keys, the condition, and its words for errors."""


def without_effect(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """Keys of settings that were changed from their defaults, or that a client has of its own, and that have no effect,
    each with what it would need."""
    for keys, matters, needs in _EFFECTS:
        for key in keys:
            if setting_value(config, key) != setting_value(DEFAULTS, key) and not matters(config):
                yield key, needs
    for client, own in config.clients.overrides.items():
        mine = config.of_client(client)
        for keys, matters, needs in _EFFECTS:
            given = [key for key in keys if has_setting(own, key.split("."))]
            if given and not matters(mine):
                yield from ((f"clients.overrides.{client}.{key}", needs) for key in given)


def named_parts(settings: Settings) -> Iterator[tuple[Kind, str]]:
    """Kind and name of each part that settings name."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        for inner in value.values() if isinstance(value, dict) else [value]:
            if isinstance(inner, Settings):
                yield from named_parts(inner)
        for part in [*field.metadata, *part_names(field.annotation)]:
            if isinstance(part, PartName):
                yield from ((part.kind, one) for one in ([value] if isinstance(value, str) else value or ()))


DEFAULTS = ExperimentConfig.model_construct()


def setting_value(config: ExperimentConfig, key: str) -> Any:
    """The value of a setting, by its dotted key."""
    value: Any = config
    for part in key.split("."):
        value = value.get(int(part) if part.isdecimal() else part) if isinstance(value, dict) else getattr(value, part)
    return value


def is_chosen(config: ExperimentConfig, key: str) -> bool:
    """Whether a setting was given, and not left to its default, which it may be equal to."""
    section: Any = config
    *sections, name = key.split(".")
    for part in sections:
        section = getattr(section, part)
    return name in section.model_fields_set


def has_setting(values: Any, place: Sequence[str]) -> bool:
    """Whether nested settings hold one at this place; ids of clients count as texts."""
    first, *rest = place
    found = [name for name in values if str(name) == first] if isinstance(values, dict) else []
    return bool(found) and (not rest or has_setting(values[found[0]], rest))
