import inspect
import pickle

import pytest
from ray import cloudpickle

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
    UserError,
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
    assert mendable == {UserError, ConfigError, DataError, ModelError, PlacementError, RunFolderError}
    assert {kind.exit_code for kind in mendable} == {2}
    assert {kind.exit_code for kind in (SemconsError, MessageError, ClientError, QuorumError)} == {1}
