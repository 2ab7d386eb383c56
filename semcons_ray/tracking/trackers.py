"""TensorBoard files, and the trackers of `tracking.report_to`: Weights & Biases, MLflow and trackio.

Each class here is one run of a tracker, with the same constructor and methods, see `Tracker`. A tracker's own
environment variables hold; only what they leave open is set here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from semcons_ray.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

PROJECT = "semcons"
"""The project or experiment of all runs, unless an environment variable names another."""

_WANDB_VARIABLES = {
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    # By default the end of a run waits for ever where the network is gone.
    "WANDB_FINISH_TIMEOUT": "600",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
}
_MLFLOW_VARIABLES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}
"""By default an address where nobody answers is tried for four minutes."""

_MLFLOW_BATCH = {"metrics": 1000, "params": 100}
"""Most entries of a kind that MLflow takes at once."""


@dataclass(frozen=True)
class Subject:
    """What a tracker is told of a run.

    Attributes:
        folder: The run's folder.
        config: Every setting, nested, as in JSON.
    """

    folder: Path
    config: Mapping[str, Any]


class Past(msgspec.Struct, frozen=True):
    """What is known of a tracker's run that is to go on.

    Attributes:
        name: The name under which it is shown.
        id: Its id; empty if it has not begun, or its tracker needs none.
        sent: The last step that was sent to it; -1 if none was.
    """

    name: str
    id: str = ""
    sent: int = -1


class Tracker(Protocol):
    """One run of a tracker.

    Its class gets by name, where it has parameters for them, `subject` and `past`, and its options. It may have further

        check    a static method that finds out before any work whether it can be used, and raises a ConfigError
        past     what is known of its run once it is made, to go on with after a resume: then it keeps an id, and sets
                 `sent` if it knows better than `past` what it holds
    """

    def log(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """Send the values of a step, which took place at unix time `at`."""
        ...

    def close(self, *, finished: bool) -> None:
        """Send what is left, and say whether the run is finished, or has stopped before its end."""
        ...


class TensorBoard:
    """TensorBoard files in RUN/tensorboard. They are written anew when a run goes on, so no step is there twice."""

    def __init__(self, subject: Subject, past: Past) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import text

        self.past = Past(past.name)
        folder = subject.folder / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._file = RecordWriter(str(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        settings = json.dumps(subject.config, indent=2, ensure_ascii=False)
        self._write(Event(step=0, wall_time=0.0, summary=text("config", f"```\n{settings}\n```")))

    def log(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """See `Tracker.log`; numbers are kept as float32."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        shown = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, wall_time=at, summary=Summary(value=shown)))

    def close(self, *, finished: bool) -> None:
        """See `Tracker.close`."""
        self._file.close()

    def _write(self, event: Any) -> None:
        try:
            self._file.write(event.SerializeToString())
            self._file.flush()
        except OSError:  # of a full disk, which a file that is open would keep busy
            with contextlib.suppress(OSError):
                self._file.close()
            raise


class Wandb:
    """A run of Weights & Biases; its own files are in RUN/wandb, unless WANDB_DIR says otherwise."""

    def __init__(self, subject: Subject, past: Past) -> None:
        import wandb

        settings = wandb.setup().settings  # of variables and of W&B's own files
        self._run = wandb.init(
            project=settings.project or PROJECT,
            name=settings.run_name or past.name,
            dir=os.environ.get("WANDB_DIR", str(subject.folder.resolve())),
            id=past.id or uuid.uuid4().hex,
            resume="allow",
            reinit="create_new",
            config=dict(subject.config),
        )
        # Its server knows best what has arrived; offline there is none.
        sent = self._run.starting_step - 1 if self._run.resumed else past.sent
        self.past = Past(past.name, self._run.id, sent)

    @staticmethod
    def check() -> None:
        """See `Tracker.check`."""
        _set(_WANDB_VARIABLES)
        wandb = _imported("wandb")
        if wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False):
            raise ConfigError(
                "tracking.report_to: wandb has no API key: run `wandb login`, or set WANDB_API_KEY or "
                "WANDB_MODE=offline"
            )

    def log(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._run.log(dict(values), step=step)

    def close(self, *, finished: bool) -> None:
        """See `Tracker.close`."""
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """A run of MLflow. A step that is sent twice, with the same time and values, is there once."""

    def __init__(self, subject: Subject, past: Past) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if past.id:
            self._client.update_run(past.id, status="RUNNING")
            run = self._client.get_run(past.id)
        else:
            run = self._client.create_run(_experiment(self._client), run_name=past.name)
        self.past = Past(past.name, run.info.run_id, past.sent)
        # Parameters that are there cannot be changed.
        flat = _flat(subject.config)
        self._send("params", [Param(key, value) for key, value in flat if key not in run.data.params])

    @staticmethod
    def check() -> None:
        """See `Tracker.check`. Tables and the experiment are made here, before several runs do it at once."""
        _set(_MLFLOW_VARIABLES)
        mlflow = _imported("mlflow")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            _experiment(mlflow.MlflowClient())
        except Exception as error:
            raise ConfigError(
                f"tracking.report_to: mlflow cannot use its store ({first_line(error)}): change MLFLOW_TRACKING_URI"
            ) from error

    def log(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        from mlflow.entities import Metric

        self._send("metrics", [Metric(name, value, int(1000 * at), step) for name, value in values.items()])

    def close(self, *, finished: bool) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self.past.id, "FINISHED" if finished else "KILLED")

    def _send(self, kind: str, entries: list[Any]) -> None:
        most = _MLFLOW_BATCH[kind]
        for first in range(0, len(entries), most):
            self._client.log_batch(self.past.id, **{kind: entries[first : first + most]})


def _experiment(client: Any) -> str:
    """Id of MLflow's experiment; it is made if need be."""
    name, given = os.environ.get("MLFLOW_EXPERIMENT_NAME"), os.environ.get("MLFLOW_EXPERIMENT_ID")
    if given and not name:
        return given
    found = client.get_experiment_by_name(name or PROJECT)
    return str(found.experiment_id if found else client.create_experiment(name or PROJECT))


def _flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted key, as text."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class Trackio:
    """A run of trackio, which finds an earlier one by its name."""

    def __init__(self, subject: Subject, past: Past) -> None:
        import trackio

        with _told():
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=past.name,
                config=dict(subject.config),
                resume="must" if past.id else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        if past.id not in ("", self._run.id):
            self.close(finished=False)
            raise RuntimeError(f"a later run of its project is called {past.name} as well")
        # A process that is killed has not sent what it logged in its last half second.
        self.past = Past(past.name, self._run.id, self._run._next_step - 1 if past.id else -1)

    @staticmethod
    def check() -> None:
        """See `Tracker.check`."""
        _imported("trackio")

    def log(self, step: int, at: float, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        with _told():
            self._run.log(dict(values), step=step)

    def close(self, *, finished: bool) -> None:
        """See `Tracker.close`."""
        import trackio

        with _told():
            if trackio.context_vars.current_run.get() is self._run:
                trackio.finish()  # else it is finished once more, on stdout, when the process ends
            else:
                self._run.finish()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Log what is printed and warned of in the block: trackio prints on stdout, and warns of what it could not send."""
    with contextlib.redirect_stdout(io.StringIO()) as said, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield
    for line in said.getvalue().splitlines():
        logger.info("%s", line)
    for warning in warned:
        logger.warning("%s", warning.message)


def _set(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _imported(name: str) -> Any:
    """A tracker's package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"tracking.report_to: {name} is not installed ({error}): pip install {name}") from error
    if module.__file__ is None:  # W&B itself makes a folder called wandb, which Python takes for an empty package
        raise ConfigError(f"tracking.report_to: {name} is not installed: pip install {name}")
    return module
