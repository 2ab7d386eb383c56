from pathlib import Path
from typing import Any

import pytest
import yaml

from semcons_ray.commands.cli import main
from semcons_ray.errors import ConfigError
from semcons_ray.studies.search_space import SweepConfig, dump_sweep, load_sweep, trial_name

MIX = {"a": 1, "b": 1}


def write(folder: Path, values: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def test_a_grid_is_every_combination_in_order(tmp_path: Path) -> None:
    space = {"prompts": {"budget": {"grid": [6, 12]}}, "clients.mix": {"grid": [{}, MIX]}}
    points = load_sweep(write(tmp_path, {"space": space})).points()
    assert points == [
        {"prompts.budget": 6, "clients.mix": {}},
        {"prompts.budget": 6, "clients.mix": MIX},
        {"prompts.budget": 12, "clients.mix": {}},
        {"prompts.budget": 12, "clients.mix": MIX},
    ]
    assert len({trial_name(point) for point in points}) == 4


def test_a_sweep_may_vary_the_experiment_of_another_file(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("seed: 4\nnum_rounds: 9\nprompts: {budget: 3}\n")
    sweep = load_sweep([base, write(tmp_path, {"space": GRID, "seed": 5, "experiment": {"num_rounds": 2}})])
    config = sweep.configure(sweep.points()[0])
    assert (sweep.seed, config.seed, config.num_rounds, config.prompts.budget) == (5, 4, 2, 6)


def test_a_point_lies_over_the_experiment_and_a_mix_replaces_the_experiments(tmp_path: Path) -> None:
    values = {
        "experiment": {"num_rounds": 9, "clients": {"mix": {"other": 1}, "num_clients": 2}},
        "space": {"clients.mix": {"grid": [MIX]}, "training.batch_size": {"grid": [2]}},
    }
    sweep = load_sweep(write(tmp_path, values), {"num_rounds": 7})
    config = sweep.configure(sweep.points()[0])
    assert (config.num_rounds, config.clients.num_clients, config.training.batch_size) == (7, 2, 2)
    assert config.clients.mix == MIX
    values = {"experiment": {"data": {"columns": {"prompt": "a"}}}}
    sweep = load_sweep(write(tmp_path, values | {"space": {"data.columns": {"grid": [{"response": "b"}]}}}))
    assert sweep.configure(sweep.points()[0]).data.columns == {"response": "b"}


def test_a_trial_has_no_engine_but_one_that_is_asked_for(tmp_path: Path) -> None:
    """What it reserves is for workers, so it may not come to one by itself."""
    values: dict[str, Any] = {"space": {"training.batch_size": {"grid": [2]}}}
    sweep = load_sweep(write(tmp_path, values))
    assert sweep.configure(sweep.points()[0]).generation.engine == "transformers"
    assert sweep.point_of(sweep.configure(sweep.points()[0])) == {"training.batch_size": 2}
    with pytest.raises(ConfigError, match=r"generation\.engine vllm needs resources\.fleet local in a sweep"):
        load_sweep(write(tmp_path, values | {"experiment": {"generation": {"engine": "vllm"}}}))
    local = {"generation": {"engine": "vllm"}, "resources": {"fleet": "local"}}
    sweep = load_sweep(write(tmp_path, values | {"experiment": local}))
    assert sweep.configure(sweep.points()[0]).generation.engine == "vllm"
    with pytest.raises(ConfigError, match=r"generation\.engine auto is always transformers"):
        load_sweep(write(tmp_path, {"space": {"generation.engine": {"grid": ["auto", "transformers"]}}}))


def test_draws_are_within_bounds_and_more_of_them_keep_the_first(tmp_path: Path) -> None:
    space = {
        "training.learning_rate": {"loguniform": [1e-4, 1e-2]},
        "algorithm.ema_decay": {"uniform": [0.1, 0.9]},
        "model.lora.rank": {"randint": [2, 5]},
        "algorithm.rule": {"choice": ["medoid", "plurality"]},
        "seed": {"grid": [0, 1]},
    }
    values = {"search": "random", "num_samples": 20, "space": space}
    points = load_sweep(write(tmp_path, values)).points()
    assert len(points) == 40
    assert all(1e-4 <= point["training.learning_rate"] <= 1e-2 for point in points)
    assert all(0.1 <= point["algorithm.ema_decay"] <= 0.9 for point in points)
    assert {point["model.lora.rank"] for point in points} == {2, 3, 4}
    assert {point["algorithm.rule"] for point in points} == {"medoid", "plurality"}
    assert [point["seed"] for point in points[:4]] == [0, 1, 0, 1]
    assert points[0]["training.learning_rate"] == points[1]["training.learning_rate"]
    more = load_sweep(write(tmp_path, {**values, "num_samples": 25})).points()
    assert more[:40] == points
    assert load_sweep(write(tmp_path, {**values, "seed": 1})).points()[0] != points[0]


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "'1e-3'", "0.001"])
def test_numbers_of_a_space_are_numbers_however_they_are_written(text: str, tmp_path: Path) -> None:
    experiment = f"experiment: {{training: {{max_grad_norm: {text}}}}}"
    space = f"space: {{training.learning_rate: {{grid: [{text}, 2e-3]}}}}"
    sweep = load_sweep(write(tmp_path, f"{experiment}\n{space}"))
    assert sweep.points() == [{"training.learning_rate": 0.001}, {"training.learning_rate": 0.002}]
    assert [type(point["training.learning_rate"]) for point in sweep.points()] == [float, float]
    assert trial_name(sweep.points()[0]) == trial_name({"training.learning_rate": 0.001})
    assert sweep.experiment["training"]["max_grad_norm"] == 0.001
    assert [sweep.configure(point).training.learning_rate for point in sweep.points()] == [0.001, 0.002]
    again = load_sweep(write(tmp_path, dump_sweep(sweep)))
    assert again.points() == sweep.points()


def test_two_ways_to_write_a_number_are_one_value(tmp_path: Path) -> None:
    space = "space: {training.learning_rate: {grid: [1e-3, 0.001]}}"
    with pytest.raises(ConfigError, match="grid names a value twice"):
        load_sweep(write(tmp_path, space))


def test_bounds_of_draws_may_be_written_as_powers_of_ten(tmp_path: Path) -> None:
    text = "search: random\nnum_samples: 4\nspace: {training: {learning_rate: {loguniform: [1e-4, 1e-2]}}}"
    assert all(1e-4 <= point["training.learning_rate"] <= 1e-2 for point in load_sweep(write(tmp_path, text)).points())


def test_a_number_on_the_command_line_lies_over_the_experiment(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, {"space": GRID}), {"training": {"learning_rate": "1e-3"}})
    assert sweep.configure(sweep.points()[0]).training.learning_rate == 0.001


def test_relative_paths_of_a_sweep_hold_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.csv").touch()
    monkeypatch.chdir(tmp_path / "here")
    values = {
        "experiment": {"server": {"embedding_model": "./e"}, "model": {"name": "./base"}},
        "space": {
            "model.name": {"grid": ["./a", "../b", "org/c"]},
            "data": {"source": {"grid": ["mine.csv", "org/data"]}},
        },
    }
    sweep = load_sweep(write(tmp_path, values), {"resources": {"fleet": "local"}})
    monkeypatch.chdir("/")
    for read in (sweep, load_sweep(write(tmp_path, dump_sweep(sweep)))):
        configs = [read.configure(point) for point in read.points()]
        assert [config.model.name for config in configs[::2]] == [f"{tmp_path}/here/a", f"{tmp_path}/b", "org/c"]
        assert [config.data.source for config in configs[:2]] == [f"{tmp_path}/here/mine.csv", "org/data"]
        assert {config.server.embedding_model for config in configs} == {f"{tmp_path}/here/e"}
        assert [read.point_of(config) for config in configs] == read.points()


def test_relative_paths_of_a_mix_hold_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = {"clients.mix": {"choice": [{"./a": 1, "org/b": 1}]}}
    sweep = load_sweep(write(tmp_path, {"search": "random", "num_samples": 1, "space": space}))
    monkeypatch.chdir("/")
    assert sweep.points() == [{"clients.mix": {f"{tmp_path}/a": 1.0, "org/b": 1.0}}]
    assert set(sweep.configure(sweep.points()[0]).client_models()) == {f"{tmp_path}/a", "org/b"}


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    values = {"search": "random", "space": {"training.learning_rate": {"loguniform": [1e-4, 1e-2]}}, "num_samples": 3}
    first = load_sweep(write(tmp_path, values))
    again = load_sweep(write(tmp_path, dump_sweep(first)))
    assert again.points() == first.points()
    assert [again.configure(point) for point in again.points()] == [first.configure(point) for point in first.points()]


def test_the_point_of_settings_is_the_one_they_came_from(tmp_path: Path) -> None:
    space = {"clients.mix": {"choice": [{}, MIX]}, "training.learning_rate": {"uniform": [0.001, 0.002]}}
    sweep = load_sweep(write(tmp_path, {"search": "optuna", "space": space}))
    point = {"clients.mix": {"a": 1.0, "b": 1.0}, "training.learning_rate": 0.0015}
    assert sweep.point_of(sweep.configure(point)) == point
    assert trial_name(sweep.point_of(sweep.configure(point)) or {}) == trial_name(point)
    assert sweep.point_of(sweep.configure({**point, "training.learning_rate": 0.1})) is None
    assert sweep.point_of(sweep.configure({**point, "clients.mix": {"b": 2}})) is None


PARROTS = {"polly": {"kind": "tests.parrots:Parrot"}}
GRID = {"prompts.budget": {"grid": [6]}}
BAD: dict[str, tuple[Any, str]] = {
    "a list": ("- 1", "holds a list"),
    "nothing": ("", "space: Field required"),
    "no space": ({"space": {}}, "space"),
    "an unknown key": ({"space": {"prompts.budgets": {"grid": [6]}}}, "space.prompts.budgets: there is no such"),
    "a section": ({"space": {"prompts": {"grid": [6]}}}, "space.prompts: a single setting"),
    "the name": ({"space": {"name": {"grid": ["a"]}}}, "space.name: a single setting"),
    "a bad value": ({"space": {"prompts.budget": {"grid": [6, 0]}}}, "space (prompts.budget=0): prompts.budget"),
    "a bad combination": (
        {"space": {"data.num_test": {"grid": [5]}, "evaluation.num_answers": {"grid": [6]}}},
        "space (data.num_test=5, evaluation.num_answers=6): evaluation.num_answers is 6",
    ),
    "a bad bound": (
        {"search": "optuna", "space": {"algorithm.ema_decay": {"uniform": [0, 1]}}},
        "space (algorithm.ema_decay=1): algorithm.ema_decay",
    ),
    "a bad choice": (
        {"search": "optuna", "space": {"algorithm.rule": {"choice": ["medoid", "best"]}}},
        "space (algorithm.rule=best): algorithm.rule",
    ),
    "two kinds": ({"space": {"prompts.budget": {"grid": [6], "choice": [6]}}}, "give one of grid"),
    "an unknown kind": ({"space": {"prompts.budget": {"values": [6]}}}, "values are given under grid or"),
    "no values": ({"space": {"prompts.budget": {"grid": []}}}, "space.prompts.budget.grid"),
    "a value twice": ({"space": {"prompts.budget": {"grid": [6, 6]}}}, "grid names a value twice"),
    "turned bounds": (
        {"search": "random", "space": {"training.learning_rate": {"uniform": [2, 1]}}},
        "uniform needs a smaller number and a larger one",
    ),
    "a logarithm of 0": (
        {"search": "random", "space": {"training.learning_rate": {"loguniform": [0, 1]}}},
        "loguniform needs numbers over 0",
    ),
    "a draw in a grid": ({"space": {"algorithm.rule": {"choice": ["medoid"]}}}, "search grid takes a grid"),
    "a grid for optuna": ({"search": "optuna", "space": GRID}, "write choice instead of grid"),
    "an unknown setting of all": ({"space": GRID, "experiment": {"num_round": 1}}, "unknown setting 'num_round'"),
    "an unknown setting": ({"space": GRID, "metrics": "nll"}, "unknown setting 'metrics'"),
    "an unknown metric": ({"space": GRID, "metric": "nll"}, "metric"),
    "nats a token of a mix": (
        {"space": GRID, "metric": "mean_nll", "experiment": {"clients": {"mix": MIX}}},
        "metric: mean_nll is in nats a token, and the tokens of a and b differ; set metric to bits_per_byte",
    ),
    "a loss that nobody tells": (
        {
            "space": GRID,
            "metric": "bits_per_byte",
            "experiment": {"model": {"name": "polly"}, "clients": {"models": PARROTS}},
        },
        "metric: bits_per_byte needs likelihoods, and no client's model tells them in some trial; set metric to",
    ),
    "nats a token over models": (
        {"space": {"model.name": {"grid": ["a", "b"]}}, "metric": "worst_nll"},
        "metric: worst_nll is in nats a token, and the tokens of a and b differ; set metric to worst_bits_per_byte",
    ),
    "nats a token over models that are drawn": (
        {"search": "optuna", "space": {"clients.mix": {"choice": [{"a": 1}, {"b": 1}]}}, "metric": "mean_nll"},
        "set metric to bits_per_byte",
    ),
    "an unknown search": ({"space": GRID, "search": "hyperband"}, "search"),
    "an unknown logger": ({"space": GRID, "loggers": ["comet"]}, "loggers"),
}  # fmt: skip


def test_trials_of_one_model_may_be_ranked_by_nats_and_those_of_several_by_bits_per_byte(tmp_path: Path) -> None:
    assert load_sweep(write(tmp_path, {"space": GRID, "metric": "mean_nll"})).metric == "mean_nll"
    mixes = {"clients.mix": {"grid": [{"a": 1}, MIX, {"b": 1}]}}
    assert load_sweep(write(tmp_path, {"space": mixes})).metric == "bits_per_byte"
    assert load_sweep(write(tmp_path, {"space": mixes, "metric": "worst_bits_per_byte"})).higher_is_better is False


@pytest.mark.parametrize("name", BAD)
def test_bad_sweep(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, says = BAD[name]
    assert_refused(["sweep", str(write(tmp_path, values)), "--out", str(tmp_path / "out")], says, capsys)
    assert not (tmp_path / "out").exists()


def assert_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("semcons: ")
    assert error.count("\n") == 1
    assert says in error


def test_bad_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path, {"space": GRID}))
    assert_refused(["sweep", "/no/such.yaml", "--out", str(tmp_path / "out")], "cannot read /no/such.yaml", capsys)
    assert_refused(["sweep", path, "--num_round", "3", "--out", str(tmp_path / "out")], "'num_round'", capsys)
    assert_refused(["sweep", path, "--out", str(tmp_path)], "is not empty and holds no sweep", capsys)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sweep.yaml"]
    assert yaml.safe_load((tmp_path / "sweep.yaml").read_text()) == {"space": GRID}


@pytest.mark.parametrize("path", sorted(Path("experiments/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_ones_are_valid(path: Path) -> None:
    sweep = load_sweep(path)
    assert isinstance(sweep, SweepConfig)
    assert path.stem != "crossed" or len(sweep.points()) >= 12
