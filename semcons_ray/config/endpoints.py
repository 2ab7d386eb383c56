"""Settings of a model behind an OpenAI-compatible API: what black-box clients and an LLM judge have in common."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from semcons_ray.config.base import Settings
from semcons_ray.parts import SECRET


def _variable(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise PydanticCustomError(
            SECRET, "the name of an environment variable is expected, such as OPENAI_API_KEY, and never a key itself"
        )
    return name


def _address(url: str) -> str:
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ValueError("an address is expected, such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise PydanticCustomError(SECRET, "no user, password or query may be part of it; api_key_env names the key")
    return url


class EndpointConfig(Settings):
    """A model behind an OpenAI-compatible API, and how much may be asked of it."""

    model: str = Field("", description="Name of the model, as the endpoint knows it.")
    base_url: Annotated[str, AfterValidator(_address)] = Field(
        "", description="Address of the API up to its version, as http://localhost:8000/v1."
    )
    api_key_env: Annotated[str | None, AfterValidator(_variable)] = Field(
        None,
        description="Name of the environment variable that holds the key, as OPENAI_API_KEY; the key itself is written "
        "nowhere. null: the endpoint wants none.",
    )
    max_concurrency: int = Field(4, ge=1, le=256, description="Requests under way at the same time.")
    requests_per_minute: float | None = Field(
        None, gt=0, description="Most requests sent in a minute, evenly spaced, repeated ones as well. null: no limit."
    )
    timeout_seconds: float = Field(
        60.0, gt=0, description="Longest wait for the endpoint to accept a request, and for it to send anything."
    )
    max_retries: int = Field(
        4,
        ge=0,
        description="How often a request is repeated after a time-out, a lost connection or one of the statuses 408, "
        "409, 429 and 5xx, after growing waits or as long as Retry-After says. Then its answer is missing.",
    )
    max_requests: int | None = Field(
        None, ge=1, description="Most answers asked for over the whole run; then all others are missing. null: any."
    )
    max_tokens_total: int | None = Field(
        None, ge=1, description="The same for tokens read and written, by the most that a request may take."
    )
    max_usd: float | None = Field(None, gt=0, description="The same for their price in US dollars.")
    usd_per_million_input_tokens: float = Field(
        0.0, ge=0, description="Price of a million tokens that it reads, in US dollars."
    )
    usd_per_million_output_tokens: float = Field(0.0, ge=0, description="The same for tokens that it writes.")

    @model_validator(mode="after")
    def _money_needs_prices(self) -> EndpointConfig:
        if self.max_usd is not None and not (self.usd_per_million_input_tokens or self.usd_per_million_output_tokens):
            raise ValueError("max_usd needs usd_per_million_input_tokens and usd_per_million_output_tokens")
        return self


JUDGE_INSTRUCTIONS = (
    "You compare two answers to a question. Decide which one is better: correct first, then complete, then clear. "
    "Their order and length do not matter."
)


class JudgeConfig(EndpointConfig):
    """The model that judges answers, for the metric judge: it is asked twice, with both orders of the two answers."""

    instructions: str = Field(
        JUDGE_INSTRUCTIONS,
        min_length=1,
        description="What the judge is told to look at. How it has to reply is added to it.",
    )
    max_tokens: int = Field(
        512, ge=1, description="Longest verdict, in tokens. It is one word; models that think aloud need more."
    )
