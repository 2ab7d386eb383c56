"""What crosses the wire between clients and the server: five messages, each with its encoding and byte count.

Schema (docs/wire.md has the same in prose). A message is one byte of framing, then a MessagePack map; the
framing byte is 0 for plain and 1 for zstd. The map has the key `type` (below) and the fields of the class, in
order. Nothing is pickled. A figure of "bytes" anywhere in this package is the length of what `encode` returns.

Legend: P public prompts. Semantic consensus uses the first three: everything that leaves a client is an `Answers`. The
weight-averaging baselines use the last two.
"""

from __future__ import annotations

from typing import ClassVar, Self

import msgspec
import zstandard

from semcons_ray.errors import MessageError

PLAIN, ZSTD = b"\x00", b"\x01"
MAX_DECODED_BYTES = 1 << 30


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages: how one becomes bytes and comes back."""

    _decoders: ClassVar[dict[type, msgspec.msgpack.Decoder[Message]]] = {}

    def encode(self, compression: str = "none") -> bytes:
        """Bytes of this message; `compression` is "none" or "zstd"."""
        body = msgspec.msgpack.encode(self)
        return ZSTD + zstandard.ZstdCompressor(level=3).compress(body) if compression == "zstd" else PLAIN + body

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The message in `data`.

        Raises:
            MessageError: The bytes are not a message of this class.
        """
        body = data[1:]
        try:
            if data[:1] == ZSTD:
                # The size is in the frame's header; decompress() would believe it and allocate whatever it says.
                size = zstandard.frame_content_size(body)
                if not 0 <= size <= MAX_DECODED_BYTES:
                    raise MessageError(f"{cls.__name__}: {size} bytes decompressed, not 0 to {MAX_DECODED_BYTES}")
                body = zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
            elif data[:1] != PLAIN:
                raise MessageError(f"{cls.__name__}: unknown framing byte {data[:1]!r}")
            decoder = cls._decoders.get(cls)
            if decoder is None:
                decoder = cls._decoders[cls] = msgspec.msgpack.Decoder(cls)
            return decoder.decode(body)  # type: ignore[return-value]
        except (msgspec.MsgspecError, zstandard.ZstdError, UnicodeDecodeError) as error:
            raise MessageError(f"{cls.__name__}: {error}") from error


class PublicPrompts(Message, frozen=True, kw_only=True, tag="public_prompts"):
    """Server to client, once: the prompts every client answers. Prompt i has id i."""

    prompts: tuple[str, ...]


class Answers(Message, frozen=True, kw_only=True, tag="answers"):
    """Client to server, once a round: one answer a public prompt; an empty one is a missing one.

    `num_examples`, the number of private examples, is what weighted rules weigh by, as in FedAvg.
    """

    round_number: int
    client_id: int
    num_examples: int
    answers: tuple[str, ...]


class PseudoLabels(Message, frozen=True, kw_only=True, tag="pseudo_labels"):
    """Server to client: the consensus answer of each prompt that did not abstain."""

    round_number: int
    prompt_ids: tuple[int, ...]
    responses: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.prompt_ids) != len(self.responses) or min(self.prompt_ids, default=0) < 0:
            raise MessageError("PseudoLabels: needs one prompt id, from 0, for each response")


class AdapterUpdate(Message, frozen=True, kw_only=True, tag="adapter_update"):
    """Client to server, by weight-averaging baselines: what the client has trained, as safetensors."""

    round_number: int
    client_id: int
    num_examples: int
    tensors: bytes


class GlobalAdapter(Message, frozen=True, kw_only=True, tag="global_adapter"):
    """Server to client, by weight-averaging baselines: what was made of all updates, as safetensors."""

    round_number: int
    tensors: bytes


NO_LABELS = PseudoLabels(round_number=0, prompt_ids=(), responses=())
"""What there is before the first exchange."""
