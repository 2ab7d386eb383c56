"""Hosts without models, for fleets: they answer at once, or misbehave as told."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from semcons_ray.data.examples import Example
from semcons_ray.errors import ModelError, NotFiniteError
from semcons_ray.federation.fleet import NO_OTHERS, Reply

logger = logging.getLogger("semcons_ray.fakes")


@dataclass(frozen=True)
class FakeSpec:
    """`troubles` by client: "die", "hang", "fail" (an exception), "diverge" (numbers that are not finite) or
    "refuse" (a UserError), each the first `times`. A visit takes `seconds`."""

    folder: Path
    troubles: Mapping[int, str] = field(default_factory=dict)
    times: int = 1
    seconds: float = 0.0
    loads: bool = True
    environment: tuple[str, ...] = ()

    def build(self, worker: str) -> "FakeHost":
        if not self.loads:
            raise ModelError("cannot load model nothing")
        return FakeHost(self)


class FakeHost:
    def __init__(self, spec: FakeSpec) -> None:
        self.spec = spec
        self.kept: dict[int, dict[str, bytes]] = {}
        self.adapter_shapes = {"lora_A": (2, 3)}
        self.first_adapter = {"lora_A": torch.arange(6.0).reshape(2, 3)}

    def visit(
        self, client_id: int, round: int, downlink: bytes, evaluate: bool, beside: Mapping[int, bytes] = NO_OTHERS
    ) -> Reply:
        attempts = len(list(self.spec.folder.glob(f"{client_id}-{round}-*")))
        (self.spec.folder / f"{client_id}-{round}-{attempts}").write_text(" ".join(map(str, beside)))
        logger.info("visits client %d, attempt %d", client_id, attempts)
        time.sleep(self.spec.seconds)
        if attempts < self.spec.times:
            match self.spec.troubles.get(client_id):
                case "die":
                    os._exit(1)
                case "hang":
                    time.sleep(3600)
                case "fail":
                    raise RuntimeError("out of luck")
                case "diverge":
                    raise NotFiniteError("its training loss is nan")
                case "refuse":
                    raise ModelError("change model.name")
        return Reply(
            client_id=client_id, round=round, uplink=downlink + b"%d" % client_id, train_loss=0.0, num_private=1,
            num_pseudo_labels=0, evaluation=None, rows=(),
        )  # fmt: skip

    def measure(self, client_id: int, round: int, downlink: bytes, examples: Sequence[Example] = ()) -> Reply:
        scored = "".join(f"{example.prompt} " for example in examples).encode()
        return self.visit(client_id, round, b"measured " + scored + downlink, True)

    @contextmanager
    def lent(self, client_id: int, files: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
        """Where the folder is not seen, what a visit leaves behind is how much came with it."""
        changed: dict[str, bytes] = {}
        files = {**self.kept.pop(client_id, {}), **files}
        yield changed
        changed[f"round_{len(files):03d}.safetensors"] = b"".join(files.values()) + b"x"

    def keep(self, client_id: int, files: Mapping[str, bytes]) -> None:
        self.kept[client_id] = {**files, "kept": b"k"}

    def export_adapter(self, client_id: int, round: int, downlink: bytes, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "who").write_text(f"{client_id} {round} {downlink.decode()}")
