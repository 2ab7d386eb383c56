"""A model behind an OpenAI-compatible API: asked many things at a time, each once, and within its caps.

What is sent goes through the official SDK, which repeats a request after time-outs, lost connections and the statuses
408, 409, 429 and 5xx. All else that can go wrong with a request is a missing answer, with a reason; only if no request
of a task is answered, or a wrong key or name makes all of them useless, the client is lost for the round.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import re
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from semcons_ray.config import EndpointConfig
from semcons_ray.endpoints.budget import Amount, Budget, Pace
from semcons_ray.endpoints.kept_calls import Call, Job, KeptCalls, LeftOut
from semcons_ray.endpoints.secrets import read_key, without_key
from semcons_ray.errors import ConfigError, SemconsError, UnansweredError, first_line
from semcons_ray.messages import Turn

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""Bytes of UTF-8 in a token, by which tokens are estimated before, or where, an endpoint does not count them."""

LONGEST_RETRY_AFTER = 120.0
"""Seconds up to which the SDK waits when an endpoint says when to come back."""

NO_KEY = "none"
"""What is sent as the key where there is none: the SDK sends no request without."""

SPELT = {"max_tokens": "max_completion_tokens"}
"""Newer names of parameters, by which they are sent to an endpoint that does not take the older ones."""

NOT_IN_SDK = ("top_k",)
"""Parameters that other servers than OpenAI's take."""

REFUSAL = re.compile(r"unsupported|not support|unexpected|unrecogni[sz]ed|unknown|not permitted", re.IGNORECASE)
"""Words by which an endpoint says that its model does not take a parameter."""

LONGEST_REASON = 200


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text.encode(errors="replace")) // BYTES_PER_TOKEN)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Something to be answered.

    Attributes:
        task: What it is asked for; the same may be asked again for another task.
        turns: The conversation, which ends in the question.
        max_tokens: Longest answer, in tokens.
        temperature: Of sampling; 0 is greedy.
        top_p: The fewest tokens whose probabilities add up to this are sampled from.
        top_k: How many of the likeliest tokens are sampled from; 0: all.
        seed: Of the endpoint's random numbers.
        stop: Texts that end an answer.
        model: Name of a model that came of a fine-tuning job; empty: the endpoint's own.
    """

    task: str
    turns: tuple[Turn, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    model: str = ""

    @property
    def num_tokens(self) -> int:
        """About how many tokens the conversation has."""
        return sum(estimate_tokens(turn.content) for turn in self.turns)

    def parameters(self) -> dict[str, Any]:
        """What is sent beside the conversation; what has no effect is left out."""
        found: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        return found | {
            name: value
            for name, value, default in (
                ("top_p", self.top_p, 1.0),
                ("top_k", self.top_k, 0),
                ("stop", [*self.stop], []),
            )
            if value != default
        }


@dataclass(frozen=True)
class Missing:
    """A request without an answer.

    Attributes:
        reason: Its kind, by which such requests are counted.
        detail: What the endpoint said of it.
        option: The option that may help.
        is_final: Whether all other requests would go the same way.
        is_capped: Whether it was not sent, since a cap is reached, which the reason names.
    """

    reason: str
    detail: str = ""
    option: str = "base_url"
    is_final: bool = False
    is_capped: bool = False

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


class Endpoint:
    """A model behind an OpenAI-compatible API.

    To make one connects to nothing, and reads nothing but the key.

    Args:
        options: Its settings.
        folder: Where answered calls are kept, so that none is made twice, whatever crashes.
        setting: The setting that has the options, for messages.

    Raises:
        ConfigError: The model or the address is missing, or the key.
    """

    def __init__(self, options: EndpointConfig, folder: Path, setting: str) -> None:
        for name in ("model", "base_url"):
            if not getattr(options, name):
                raise ConfigError(f"{setting}.{name} is missing")
        self.options = options
        self.setting = setting
        self.kept = KeptCalls(folder / "calls.jsonl")
        self._key = read_key(options.api_key_env, setting)
        self._pace = Pace(options.requests_per_minute)
        self._lock = threading.Lock()
        self._has_told_cap = False

    @cached_property
    def budget(self) -> Budget:
        """What may still be asked, counted from the kept calls."""
        calls = self.kept.all(Call)
        paid: list[Call | Job] = [*calls, *self.kept.all(Job)]
        taken = Amount(len(calls), sum(line.tokens for line in paid), sum(line.usd for line in paid))
        return Budget(self.options, taken)

    @cached_property
    def client(self) -> openai.OpenAI:
        """The SDK's client."""
        import openai

        return openai.OpenAI(
            api_key=self._key or NO_KEY,
            base_url=self.options.base_url,
            timeout=self.options.timeout_seconds,
            max_retries=self.options.max_retries,
            # A redirect would carry prompts to an address that nobody named.
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False, event_hooks={"request": [lambda request: self._pace.wait()]}
            ),
        )

    def close(self) -> None:
        """Close connections."""
        if "client" in vars(self):
            self.client.close()

    def ask(self, requests: Sequence[Request], what: str) -> list[Call | Missing]:
        """Answers to all requests, in their order; those that were answered before are not sent again.

        Args:
            requests: What is asked.
            what: What it is for, for messages: the client, the round and the task.

        Raises:
            UnansweredError: None was answered, unless a cap was reached; or the endpoint refuses the key or knows no
                such model.
            UserError: Calls cannot be kept, as the disk is full.
        """
        keys = [self._digest(request) for request in requests]
        found = {key: call for key in keys if (call := self.kept.get(Call, key))}
        results: dict[str, Call | Missing] = {**found}
        to_send = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
        with contextlib.closing(self._in_threads(to_send, what)) as sent:
            for key, result in sent:
                results[key] = result
                if isinstance(result, Missing) and result.is_final:
                    raise UnansweredError(f"{what}: {result}; set {self._options(result)}")
        replies = [results[key] for key in keys]
        self._tell(replies, what)
        return replies

    def _tell(self, replies: Sequence[Call | Missing], what: str) -> None:
        """Log how many answers are missing and why.

        Raises:
            UnansweredError: All are, none of them because of a cap.
        """
        reasons: Counter[str] = Counter()
        examples: dict[str, Missing] = {}
        for reply in replies:
            missing = reply if isinstance(reply, Missing) else _without_words(reply)
            if missing and not missing.is_capped:  # a cap is told of once
                reasons[missing.reason] += 1
                examples.setdefault(missing.reason, missing)
        if not reasons:
            return
        number, total = reasons.total(), len(replies)
        why = "; ".join(f"{count} x {examples[reason]}" for reason, count in reasons.most_common())
        if number == total:
            first = examples[reasons.most_common(1)[0][0]]
            raise UnansweredError(f"{what}: none of {total} prompts was answered: {why}; see {self._options(first)}")
        logger.warning("%s: %d of %d answers are missing: %s", what, number, total, why)

    def _options(self, missing: Missing) -> str:
        return " or ".join(f"{self.setting}.{option}" for option in missing.option.split())

    def _digest(self, request: Request) -> str:
        """Digest of a request; an endpoint that has moved is not asked again."""
        asked = (self.options.model, request)
        return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()

    @property
    def _patience(self) -> float:
        """Seconds in which at least one of the requests under way must end, however often they are repeated."""
        once = 2 * self.options.timeout_seconds + LONGEST_RETRY_AFTER
        return (self.options.max_retries + 1) * (once + self.options.max_concurrency * self._pace.seconds)

    def _in_threads(self, requests: Mapping[str, Request], what: str) -> Generator[tuple[str, Call | Missing]]:
        """Send requests, by their digests, some at a time, and yield results as they come.

        Threads are daemons: one that an endpoint holds for ever, as by a byte now and then, holds nothing else up.
        """
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[str, Call | Missing | SemconsError]] = queue.SimpleQueue()
        for key in requests:
            waiting.put(key)

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    key = waiting.get_nowait()
                    done.put((key, self._sent(key, requests[key], what)))

        for shared in ("client", "budget") if requests else ():
            getattr(self, shared)  # is made before there are threads
        for _ in range(min(self.options.max_concurrency, len(requests))):
            threading.Thread(target=work, daemon=True).start()
        left = set(requests)
        try:
            while left:
                try:
                    key, result = done.get(timeout=self._patience)
                except queue.Empty:
                    late = Missing(f"no answer in {self._patience:.0f} s", option="timeout_seconds")
                    yield from ((key, late) for key in left)
                    return
                if isinstance(result, SemconsError):
                    raise result
                left.remove(key)
                yield key, result
        finally:  # nobody listens any more
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.get_nowait()

    def _sent(self, key: str, request: Request, what: str) -> Call | Missing | SemconsError:
        """Send a request and keep its answer; whatever goes wrong is returned."""
        tokens = request.num_tokens
        most = Amount(1, tokens + request.max_tokens, self.budget.usd(tokens, request.max_tokens))
        if not self.budget.book(most):
            return self._capped()
        taken = Amount()
        try:
            call = self._read(key, request, self._reply(request), what)
            taken = Amount(1, call.tokens, call.usd)
            self.kept.add(call)
            return call
        except SemconsError as error:
            return error
        except Exception as error:
            return self._missing(error)
        finally:
            self.budget.settle(most, taken)

    def _capped(self) -> Missing:
        cap = f"{self.setting}.{self.budget.reached} {getattr(self.options, self.budget.reached)}"
        with self._lock:
            if not self._has_told_cap:
                self._has_told_cap = True
                logger.warning("%s is reached: all further answers are missing", cap)
        return Missing(f"{cap} is reached", is_capped=True)

    def _reply(self, request: Request) -> Any:
        """What the endpoint replies, by whatever parameters it takes."""
        import openai

        while True:
            sent = self._accepted(request.parameters())
            more = {name: sent[name] for name in NOT_IN_SDK if name in sent}
            known = {name: value for name, value in sent.items() if name not in more}
            try:
                return self.client.chat.completions.create(
                    model=request.model or self.options.model,
                    messages=[turn._asdict() for turn in request.turns],
                    extra_body=more or None,
                    **known,
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if not self._leave_out(error, sent):
                    raise

    def _accepted(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Parameters that the endpoint did not refuse, under the names by which it takes them."""
        found = {}
        for name, value in parameters.items():
            spelt = SPELT.get(name, "") if self.kept.get(LeftOut, name) else name
            if spelt and not (spelt != name and self.kept.get(LeftOut, spelt)):
                found[spelt] = value
        return found

    def _leave_out(self, error: openai.APIStatusError, sent: Mapping[str, Any]) -> bool:
        """Do from now on without a parameter of which the endpoint says that its model does not take it, if it does."""
        named = error.param or next((name for name in sent if f"'{name}'" in error.message), "")
        if named not in sent or not REFUSAL.search(f"{error.code} {error.message}"):
            return False
        with self._lock:
            if self.kept.get(LeftOut, named) is None:
                self.kept.add(LeftOut(parameter=named))
                instead = f"{SPELT[named]} is sent instead" if named in SPELT else "it is left out from now on"
                logger.warning("%s: %s takes no %s; %s", self.setting, self.options.model, named, instead)
        return True

    def _read(self, key: str, request: Request, reply: Any, what: str) -> Call:
        """What is in a reply, which may be anything that JSON can say.

        Raises:
            ValueError: There is nothing in it.
        """
        choices = getattr(reply, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = getattr(choice, "message", None)
        if message is None:
            raise ValueError(f"{reply}"[:LONGEST_REASON])
        content, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
        answer = _cut(content.strip() if isinstance(content, str) else "", request.stop)
        finish = "refusal" if refusal else str(getattr(choice, "finish_reason", None) or "stop")
        if finish in ("refusal", "content_filter"):
            answer = ""
        usage = getattr(reply, "usage", None)
        counted = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        estimated = (request.num_tokens, estimate_tokens(content) if isinstance(content, str) else 0)
        read, written = (
            number if isinstance(number, int) else other for number, other in zip(counted, estimated, strict=True)
        )
        return Call(
            key=key,
            task=what,
            answer=answer,
            finish=finish,
            input_tokens=read,
            output_tokens=written,
            usd=self.budget.usd(read, written),
        )

    def _missing(self, error: Exception) -> Missing:
        """What went wrong with a request, without the key and in one line."""
        import openai

        said = self.clean(_message(error))
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                variable = self.options.api_key_env
                whose = f"the key in {variable}" if variable else "requests without a key"
                reason = f"{self.options.base_url} refuses {whose}"
                return Missing(reason, said, option="api_key_env", is_final=True)
            case openai.NotFoundError():
                reason = f"{self.options.base_url} knows no model {self.options.model}"
                return Missing(reason, said, option="model base_url", is_final=True)
            case openai.RateLimitError():
                return Missing("too many requests", said, option="requests_per_minute max_retries")
            case openai.APIStatusError() if 300 <= error.status_code < 400:
                where = error.response.headers.get("location", "elsewhere")
                return Missing(f"redirected to {self.clean(where)}")
            case openai.APIStatusError():
                return Missing(f"status {error.status_code}", said, option="base_url max_retries")
            case openai.APITimeoutError():
                return Missing("timed out", option="timeout_seconds")
            case openai.APIConnectionError():
                cause = error.__cause__
                return Missing("no connection", self.clean(first_line(cause)) if cause else "")
            case ValueError():
                return Missing("a reply that is no answer", said)
            case _:
                return Missing(type(error).__name__, said)

    def clean(self, text: str) -> str:
        """A text from outside, in one line, not too long and without the key."""
        return without_key(" ".join(text.split()), self._key)[:LONGEST_REASON]

    def fail(self, error: Exception, what: str) -> NoReturn:
        """Lose the client for the round, by what went wrong with a request."""
        missing = self._missing(error)
        raise UnansweredError(f"{what}: {missing}; see {self._options(missing)}") from None


def _without_words(call: Call) -> Missing | None:
    """Why the answer in a reply is missing; None if it is not."""
    if call.answer:
        return None
    reasons = {"refusal": "refused", "content_filter": "refused", "length": "empty, and cut at its longest length"}
    return Missing(reasons.get(call.finish, "empty"), option="model")


def _message(error: Exception) -> str:
    """What an error says; for one that the endpoint told of, its own words."""
    body = getattr(error, "body", None)
    own = body.get("message") if isinstance(body, dict) else None
    return own if isinstance(own, str) and own else first_line(error)


def _cut(answer: str, stop: Sequence[str]) -> str:
    """An answer up to the first of the texts that end it, where the endpoint went on."""
    ends = [answer.find(text) for text in stop if text in answer]
    return answer[: min(ends)].rstrip() if ends else answer


def cap_of(replies: Iterable[Call | Missing]) -> str:
    """Which cap kept some of the answers from being asked for, in words; empty if none did."""
    return next((reply.reason for reply in replies if isinstance(reply, Missing) and reply.is_capped), "")
