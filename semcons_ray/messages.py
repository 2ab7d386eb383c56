"""The messages between clients and the server: their fields, encoding and validation.

Schema (docs/wire.md has the same in prose). A message is one byte of framing, then a MessagePack map; the
framing byte is 0 for plain and 1 for zstd. The map has the key `type` (below) and the fields of the class, in
order. Nothing is pickled. A figure of "bytes" anywhere in this package is the length of what `encode` returns.

Decoding checks types, ranges and sizes, and that the bytes are exactly those that `encode` gives for the message, so
nothing can hide between the fields. Checks that need a receiver's knowledge are made there: the number of prompts in
federation/client.py and server.py, an adapter's shapes in federation/weights.py.

Legend: P public prompts, N tokens of all answers of a message, K tokens of a place. Semantic consensus uses the first
three: everything that leaves a client is an `Answers`. The weight-averaging baselines use the next two, the exchange of
token probabilities the last two.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple, Self, TypeVar

import msgspec
import zstandard

from semcons_ray.errors import MessageError

PLAIN, ZSTD = b"\x00", b"\x01"
MAX_TEXT_BYTES = 1 << 26
"""Longest message of texts, decompressed: room for 160,000 answers of 400 bytes."""
MAX_TENSOR_BYTES = 1 << 30
"""Longest message of tensors, decompressed."""

Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
Text = Annotated[str, msgspec.Meta(max_length=1 << 20)]


class Turn(NamedTuple):
    """What one side says in a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


Prompt = Text | tuple[Turn, ...]
"""What is asked: a question; or a conversation, perhaps with a system turn at its beginning, that ends in one."""


def turns_of(prompt: Prompt) -> tuple[Turn, ...]:
    """A prompt as a conversation."""
    return (Turn("user", prompt),) if isinstance(prompt, str) else prompt


def text_of(prompt: Prompt) -> str:
    """A prompt as one text, to be shown or embedded."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


class Message(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="type"
):
    """Base class of all messages: encoding and decoding. A field that has its default is not encoded.

    Attributes:
        max_bytes: Length of the longest MessagePack map that is encoded or decoded.
    """

    max_bytes: ClassVar[int] = MAX_TEXT_BYTES

    def encode(self, compression: str = "none") -> bytes:
        """The message as bytes; `compression` is "none" or "zstd".

        Raises:
            MessageError: The message is longer than receivers accept, or a text holds half a surrogate pair.
        """
        try:
            body = msgspec.msgpack.encode(self)
        except UnicodeEncodeError as error:
            raise MessageError(f"{type(self).__name__}: {error}") from error
        self._check_size(len(body), self.max_bytes)
        return ZSTD + zstandard.ZstdCompressor(level=3).compress(body) if compression == "zstd" else PLAIN + body

    @classmethod
    def decode(cls, data: bytes, *, max_bytes: int | None = None) -> Self:
        """The message in `data`.

        Args:
            data: Bytes that `encode` returned.
            max_bytes: Length of the longest map that the receiver expects; None: the class's `max_bytes`.

        Raises:
            MessageError: The bytes are not a message of this class, or not exactly those that `encode` gives for it.
        """
        body, limit = data[1:], cls.max_bytes if max_bytes is None else min(max_bytes, cls.max_bytes)
        try:
            if data[:1] == ZSTD:
                # The size is in the frame's header; decompress() would believe it and allocate whatever it says.
                cls._check_size(zstandard.frame_content_size(body), limit)
                body = zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
            elif data[:1] != PLAIN:
                raise MessageError(f"{cls.__name__}: unknown framing byte {data[:1]!r}")
            cls._check_size(len(body), limit)
            message = msgspec.msgpack.decode(body, type=cls)
        except (msgspec.MsgspecError, zstandard.ZstdError, UnicodeDecodeError) as error:
            raise MessageError(f"{cls.__name__}: {error}") from error
        if msgspec.msgpack.encode(message) != body:
            raise MessageError(f"{cls.__name__}: a field twice, out of order, without its type or longer than need be")
        return message

    @classmethod
    def _check_size(cls, size: int, limit: int) -> None:
        if not 0 <= size <= limit:
            raise MessageError(f"{cls.__name__}: {size:,} bytes, not 0 to {limit:,}")


class PublicPrompts(Message, frozen=True, kw_only=True, tag="public_prompts"):
    """Server to client, once: the P prompts that every client answers. The prompt at position i has the id i."""

    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if any(not prompt or prompt[-1].role != "user" for prompt in self.prompts if not isinstance(prompt, str)):
            raise MessageError("PublicPrompts: a conversation of prompts does not end with a question")


class Answers(Message, frozen=True, kw_only=True, tag="answers"):
    """Client to server, once a round: P answers, one for each public prompt; an empty text is a missing answer.

    `num_examples` is the client's number of private examples, by which weighted rules weigh clients, as FedAvg does. If
    a client draws several answers to each prompt, `answers` has the first ones, and `further` P of each other draw.

    Or it sends its choice from them alone, and in `counts` how many of them say so; 0 goes with an empty text. And it
    may say how likely its model finds each answer: `confidence` is mean log-likelihoods of tokens, float32,
    little-endian; NaN goes with an empty text.
    """

    round_number: Natural
    client_id: Natural
    num_examples: Positive
    answers: tuple[Text, ...]
    further: tuple[tuple[Text, ...], ...] = ()
    counts: tuple[Natural, ...] = ()
    confidence: bytes = b""

    def __post_init__(self) -> None:
        if any(len(sample) != len(self.answers) for sample in self.further):
            raise MessageError("Answers: samples of different numbers of prompts")
        if self.counts and ([*map(bool, self.counts)] != [*map(bool, self.answers)] or self.further):
            raise MessageError("Answers: needs a count for each answer, 0 for an empty one, and no further draws")
        if self.confidence:
            if len(self.confidence) != 4 * len(self.answers) * len(self.samples):
                raise MessageError("Answers: needs a confidence for each answer")
            pairs = zip(itertools.chain(*self.samples), itertools.chain(*self.confidences), strict=True)
            if any(not (-math.inf < value <= 0 if text else math.isnan(value)) for text, value in pairs):
                raise MessageError("Answers: a confidence is over 0 or not finite, or is not NaN with an empty answer")

    @property
    def confidences(self) -> tuple[tuple[float, ...], ...]:
        """What `confidence` says of each of `samples`; NaN where it says nothing."""
        if not self.confidence:
            return ((math.nan,) * len(self.answers),) * len(self.samples)
        return tuple(struct.iter_unpack(f"<{len(self.answers)}f", self.confidence))

    @property
    def samples(self) -> tuple[tuple[str, ...], ...]:
        """All of the client's answers: for each draw, P of them."""
        return (self.answers, *self.further)


class PseudoLabels(Message, frozen=True, kw_only=True, tag="pseudo_labels"):
    """Server to client: the elected answer to each prompt that gave a pseudo-label; prompt ids ascend."""

    round_number: Natural
    prompt_ids: tuple[Natural, ...]
    responses: tuple[Text, ...]

    def __post_init__(self) -> None:
        if len(self.prompt_ids) != len(self.responses):
            raise MessageError("PseudoLabels: needs one prompt id for each response")
        if any(one >= next_one for one, next_one in itertools.pairwise(self.prompt_ids)):
            raise MessageError("PseudoLabels: prompt ids do not ascend")

    @classmethod
    def of(cls, round_number: int, labels: Sequence[str | None]) -> Self:
        """The labels of P prompts, in their order; None where a prompt has none."""
        there = {prompt: label for prompt, label in enumerate(labels) if label is not None}
        return cls(round_number=round_number, prompt_ids=tuple(there), responses=tuple(there.values()))

    def check_prompts(self, num_prompts: int) -> None:
        """Check that every label is for one of P prompts.

        Raises:
            MessageError: One is not.
        """
        if self.prompt_ids and self.prompt_ids[-1] >= num_prompts:
            raise MessageError(f"PseudoLabels: a label for prompt {self.prompt_ids[-1]}, but there are {num_prompts}")


class AdapterUpdate(Message, frozen=True, kw_only=True, tag="adapter_update"):
    """Client to server, in weight-averaging baselines: the tensors that the client has trained, as safetensors."""

    max_bytes: ClassVar[int] = MAX_TENSOR_BYTES

    round_number: Natural
    client_id: Natural
    num_examples: Positive
    tensors: bytes


class GlobalAdapter(Message, frozen=True, kw_only=True, tag="global_adapter"):
    """Server to client, in weight-averaging baselines: the aggregated tensors, as safetensors."""

    max_bytes: ClassVar[int] = MAX_TENSOR_BYTES

    round_number: Natural
    tensors: bytes


Token = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]


class TokenScores(Message, frozen=True, kw_only=True, tag="token_scores"):
    """Client to server, in the exchange of token probabilities: P answers as token ids, and the K likeliest tokens at
    each of their N places, (N, K) uint32, with their probabilities, (N, K) float16, both little-endian."""

    max_bytes: ClassVar[int] = MAX_TENSOR_BYTES

    round_number: Natural
    client_id: Natural
    answers: tuple[tuple[Token, ...], ...]
    tokens: bytes
    probabilities: bytes


class TokenTargets(Message, frozen=True, kw_only=True, tag="token_targets"):
    """Server to client, in the exchange of token probabilities: P answers on which clients agree, or none at all, with
    the averages, as in `TokenScores`."""

    max_bytes: ClassVar[int] = MAX_TENSOR_BYTES

    round_number: Natural
    answers: tuple[tuple[Token, ...], ...]
    tokens: bytes
    probabilities: bytes


NO_LABELS = PseudoLabels(round_number=0, prompt_ids=(), responses=())
"""The pseudo-labels before the first exchange."""

NO_TARGETS = TokenTargets(round_number=0, answers=(), tokens=b"", probabilities=b"")
"""The targets before the first exchange."""


Uplink = TypeVar("Uplink", Answers, AdapterUpdate, TokenScores)
Downlink = TypeVar("Downlink", PseudoLabels, GlobalAdapter, TokenTargets)


def decode_uplink(
    kind: type[Uplink], data: bytes, *, client_id: int, round: int, max_bytes: int | None = None
) -> Uplink:
    """Decode what a client sent in a round.

    Args:
        kind: Class of the expected message.
        data: The encoded message.
        client_id: The client that sent it, as the transport knows it.
        round: The round in which it was sent.
        max_bytes: See `Message.decode`.

    Raises:
        MessageError: It is not such a message, or claims to be of another client or round; the error names the client.
    """
    with naming(client_id, round):
        message = kind.decode(data, max_bytes=max_bytes)
        if (message.client_id, message.round_number) != (client_id, round):
            claim = f"client {message.client_id}'s, round {message.round_number}"
            raise MessageError(f"{kind.__name__}: says that it is {claim}")
        return message


def decode_downlink(kind: type[Downlink], data: bytes, *, round: int) -> Downlink:
    """Decode what the server sent a client at the start of a round.

    Raises:
        MessageError: It is not a message of class `kind`, or not of an earlier round.
    """
    message = kind.decode(data)
    if message.round_number >= round:
        raise MessageError(f"{kind.__name__}: of round {message.round_number}, sent in round {round}")
    return message


@contextlib.contextmanager
def naming(client_id: int, round: int) -> Iterator[None]:
    """Add the client and the round to a `MessageError` raised in the block."""
    try:
        yield
    except MessageError as error:
        raise MessageError(f"client {client_id}, round {round}: {error}") from error
