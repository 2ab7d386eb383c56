"""Keys: taken from the environment, and kept out of everything that is written or said."""

from __future__ import annotations

import os
import re

from semcons_ray.errors import ConfigError

HIDDEN = "[key]"
_SHORTEST_PART = 6
"""Characters of a key that are hidden wherever they stand together."""

_MASKED = re.compile(r"\S*(?:\*{2,}|•{2,})\S*")
"""What providers make of a key in their messages, such as sk-ab***yz."""


def read_key(variable: str | None, setting: str) -> str:
    """The key in an environment variable; empty if there is none to read.

    Raises:
        ConfigError: The variable is not set, or what is in it can be no key.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable} is not set, which {setting}.api_key_env names")
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"the environment variable {variable}, which {setting}.api_key_env names, holds no key")
    return key


def without_key(text: str, key: str) -> str:
    """A text without the key and its parts of 6 or more characters, and without what masks a key."""
    shown, place = [], 0
    while key and place < len(text):
        length = _length_in(text, place, key)
        shown.append(HIDDEN if length else text[place])
        place += max(length, 1)
    return _MASKED.sub(HIDDEN, "".join(shown) if key else text)


def _length_in(text: str, place: int, key: str) -> int:
    """Length of the longest part of the key that stands there, 0 if it is too short to count."""
    length = min(_SHORTEST_PART, len(key))
    if text[place : place + length] not in key or place + length > len(text):
        return 0
    while place + length < len(text) and text[place : place + length + 1] in key:
        length += 1
    return length
