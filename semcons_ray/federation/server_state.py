"""What an algorithm keeps of the server from round to round, as bytes in the run's folder."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from semcons_ray.errors import RunFolderError

State = TypeVar("State")


def read_state(state: bytes, kind: type[State]) -> State:
    """The state in these bytes, of a msgspec type.

    Raises:
        RunFolderError: It is damaged, or of a version that keeps another.
    """
    try:
        return msgspec.msgpack.decode(state, type=kind)
    except msgspec.MsgspecError as error:
        raise RunFolderError(
            f"the server's state, in state/ of the run's folder, is damaged or of another version ({error}); start the "
            "run again in a new folder"
        ) from error
