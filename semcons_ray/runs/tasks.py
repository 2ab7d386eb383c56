"""Measures the models of a finished run by tasks of lm-eval: base models, and adapters as they were exported."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch

from semcons_ray.errors import ConfigError, RunFolderError
from semcons_ray.evaluation.harness import TaskScore
from semcons_ray.federation.fleet import client_folder
from semcons_ray.modeling.exported import load_base, with_adapter
from semcons_ray.runs.assembly import find_models, harness_of
from semcons_ray.runs.run_folder import RunFolder


def evaluate_run(out: Path, tasks: Sequence[str], limit: int | None, say: Callable[[str], None]) -> None:
    """Measure the models of a run; the scores go to its folder and into metrics.parquet.

    Those of base models are in the rows of round 0, and those of each client that has trained in the row of its last
    measurement.

    Args:
        out: The run's folder.
        tasks: See `Harness`.
        limit: See `Harness`.
        say: Called with a line for each model before it is measured.

    Raises:
        RunFolderError: It is no folder of a run that is finished, or is in use.
        ConfigError: lm-eval is not installed, does not know a task, or lacks its data; or the run's GPU is not there.
        ModelError: A model cannot be found or loaded.
    """
    folder = RunFolder(out)
    config = folder.begun_with()
    if not folder.is_finished(config.num_rounds):
        raise RunFolderError(f"{out} is not finished, so it has no adapters to measure; semcons resume {out} goes on")
    harness = replace(harness_of(config), tasks=tuple(tasks), limit=limit)
    harness.check("--tasks")
    device = device_here(folder)
    with folder.locked():
        for name in config.other_models:
            say(f"{name} of clients.models is left out: lm-eval needs a model that is here")
        commits, models = folder.commits(), config.client_models()
        last = {row.client_id: row.round for commit in commits for row in commit.metrics}
        scores: dict[int, dict[int, tuple[TaskScore, ...]]] = defaultdict(dict)
        for name, path in find_models(config, folder.revisions()).items():
            base = load_base(str(path), dtype=config.model.dtype, device=device, quantization=config.model.quantization)
            clients = [client for client in sorted(last) if models[client] == name]
            say(f"{name}: the base model")
            scores[0] |= dict.fromkeys(clients, harness.scores(base, str(path)))
            known: dict[str, tuple[TaskScore, ...]] = {}  # clients may share one adapter
            for client in clients:
                adapter = folder.adapters / client_folder(client)
                if adapter.is_dir() and last[client]:
                    content = sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
                    if content not in known:
                        say(f"{name}: client {client}")
                        with with_adapter(base, adapter) as model:
                            known[content] = harness.scores(model, str(path))
                    scores[last[client]][client] = known[content]
        for round, of_clients in scores.items():
            folder.add_scores(round, of_clients)
        folder.write_tables(commits)


def device_here(folder: RunFolder) -> str:
    """The device on which the run's models compute, "cpu" or "cuda".

    Raises:
        ConfigError: It is a GPU, and there is none here.
    """
    device = folder.stored_config().resources.device
    if device == "cuda" and not torch.cuda.is_available():
        path = folder.path / "config.yaml"
        raise ConfigError(f"resources.device is cuda in {path}, and there is no GPU here; set it to cpu")
    return device
