"""Makes the parts of a run from its settings: data, models, a cluster, a placement, engines, a fleet and a server."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, isnan, prod
from pathlib import Path
from typing import Any

from torch import Tensor

from semcons_ray.config import (
    DEFAULT_METRICS,
    EvaluationConfig,
    ExperimentConfig,
    GenerationConfig,
    PerClient,
    TrainingConfig,
    is_chosen,
    setting_value,
    with_engine,
)
from semcons_ray.consensus import Election
from semcons_ray.data.canaries import with_canaries, write_canaries
from semcons_ray.data.examples import DataSet, Example
from semcons_ray.data.losses import Reason, Tally
from semcons_ray.data.sources import is_files, load_examples, pin_data
from semcons_ray.data.split import DataSplit, divide, read_split, write_split
from semcons_ray.distributed.cluster import connect, list_nodes, this_node
from semcons_ray.distributed.engines import EnginePlan, RayEngine, Replicas, plan_engines
from semcons_ray.distributed.placement import (
    GIB,
    Demand,
    Limits,
    Node,
    ServerPlan,
    WorkerPlan,
    choose_device,
    plan_server,
    plan_workers,
    unused_gpus,
)
from semcons_ray.distributed.ray_fleet import RayFleet
from semcons_ray.distributed.ray_server import RayServer
from semcons_ray.endpoints.judge import JUDGE, Judge
from semcons_ray.errors import ConfigError, ModelError, PlacementError
from semcons_ray.evaluation.harness import Harness
from semcons_ray.evaluation.metrics import OWN_METRICS, Metric, make_metrics
from semcons_ray.evaluation.scores import numeric_match
from semcons_ray.federation.adapter_model import AdapterModels
from semcons_ray.federation.algorithms import build_algorithm
from semcons_ray.federation.fleet import Algorithm, Fleet, LocalFleet
from semcons_ray.federation.host import HostSpec, ModelsSpec
from semcons_ray.federation.kinds import KindModels
from semcons_ray.federation.randomness import SERVER, Cohort, stream
from semcons_ray.federation.server import ServerOnDemand, ServerProtocol, ServerSpec, build_embedder
from semcons_ray.federation.store import mark
from semcons_ray.messages import PublicPrompts, text_of
from semcons_ray.metering.energy import Draw, NodeMeter, estimate_draw, open_meters
from semcons_ray.metering.environment import has_vllm_for_gpus, with_variables
from semcons_ray.metering.gpus import IN_NVMLS_ORDER, this_place
from semcons_ray.modeling.chat import read_formats
from semcons_ray.modeling.dimensions import Dimensions
from semcons_ray.modeling.engine import Engine
from semcons_ray.modeling.fit import check_model, longest
from semcons_ray.modeling.footprint import PROCESS_BYTES, measure_engine, measure_footprint
from semcons_ray.modeling.model_folder import read_config, read_shapes
from semcons_ray.modeling.packaged import pin_model, resolve_model
from semcons_ray.modeling.quantization import check_quantization
from semcons_ray.modeling.vllm_engine import (
    RANKS,
    EngineSpec,
    VllmEngine,
    check_installed,
    room_for_rank,
)
from semcons_ray.parts import build
from semcons_ray.runs.run_folder import MetricsRow, RunFolder, columns_of
from semcons_ray.timeline.devices import Model
from semcons_ray.timeline.federation import Federation

CUT = "texts cut at model.max_length"
LENGTHS = ("model.max_length", "generation.max_new_tokens", "data.max_response_chars")
"""Settings whose defaults are for small models on CPUs."""

LARGE_PARAMETERS = 500_000_000
"""Size of a model from which on `LENGTHS` must be chosen."""

SERVER_BYTES = PROCESS_BYTES + (300 << 20)
"""Memory of a process with an embedding model: the server, or a worker whose clients' answers come from elsewhere."""
NO_REVISIONS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Placement:
    """Where everything runs.

    Attributes:
        config: The settings, with `auto` of `model.dtype`, `resources.device` and `generation.engine` resolved.
        nodes: The nodes, before anything is placed.
        server: Placement of the server.
        workers: Placement of each worker.
        demands: What a worker of each model needs, by model name.
        engines: Placement of each generation engine; empty: clients' own models answer.
        notes: Lines about GPUs that are there and not used, and about what `generation.engine` auto stands for.
        revisions: See `pin_revisions`.
    """

    config: ExperimentConfig
    nodes: tuple[Node, ...]
    server: ServerPlan
    workers: tuple[WorkerPlan, ...]
    demands: dict[str, Demand]
    engines: tuple[EnginePlan, ...] = ()
    notes: tuple[str, ...] = ()
    revisions: Mapping[str, str] = field(default_factory=dict)

    def pinned(self, model: str) -> str:
        """A model's name with its commit if it is on the hub, which is what a worker loads."""
        return self.revisions.get(model, model)

    @property
    def draws(self) -> dict[str, Draw | None]:
        """What each process draws when busy, by name, to estimate energy where it is not measured; None where the work
        is done elsewhere."""
        gpu_watts = {node.node_id: node.gpu_watts for node in self.nodes}
        threads = self.config.resources.threads_per_worker
        here = [worker for worker in self.workers if not worker.elsewhere]
        processes = [(worker, worker.ranks) for worker in here] + [(engine, 1) for engine in self.engines]
        elsewhere: dict[str, Draw | None] = {worker.name: None for worker in self.workers if worker.elsewhere}
        return elsewhere | {JUDGE: None} | {
            plan.name: estimate_draw(count * plan.threads, count * plan.gpus, gpu_watts[plan.node_id])
            for plan, count in processes
        } | {"server": estimate_draw(threads, self.server.gpus, self.server.gpu_watts)}


@dataclass(frozen=True)
class Method:
    """What clients and server do, and what they are measured by: parts that settings name, with their options.

    Attributes:
        cohort: Who takes part.
        algorithm: The algorithm.
        election: How an answer is elected, where the algorithm forms a consensus.
        metrics: Metrics by key.
    """

    cohort: Cohort
    algorithm: Algorithm
    election: Election
    metrics: Mapping[str, Metric]


def make_method(config: ExperimentConfig) -> Method:
    """Make the parts that need no model and no data.

    Raises:
        ConfigError: One refuses its options, a metric has the name of something else, or a profile of the section
            federation is not known.
    """
    algorithm, evaluation = config.algorithm, config.evaluation
    cohort = cohort_of(config)
    metrics = make_metrics(evaluation.metrics, evaluation.metric_options)
    if taken := metrics.keys() - {*DEFAULT_METRICS} & {*columns_of(MetricsRow), *OWN_METRICS}:
        raise ConfigError(f"evaluation.metrics: {min(taken)} is another column of metrics.parquet; use module:object")
    if config.federation.devices:
        Federation.of(config.federation)
    return Method(
        cohort,
        build_algorithm(algorithm, cohort, config.client_ranks(), config.num_rounds),
        Election(
            algorithm.rule,
            algorithm.options_of_rule,
            algorithm.agreement_threshold,
            algorithm.min_votes,
            competence=algorithm.competence,
            competence_options=algorithm.competence_options,
            defence=algorithm.defence,
            defence_options=algorithm.defence_options,
        ),
        metrics,
    )


def cohort_of(config: ExperimentConfig) -> Cohort:
    """Who takes part in which round; where data is pooled, all do."""
    participation = 1.0 if config.algorithm.name == "centralized" else config.clients.participation
    hears_late = config.federation.hears_late
    return Cohort(config.clients.num_clients, participation, config.seed, config.num_rounds, hears_late)


def pin_revisions(config: ExperimentConfig, known: Mapping[str, str]) -> dict[str, str]:
    """The commits of hub models and data, as `org/name@commit` by their names in the settings.

    The key of a data set is `datasets/org/name`. Models and data that are not on the hub are left out.

    Args:
        config: The settings.
        known: The commits with which the run began, if it did; they are kept.

    Raises:
        ModelError: A model cannot be found.
    """
    pinned = {name: known.get(name) or pin_model(name) for name in _models(config)}
    data = config.data
    sources = [] if data.reader else [data.source_at_revision, data.test_source]
    for source in filter(None, [*sources, config.prompts.source]):
        pinned[f"datasets/{source}"] = known.get(f"datasets/{source}") or pin_data(source)
    return {name: pin for name, pin in pinned.items() if name.removeprefix("datasets/") != pin}


def _models(config: ExperimentConfig) -> list[str]:
    """Names of all models that are loaded: those of clients, and the server's if it has one."""
    return [*dict.fromkeys([*config.open_models, *filter(None, [config.server.model])])]


def prepare_data(config: ExperimentConfig, folder: RunFolder, revisions: Mapping[str, str] = NO_REVISIONS) -> DataSplit:
    """The data split in a run's folder. If there is none, data is read, divided and written, with counts of losses.

    Args:
        config: The settings.
        folder: The run's folder.
        revisions: See `pin_revisions`.

    Raises:
        DataError: The data is missing, malformed or too small, or over half of it is left out.
        RunFolderError: The split cannot be read or written.
    """
    if folder.data.is_file():
        return read_split(folder.data)
    data = config.data

    def embed(texts: Sequence[str]) -> Tensor:
        name, options = embedder_of(config, revisions)
        return build_embedder(name, options, "cpu").embed(texts)

    sources = _load_sources(config, revisions)
    tallies = [tally for each in sources if each for tally in (each.tally, each.turns) if tally]
    folder.write_tallies(tallies)
    for tally in tallies:
        tally.check()
    source, test, public = sources
    clients = config.clients.num_clients
    split = divide(
        source, data, config.prompts, num_clients=clients, seed=config.seed, embed=embed, test=test, public=public
    )
    folder.write_tallies([*tallies, *_held_out(split)])
    if data.canaries:
        split, canaries = with_canaries(split, source.examples, data.canaries, config.seed)
        write_canaries(canaries, folder.canaries)
    write_split(split, folder.data)
    return read_split(folder.data)


def unused_examples(
    config: ExperimentConfig, split: DataSplit, revisions: Mapping[str, str] = NO_REVISIONS
) -> list[Example]:
    """Examples of the private data's source that are in no part of the split.

    Raises:
        DataError: The data is not there any more, or malformed.
    """
    used = {text_of(example.prompt) for example in split.examples()}
    source, _, _ = _load_sources(config, revisions)
    return [example for example in source.examples if text_of(example.prompt) not in used]


def embedder_of(config: ExperimentConfig, revisions: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Name and options of the server's embedder, with the commit of its model."""
    server, options = config.server, config.server.options_of_embedder
    if server.model:
        options["name"] = revisions.get(server.model, server.model)
    return server.embedder, options


def _held_out(split: DataSplit) -> Iterator[Tally]:
    """How many of the clients' examples are their own test sets."""
    if split.client_test:
        trained, tested = (sum(map(len, shares)) for shares in (split.private, split.client_test))
        have = sum(map(bool, split.client_test))
        why = Reason(words=f"in own test sets of {have} of {len(split.client_test)} clients")
        yield Tally.of("clients", "examples left out of training", trained + tested, {why: tested})


def _load_sources(
    config: ExperimentConfig, revisions: Mapping[str, str]
) -> tuple[DataSet, DataSet | None, DataSet | None]:
    """Private data, and test set and public prompts if they come from elsewhere; prompts of the test set are left out
    of the others."""
    data, prompts = config.data, config.prompts
    reader = build("reader", data.reader, data.reader_options, setting="data.reader_options") if data.reader else None

    def load(name: str, **options: Any) -> DataSet:
        pinned = revisions.get(f"datasets/{name}", name)
        return load_examples(pinned, max_response_chars=data.max_response_chars, **options)

    test = public = None
    own = {"subset": data.subset, "columns": data.columns, "reader": reader}
    if data.test_source:
        others = {**own, "subset": data.test_subset, "setting": "data.test_source"}
        split = data.test_split or ("train" if is_files(data.test_source) and not reader else "test")
        test = load(data.test_source, split=split, **others)
    elif data.test_split:
        test = load(data.source_at_revision, split=data.test_split, **own)
    besides = test.examples if test else ()
    needs_response = config.algorithm.rule == "reference" or config.prompts.sentinels > 0
    asked = {"needs_response": needs_response, "besides": besides}
    if prompts.source:
        others = {"subset": prompts.subset, "columns": prompts.columns, "setting": "prompts.source"}
        public = load(prompts.source, split=prompts.split or "train", **asked, **others)
    elif prompts.split:
        public = load(data.source_at_revision, split=prompts.split, **asked, **own)
    return load(data.source_at_revision, split=data.split, besides=besides, **own), test, public


def find_models(config: ExperimentConfig, revisions: Mapping[str, str] = NO_REVISIONS) -> dict[str, Path]:
    """Folder of each client model that is adapted here by name, downloaded or converted if need be; the server's model
    as well.

    Args:
        config: The settings.
        revisions: See `pin_revisions`.

    Raises:
        ModelError: A model cannot be found, bitsandbytes is needed and not installed, or nobody chose the lengths for a
            large model.
    """
    check_quantization(config.model.quantization)
    folders = {name: Path(resolve_model(revisions.get(name, name))) for name in _models(config)}
    found = {name: folders[name] for name in config.open_models}
    _check_lengths(config, found)
    return found


def _check_lengths(config: ExperimentConfig, folders: Mapping[str, Path]) -> None:
    """Check that lengths were chosen for a large model, even if they are the default ones.

    Raises:
        ModelError: They were not; the message names them.
    """
    left = [f"{key} {setting_value(config, key)}" for key in LENGTHS if not is_chosen(config, key)]
    for name, folder in folders.items() if left else ():
        if (parameters := count_parameters(folder)) > LARGE_PARAMETERS:
            raise ModelError(
                f"model {name} has {parameters / 1e9:.1f} billion parameters, and {', '.join(left)} "
                f"{'are defaults' if len(left) > 1 else 'is a default'} for small models on CPUs; set "
                f"{'them' if len(left) > 1 else 'it'}, if to the same, or begin with semcons init DIR --preset gpu-1b"
            )


def resolve_max_length(config: ExperimentConfig, folders: Mapping[str, Path]) -> ExperimentConfig:
    """The settings with a number for `model.max_length` null: as many tokens as all models can read beside an answer.

    Args:
        config: The settings.
        folders: Folder of each client model by name.

    Raises:
        ModelError: No model has a limit, or one has no room beside an answer.
    """
    if config.model.max_length is not None or not folders:
        return config
    room = {}
    for name, folder in folders.items():
        if (limit := longest(folder)) is not None:
            answer = max(own.max_new_tokens for own in _own_settings(config, name)[1])
            room[name] = limit - answer
            if room[name] < 8:
                raise ModelError(
                    f"model {name} has {limit} positions, and generation.max_new_tokens is {answer}; lower it"
                )
    if not room:
        raise ModelError(f"model.max_length null needs a number: {', '.join(folders)} can read any number of tokens")
    model = config.model.model_copy(update={"max_length": min(room.values())})
    return config.model_copy(update={"model": model})


def count_parameters(folder: Path) -> int:
    """Number of weights in a model's files.

    Raises:
        ModelError: The folder holds no safetensors weights.
    """
    return sum(map(prod, read_shapes(folder, read_config(folder)).values()))


def model_sizes(folders: Mapping[str, Path]) -> dict[str, Model]:
    """What the virtual time of models' work depends on, by their names."""
    sizes = {}
    for name, folder in folders.items():
        dimensions = Dimensions.of(read_config(folder))
        sizes[name] = Model(
            parameters=count_parameters(folder),
            layers=dimensions.layers,
            width=dimensions.width,
            key_value_bytes=2.0 * dimensions.key_values * dimensions.layers,
        )
    return sizes


def count_cut_texts(config: ExperimentConfig, folders: Mapping[str, Path], split: DataSplit) -> tuple[Tally, ...]:
    """How many of the questions and answers are cut for each model, which only needs its tokenizer.

    Args:
        config: The settings.
        folders: Folder of each model by name.
        split: The texts, of which those of clients that take part in no round are not looked at.

    Raises:
        ModelError: A tokenizer cannot be loaded, or its chat template cannot be used; see `ChatFormat`.
        ConfigError: No chat template reads a key of `model.chat_template_kwargs`.
    """
    if not folders:
        return ()
    model = config.model
    formats = read_formats(
        folders,
        max_length=model.num_tokens,
        system_prompt=model.system_prompt,
        template_kwargs=model.chat_template_kwargs,
        template_date=model.template_date,
    )
    texts = [(example.prompt, example.response) for example in split.examples(cohort_of(config).members)]
    raised = f"raise model.max_length from {model.max_length}, or use a smaller data.max_response_chars"
    tallies = []
    for name, chat in formats.items():
        cuts = Counter(chat.encode(*part).cut for text in texts for part in chat.parts(*text))
        counts = {
            Reason(words="of which the first turns are left out", remedy=raised): cuts["turns"],
            Reason(words="whose question loses its beginning", remedy=raised): cuts["prompt"],
            Reason(words="whose answer loses its end", remedy=raised): cuts["end"],
        }
        tallies.append(Tally.of(f"model {name}", f"{CUT} {model.max_length} tokens", cuts.total(), counts))
    return tuple(tallies)


def check_models(config: ExperimentConfig, folders: Mapping[str, Path], split: DataSplit) -> None:
    """Check that the models can do what the run asks of them; see `modeling.fit`.

    Raises:
        ModelError: One can't; the message says what to change.
    """
    examples = split.examples(cohort_of(config).members)
    texts = [text for example in examples for text in (text_of(example.prompt), example.response)]
    for name, folder in folders.items():
        check_model(folder, config.model.model_copy(update={"name": name}), *_own_settings(config, name), texts)


def check_test_set(evaluation: EvaluationConfig, test: Sequence[Example]) -> None:
    """Check that the test set has what the metrics need.

    Raises:
        ConfigError: It has not; the message names the metric.
    """
    if "multiple_choice" in evaluation.metrics and not any(example.options for example in test):
        raise ConfigError(
            "evaluation.metrics multiple_choice needs options, and no example of the test set has any; "
            "name their column in data.columns, or leave multiple_choice out"
        )
    answered = [example.response for example in test[: evaluation.num_answers]]
    if "numeric_match" in evaluation.metrics and all(isnan(numeric_match("", text)) for text in answered):
        raise ConfigError(
            f"evaluation.metrics numeric_match needs references with numbers, and none of the first {len(answered)} of "
            "the test set has one; leave numeric_match out"
        )


def judge_of(config: ExperimentConfig, state: Path) -> Judge | None:
    """The judge of answers, if it is asked for.

    Args:
        config: The settings.
        state: The folder of the run's state, in one of which its verdicts are kept.

    Raises:
        ConfigError: Its key is missing.
    """
    if "judge" not in config.evaluation.metrics:
        return None
    return Judge(config.evaluation.judge, state / "judge", this_place(uses_gpu=False).node)


def harness_of(config: ExperimentConfig) -> Harness:
    """What runs the tasks of `evaluation.lm_eval` on models of the run."""
    wanted, model = config.evaluation.lm_eval, config.model
    return Harness(
        tasks=wanted.tasks,
        limit=wanted.limit,
        rounds=wanted.rounds(config.num_rounds),
        batch_size=config.generation.batch_size,
        system_prompt=model.system_prompt,
        template_kwargs=model.chat_template_kwargs,
        template_date=model.template_date,
    )


@contextlib.contextmanager
def cluster(config: ExperimentConfig) -> Iterator[tuple[Node, ...]]:
    """The nodes on which to place clients: those of a Ray cluster, to which the block is connected, or this machine.

    Raises:
        PlacementError: The cluster cannot be joined or started.
    """
    if config.resources.fleet == "local":
        with with_variables(IN_NVMLS_ORDER):  # before anything looks for a GPU
            yield (this_node(),)
    else:
        with connect(config.resources.ray_address):
            yield list_nodes()


def place(
    config: ExperimentConfig,
    nodes: tuple[Node, ...],
    folders: dict[str, Path],
    revisions: Mapping[str, str] = NO_REVISIONS,
) -> Placement:
    """Resolve device, dtype and what answers, and place engines, server and workers.

    An engine that `generation.engine` auto stands for takes no worker's place: there are as many workers as there would
    be without. So that there can be, they have what it leaves of a GPU, unless `resources.gpus_per_worker` is given.

    Args:
        config: The settings.
        nodes: What is free on each node, the driver's own first.
        folders: Folder of each client model by name.
        revisions: See `pin_revisions`.

    Raises:
        PlacementError: Something does not fit; the message names the setting to change.
        ModelError: A model's size cannot be read.
        ConfigError: `model.attn_implementation` is not for this device or dtype, or vLLM is needed and not installed.
    """
    resources = config.resources
    device = choose_device(resources.device, nodes)
    notes = tuple(unused_gpus(resources.device, nodes))
    nodes = tuple(replace(node, gpus=()) if node.cuda_fault else node for node in nodes)
    dtype = config.model.dtype
    if dtype == "auto" and folders:
        # bfloat16 without hardware for it is slower than float32. One dtype on all nodes keeps results independent of
        # where clients run.
        usable = [node for node in nodes if node.gpus] if device == "cuda" else nodes
        native = all(node.gpu_bfloat16 if device == "cuda" else node.cpu_bfloat16 for node in usable)
        dtype = "bfloat16" if native else "float32"
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"dtype": dtype}),
            "resources": resources.model_copy(update={"device": device}),
        }
    )
    _check_attention(config)
    if config.generation.engine != "auto":
        return replace(_placed(config, nodes, folders, revisions), notes=notes)
    without = _placed(with_engine(config, "transformers"), nodes, folders, revisions)
    placement, reason = without, _why_not_vllm(config)
    if reason is None:
        try:
            beside = _placed(with_engine(config, "vllm"), nodes, folders, revisions)
        except PlacementError as error:
            reason = f"engines and workers do not fit together: {error}"
        else:
            if len(beside.workers) < len(without.workers):
                reason = f"beside engines there is room for {len(beside.workers)} workers of {len(without.workers)}"
            else:
                placement, reason = beside, "it is installed, and clients compute on GPUs"
    engine = placement.config.generation.engine
    return replace(placement, notes=(*notes, f"  generation.engine auto is {engine}: {reason}") if folders else notes)


def _why_not_vllm(config: ExperimentConfig) -> str | None:
    """Why clients' own models answer, and no vLLM engine, where `generation.engine` is auto, whatever room there is;
    None: an engine may answer.

    Args:
        config: The settings, with `resources.device` resolved.
    """
    if config.resources.device == "cpu":
        return "clients compute on the CPU"
    if not has_vllm_for_gpus():
        return "vLLM is not installed, or only its build for CPUs"
    if not (config.open_models and config.gives_answers):
        return "no client answers with a model of this machine"
    if objection := config.objection_to_vllm():
        return "{}: {}".format(*objection)
    if max(config.lora_ranks) > RANKS[-1]:
        return f"model.lora.rank {max(config.lora_ranks)} is over {RANKS[-1]}"
    if config.resources.fleet == "local":
        return "with resources.fleet local, one client asks at a time"
    return None


def _placed(
    config: ExperimentConfig, nodes: tuple[Node, ...], folders: dict[str, Path], revisions: Mapping[str, str]
) -> Placement:
    """Place engines, server and workers by settings that are resolved; see `place`."""
    resources, device = config.resources, config.resources.device
    demands = [_demand(config, name, folder) for name, folder in folders.items()]
    demands += [
        Demand(name, config.clients_with()[name], SERVER_BYTES, 0, elsewhere=True) for name in config.other_models
    ]
    limits = Limits(
        threads_per_worker=resources.threads_per_worker,
        gpus_per_worker=resources.gpus_per_worker,
        max_workers=len(demands) if resources.fleet == "local" else resources.max_workers,
        one_by_one=resources.fleet == "local",
    )
    limit = resources.memory_limit_gib
    free = nodes if limit is None else tuple(node.limited(int(limit * GIB)) for node in nodes)
    if resources.fleet == "local":  # one process uses one GPU
        free = tuple(replace(node, gpus=node.gpus[:1]) for node in free)
    engines: tuple[EnginePlan, ...] = ()
    if config.generation.engine == "vllm":
        engines, free = _place_engines(config, free, folders)
    server_gpus = resources.server_gpus if device == "cuda" else 0.0
    server, free = plan_server(free, memory_bytes=SERVER_BYTES, gpus=server_gpus)
    return Placement(
        config,
        nodes,
        server,
        plan_workers(demands, free, limits, device=device),
        {demand.model: demand for demand in demands},
        engines,
        revisions=revisions,
    )


def _demand(config: ExperimentConfig, name: str, folder: Path) -> Demand:
    """What a worker of a model needs, whichever of its clients it has: the most that the settings of one ask for."""
    sharding, model, device = config.sharding, config.model, config.resources.device
    ranks = sharding.models.get(name, 1)
    together = min(config.training.train_together, len(config.clients_with()[name]))
    footprints = []
    for training, generation in zip(*_own_settings(config, name), strict=True):
        # A host ends a process whose memory it does not have, where a GPU refuses it.
        finds_its_size = training.auto_find_batch_size and device == "cuda" and ranks == 1
        footprint = measure_footprint(
            folder,
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            lora=model.lora,
            quantization=model.quantization,
            max_length=model.num_tokens,
            batch_size=together * ceil((1 if finds_its_size else training.batch_size) / ranks),
            generation_batch_size=ceil(generation.batch_size / ranks),
            max_new_tokens=generation.max_new_tokens,
            num_samples=generation.num_samples,
            gradient_checkpointing=training.gradient_checkpointing,
            device=device,
        )
        if ranks > 1 and sharding.zero_stage == 3:
            footprint = footprint.divided(ranks, offloaded=sharding.cpu_offload)
        footprint = replace(footprint, trained=together * footprint.trained)  # each has an adapter of its own
        footprints.append(footprint)
    largest = max(footprints, key=lambda footprint: (footprint.device_bytes, footprint.host_bytes))
    return Demand(
        name,
        config.clients_with()[name],
        ranks * max(footprint.host_bytes for footprint in footprints),
        largest.device_bytes,
        ranks,
        parts=largest.parts,
    )


def _own_settings(config: ExperimentConfig, name: str) -> tuple[list[TrainingConfig], list[GenerationConfig]]:
    """The different pairs of settings of training and of answers of clients that have the model."""
    training, generation = config.client_training(), config.client_generation()
    own = {client: (training[client], generation[client]) for client in config.clients.overrides}
    pairs = PerClient((training.common, generation.common), own).distinct(config.clients_with()[name])
    return [of_training for of_training, _ in pairs], [of_answers for _, of_answers in pairs]


def _check_attention(config: ExperimentConfig) -> None:
    """Check that the device and the dtype, which are resolved, do for the attention that is asked for."""
    attention = config.model.attn_implementation or ""
    if attention.startswith("flash") and config.resources.device == "cpu":
        raise ConfigError(f"model.attn_implementation {attention} needs a GPU, and models compute on the CPU; try sdpa")
    if attention.startswith("flash") and config.model.dtype == "float32":
        raise ConfigError(f"model.attn_implementation {attention} computes in 16 bits, and model.dtype is float32")


def _place_engines(
    config: ExperimentConfig, nodes: tuple[Node, ...], folders: dict[str, Path]
) -> tuple[tuple[EnginePlan, ...], tuple[Node, ...]]:
    check_installed()
    room_for_rank(max(config.lora_ranks))
    resources = config.resources
    needs = {
        name: measure_engine(
            folder,
            dtype=config.model.dtype,
            cache_bytes=int(resources.engine_cache_gib * GIB),
            device=resources.device,
        )
        for name, folder in folders.items()
    }
    on_gpu = resources.device == "cuda"
    return plan_engines(
        [Demand(name, (), host, device) for name, (host, device) in needs.items()] * resources.engine_replicas,
        nodes,
        threads=resources.engine_threads or resources.threads_per_worker,
        cpus=0 if on_gpu or resources.fleet == "local" else resources.engine_threads or 0,
        gpus=resources.engine_gpus if on_gpu else 0.0,
        kept_bytes=SERVER_BYTES,
    )


@contextlib.contextmanager
def engines(placement: Placement) -> Iterator[dict[str, RayEngine | VllmEngine]]:
    """The generation engines by their own names, stopped at the end of the block; none if clients' own models answer.

    Raises:
        ModelError: An engine cannot load its model.
        EngineError: An engine died while it was loading.
    """
    config = placement.config
    started: dict[str, RayEngine | VllmEngine] = {}
    try:
        for plan in placement.engines:
            callers = sum(worker.model == plan.model for worker in placement.workers)
            _, generation = _own_settings(config, plan.model)
            spec = EngineSpec(
                name=plan.name,
                model=placement.pinned(plan.model),
                dtype=config.model.dtype,
                threads=plan.threads,
                gpus=plan.gpus,
                max_length=config.model.num_tokens + max(settings.max_new_tokens for settings in generation),
                max_rank=max(config.lora_ranks),
                max_adapters=callers,
                cache_bytes=int(config.resources.engine_cache_gib * GIB),
                stops=any(settings.stop for settings in generation),
            )
            if config.resources.fleet == "local":
                started[plan.name] = spec.build(this_place(uses_gpu=plan.gpus > 0).gpus)
            else:
                restarts = config.failures.max_restarts
                started[plan.name] = RayEngine.start(spec, plan, callers=callers, max_restarts=restarts)
        for engine in started.values():
            engine.wait()
        yield started
    finally:
        for engine in started.values():
            engine.close()


def _serving(placement: Placement, started: Mapping[str, RayEngine | VllmEngine], model: str) -> Engine | None:
    """What answers for the clients of a model; None: their own model does."""
    mine = [started[plan.name] for plan in placement.engines if plan.model == model]
    replicas = tuple(engine for engine in mine if isinstance(engine, RayEngine))
    return Replicas(replicas) if len(replicas) > 1 else next(iter(mine), None)


def known_answers(config: ExperimentConfig, references: Sequence[str]) -> dict[int, str]:
    """The answers that the server knows, by prompt: all for the rule `reference`, else those of sentinels."""
    if config.algorithm.rule == "reference":
        return dict(enumerate(references))
    draws = stream(config.seed, 0, SERVER, "consensus")
    drawn = draws.choice(len(references), size=config.prompts.sentinels, replace=False)
    return {prompt: references[prompt] for prompt in sorted(drawn.tolist())}


@contextlib.contextmanager
def parts(
    placement: Placement,
    split: DataSplit,
    method: Method,
    folder: RunFolder,
    started: Mapping[str, RayEngine | VllmEngine],
) -> Iterator[tuple[Fleet, ServerProtocol]]:
    """The fleet and the server, stopped at the end of the block. A server that has nothing to embed is not made.

    Args:
        placement: Where they run.
        split: Who holds which examples.
        method: What clients and server do.
        folder: The run's folder.
        started: See `engines`.

    Raises:
        UserError: There is no room for a worker, or a model cannot be loaded; the message says what to change.
        ClientError: A worker died while it was loading.
    """
    config, algorithm = placement.config, method.algorithm
    resources, failures = config.resources, config.failures
    uses_gpu = resources.device == "cuda"
    embedder, embedder_options = embedder_of(config, placement.revisions)
    server_spec = ServerSpec(
        embedder=embedder,
        embedder_options=embedder_options,
        device="cuda" if placement.server.gpus else "cpu",
        threads=resources.threads_per_worker,
        num_prompts=len(split.public),
        election=method.election,
        prompts=tuple(text_of(example.prompt) for example in split.public),
        embeds_both=config.server.embed == "prompt_and_answer",
        known=known_answers(config, [example.response for example in split.public]),
        seed=config.seed,
        generation=config.client_generation(),
    )
    public_prompts = b""
    if algorithm.uses_public_prompts:
        message = PublicPrompts(prompts=tuple(example.prompt for example in split.public))
        public_prompts = message.encode(config.algorithm.compression)
    shared = mark(folder.state)
    code = folder.code if folder.code.is_dir() else None
    kinds = kinds_of(config, folder.state, placement.revisions)
    specs: dict[str, HostSpec] = {}
    for name in placement.demands:
        models = kinds.get(name) or _models_spec(placement, name, _serving(placement, started, name))
        specs[name] = _host_spec(placement, models, split, public_prompts, algorithm, folder.state, shared)

    def make_server() -> ServerProtocol:
        if resources.fleet == "local":
            return server_spec.build()
        return RayServer(
            server_spec,
            node_id=placement.server.node_id,
            gpus=placement.server.gpus,
            timeout_seconds=failures.visit_timeout_seconds,
            max_restarts=failures.max_restarts,
            room_timeout_seconds=failures.room_timeout_seconds,
            code=code,
        )

    compares = config.evaluation.num_answers > 0 and "similarity" in config.evaluation.metrics
    # Its share of a GPU is booked before workers ask for theirs.
    at_once = config.algorithm.forms_consensus or compares or placement.server.gpus > 0
    server = make_server() if at_once else ServerOnDemand(make_server)
    fleet: Fleet
    if resources.fleet == "local":
        place = this_place(uses_gpu=uses_gpu)
        fleet = LocalFleet(
            {worker.name: specs[worker.model].build(worker.name) for worker in placement.workers},
            {worker.name: worker.clients for worker in placement.workers},
            place=place,
            quorum=failures.quorum,
            meter=NodeMeter(place.node, open_meters(uses_gpu=uses_gpu)),
            train_together=config.training.train_together,
        )
    else:
        fleet = RayFleet(
            placement.workers,
            specs,
            timeout_seconds=failures.visit_timeout_seconds,
            max_restarts=failures.max_restarts,
            quorum=failures.quorum,
            uses_gpu=uses_gpu,
            room_timeout_seconds=failures.room_timeout_seconds,
            code=code,
            state=folder.state,
            mark=shared,
            sizes=split.num_private,
            train_together=config.training.train_together,
        )
    try:
        yield fleet, server
    finally:
        fleet.close()
        server.close()


def kinds_of(
    config: ExperimentConfig, state: Path, revisions: Mapping[str, str] = NO_REVISIONS
) -> dict[str, KindModels]:
    """What the models of `clients.models` are made from, by name.

    Args:
        config: The settings.
        state: Folder of clients' states.
        revisions: See `pin_revisions`.

    Raises:
        ConfigError: A kind refuses its options, or needs an environment variable that is not set.
    """
    embedding_model = config.server.embedding_model
    kinds = {
        name: KindModels(
            name,
            config.clients.models[name].kind,
            config.clients.models[name].options,
            clients=config.clients_with()[name],
            embedding_model=revisions.get(embedding_model, embedding_model),
            system_prompt=config.model.system_prompt,
            folder=state.resolve(),
        )
        for name in config.other_models
    }
    return {name: replace(kind, environment=kind.needs(config.seed)) for name, kind in kinds.items()}


def _models_spec(placement: Placement, name: str, engine: Engine | None) -> AdapterModels:
    """What the models of clients are made from that are adapted here."""
    config = placement.config
    return AdapterModels(
        model=config.model.model_copy(update={"name": placement.pinned(name)}),
        device=config.resources.device,
        threads=config.resources.threads_per_worker,
        ranks=config.lora_ranks,
        training=config.client_training(),
        generation=config.client_generation(),
        clients=config.clients_with()[name],
        sharding=config.sharding if placement.demands[name].ranks > 1 else None,
        engine=engine,
    )


def _host_spec(
    placement: Placement,
    models: ModelsSpec,
    split: DataSplit,
    public_prompts: bytes,
    algorithm: Algorithm,
    state: Path,
    shared: str,
) -> HostSpec:
    config = placement.config
    return HostSpec(
        models=models,
        algorithm=algorithm,
        private=split.private,
        generation=config.client_generation(),
        public_prompts=public_prompts,
        test=split.test,
        num_answers=config.evaluation.num_answers,
        seed=config.seed,
        state=state.resolve(),
        mark=shared,
        scores_options="multiple_choice" in config.evaluation.metrics,
        harness=harness_of(config) if config.evaluation.lm_eval.tasks else None,
    )
