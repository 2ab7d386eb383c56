"""One question with its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, its reference response, and the category it belongs to ("" where the data names none)."""

    prompt: str
    response: str
    category: str = ""
