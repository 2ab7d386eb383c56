import errno
import inspect
import os
import pickle
from pathlib import Path

import pytest
from ray import cloudpickle
from safetensors import SafetensorError

from semcons_ray import errors
from semcons_ray.errors import (
    ClientError,
    ConfigError,
    DataError,
    MessageError,
    ModelError,
    PlacementError,
    QuorumError,
    RunFolderError,
    SemconsError,
    StorageError,
    UserError,
    writing,
)

EVERY = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


def drawn_tree() -> dict[str, str]:
    """Parent by class, read off the tree in the docstring: four columns of drawing are one level."""
    parents, path = {}, []
    for line in errors.__doc__.splitlines():
        words = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ").split()
        if line.startswith("    ") and words:
            level = (line.index(words[0]) - 4) // 4
            path = [*path[:level], words[0]]
            parents[words[0]] = path[-2] if level else "Exception"
    return parents


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    assert drawn_tree() == {kind.__name__: kind.__base__.__name__ for kind in EVERY}


def test_every_error_is_documented():
    assert all(kind.__doc__ for kind in EVERY)


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
@pytest.mark.parametrize("kind", EVERY)
def test_an_error_survives_pickling(kind, dumps):
    text = "client 3, round 2: no room – 12 % left"
    copy = pickle.loads(dumps(kind(text)))
    assert type(copy) is kind
    assert str(copy) == text
    assert copy.exit_code == kind.exit_code


def test_the_user_can_mend_these_and_no_others():
    mendable = {kind for kind in EVERY if issubclass(kind, UserError)}
    assert mendable == {UserError, ConfigError, DataError, ModelError, PlacementError, RunFolderError, StorageError}
    assert {kind.exit_code for kind in mendable} == {2}
    assert {kind.exit_code for kind in (SemconsError, MessageError, ClientError, QuorumError)} == {1}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full; make room"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full; make room"),
        (OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "the disk quota is used up"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "the file system is read-only"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/run/state/x"), "permission denied"),
    ],
)
def test_a_folder_that_takes_no_more_is_told_of_in_one_line(error, says):
    line = f"^cannot write /run: {says}.*, and semcons resume goes on"
    with pytest.raises(StorageError, match=line) as raised, writing(Path("/run")):
        raise error
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file"), ValueError("shape"), ConfigError("No space left on device")]
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, writing(Path("/run")):
        raise error
    assert raised.value is error
