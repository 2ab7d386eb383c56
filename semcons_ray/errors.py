"""The errors this package raises.

    SemconsError                 anything this package raises on purpose
    ├── UserError                the user can mend it: one clear line, exit code 2
    │   ├── ConfigError          a setting is unknown, of the wrong type or out of range
    │   ├── DataError            a data set is missing, malformed, empty or too small
    │   ├── ModelError           a model cannot be found or loaded
    │   ├── PlacementError       the clients do not fit on the cluster
    │   └── RunFolderError       a run folder is missing, not empty, unwritable or half-written
    ├── MessageError             bytes that are not a message of ours
    ├── ClientError              a client failed: says which client, round and stage
    │   └── NotFiniteError       its loss, adapter or score is not a finite number; trying again would not help
    ├── EngineError              a generation engine broke
    └── QuorumError              too few clients answered for the round to count

Every error is built from one string, so it survives pickling through a Ray actor.
"""


class SemconsError(Exception):
    """Anything this package raises on purpose."""

    exit_code = 1


class UserError(SemconsError):
    """Something the user can mend; the message names the setting, file or flag to change."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(UserError):
    """A data set is missing, malformed, empty, or too small for what is asked of it."""


class ModelError(UserError):
    """A model cannot be found or loaded."""


class PlacementError(UserError):
    """The clients do not fit on the cluster."""


class RunFolderError(UserError):
    """A run folder is missing, not empty, unwritable, or half-written."""


class MessageError(SemconsError):
    """Bytes that do not decode to a message of the expected kind."""


class ClientError(SemconsError):
    """A client failed; the message says which client, round and stage."""


class NotFiniteError(ClientError):
    """A number that must be finite is not: the message says which, and what setting is the likely cause."""


class EngineError(SemconsError):
    """A generation engine broke, or could not take a request."""


class QuorumError(SemconsError):
    """Too few clients answered for the round to count."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: its first, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
