"""Reads TensorBoard's files without TensorBoard."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def read_events(folder: Path) -> dict[str, dict[int, list[float]]]:
    """By tag and step, every scalar in the only file there is."""
    (path,) = folder.glob("events.out.tfevents.*")
    content, scalars = path.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                scalars.setdefault(value.tag, {}).setdefault(event.step, []).append(value.simple_value)
        content = content[16 + length :]
    return scalars
