"""Thousands of damaged and forged messages: each is refused with a MessageError, or is a message like any other.

All is drawn from seeds, so a failure comes again.
"""

import json
import math
import random
import struct
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import pytest
import torch
import zstandard
from msgspec import structs

from semcons_ray.consensus import Election
from semcons_ray.errors import MessageError
from semcons_ray.federation.algorithms.fedavg_lora import FedAvgLora
from semcons_ray.federation.algorithms.logit_exchange import LogitExchange
from semcons_ray.federation.fleet import Reply
from semcons_ray.federation.randomness import Cohort
from semcons_ray.federation.server import Server
from semcons_ray.federation.token_probabilities import TokenProbabilities
from semcons_ray.federation.weights import check_shapes, pack, shapes_of, unpack
from semcons_ray.messages import (
    PLAIN,
    ZSTD,
    AdapterUpdate,
    Answers,
    GlobalAdapter,
    Message,
    PseudoLabels,
    PublicPrompts,
    TokenScores,
    TokenTargets,
    Turn,
)
from semcons_ray.metering.ledger import Ledger
from semcons_ray.modeling.adapter import Adapter

NUM_MUTANTS = 3_000
ADAPTER: Adapter = {
    f"layers.{layer}.{name}.lora_{half}.weight": torch.linspace(-1, 1, 12).reshape(shape)
    for layer in range(2)
    for name in ("q", "v")
    for half, shape in (("A", (2, 6)), ("B", (6, 2)))
}
TENSORS = pack(ADAPTER, "float16")
TWO = struct.pack("<II", 5, 70_000)
TEXTS = ("Paris", "", "eine längere Antwort, " * 9, "日本", "\x00")
EXAMPLES: dict[type[Message], Message] = {
    PublicPrompts: PublicPrompts(prompts=(*TEXTS, (Turn("system", "s"), Turn("user", "q")))),
    Answers: Answers(round_number=3, client_id=1, num_examples=200, answers=TEXTS),
    PseudoLabels: PseudoLabels(round_number=2, prompt_ids=(0, 2, 3), responses=TEXTS[:3]),
    AdapterUpdate: AdapterUpdate(round_number=3, client_id=0, num_examples=200, tensors=TENSORS),
    GlobalAdapter: GlobalAdapter(round_number=2, tensors=TENSORS),
    TokenScores: TokenScores(
        round_number=3, client_id=1, answers=((5, 70_000), (9,)), tokens=TWO * 3, probabilities=b"\x00\x30" * 6
    ),
    TokenTargets: TokenTargets(round_number=2, answers=((5, 9),), tokens=TWO * 2, probabilities=b"\x00\x30" * 4),
}
SEVERAL = [
    structs.replace(EXAMPLES[Answers], further=(TEXTS[::-1], TEXTS)),
    structs.replace(EXAMPLES[Answers], counts=(3, 0, 7, 1, 2)),
    structs.replace(EXAMPLES[Answers], confidence=struct.pack("<5f", -1, math.nan, -0.5, 0, -9e9)),
]

packb = msgspec.msgpack.encode
LONG_HEADS = (b"\xdb", b"\xc6", b"\xdd", b"\xdf", b"\xc9")  # text, bytes, array, map, extension, of 32-bit lengths
VALUES: Sequence[Any] = (
    None, True, 0, 1, -1, 7, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, -1.5, float("nan"), float("inf"),
    "", "a", "a" * 70_000, "answers", b"", b"\xff" * 9, [], [[]], [None], [1, 2], [-1], ["a", "b"], ["a", 1], [b"a"],
    [2**63], [3, 2, 1], [1, 1], {}, {"a": 1}, {1: 2}, {"type": "answers"}, [{}] * 99, list(range(999)),
    msgspec.msgpack.Ext(1, b"x"), TENSORS, TENSORS[:-1], list(TEXTS),
)  # fmt: skip


def nested(depth: int, head: bytes) -> bytes:
    """Arrays or maps, each in the one before."""
    return head * depth + b"\xc0"


def framed(rng: random.Random, body: bytes) -> bytes:
    return PLAIN + body if rng.random() < 0.5 else ZSTD + zstandard.ZstdCompressor().compress(body)


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def cut(rng: random.Random, data: bytes) -> bytes:
    """A piece left out, put in twice, or put in the place of another."""
    first, second = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    third = rng.randrange(len(data) + 1)
    return rng.choice([data[:first], data[:first] + data[second:], data[:second] + data[first:],
                       data[:first] + data[third:] + data[second:], data + data[first:second]])  # fmt: skip


def forge_fields(rng: random.Random, message: Message) -> bytes:
    """A map with wrong values: whatever MessagePack can hold, in the place of a field, beside them, or for a key."""
    fields = list(msgspec.to_builtins(message, builtin_types=(bytes,)).items())
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(fields))
        key, value = fields[place]
        match rng.randrange(7):
            case 0:
                fields[place] = key, rng.choice(VALUES)
            case 1:
                del fields[place]
                fields = fields or [("type", "answers")]
            case 2:
                fields.insert(place, (rng.choice(["client_id", "gradients", "type", ""]), rng.choice(VALUES)))
            case 3:  # twice
                fields.insert(rng.randrange(len(fields) + 1), (key, rng.choice([value, rng.choice(VALUES)])))
            case 4:  # two fields' values change places
                other = rng.randrange(len(fields))
                fields[place], fields[other] = (key, fields[other][1]), (fields[other][0], value)
            case 5:
                rng.shuffle(fields)
            case 6:
                if isinstance(value, (list, tuple)) and value:
                    elements = list(value)
                    elements[rng.randrange(len(elements))] = rng.choice(VALUES)
                    fields[place] = key, elements
    head = bytes([0x80 | len(fields)]) if len(fields) < 16 else b"\xde" + struct.pack(">H", len(fields))
    return head + b"".join(packb(key) + packb(value) for key, value in fields)


def forge_lengths(rng: random.Random, message: Message) -> bytes:
    """A length of gigabytes, or nesting without end, where a value would begin."""
    body = packb(message)
    place = rng.randrange(len(body))
    huge = rng.choice(LONG_HEADS) + struct.pack(">I", rng.choice([2**32 - 1, 2**31, 2**27, 70_000]))
    return body[:place] + rng.choice([huge, nested(100_000, b"\x91"), nested(100_000, b"\x81\xa1a")]) + body[place:]


def forge_frame(rng: random.Random, message: Message) -> bytes:
    """A zstd frame that lies about its size or does not say it, one in another, or several."""
    body = packb(message)
    compress = zstandard.ZstdCompressor().compress
    size = struct.pack("<Q", rng.choice([2**20, 2**26 + 1, 2**30 + 1, 2**50, 2**64 - 1]))
    return ZSTD + rng.choice(
        [
            b"\x28\xb5\x2f\xfd\xe0" + size + b"\x01\x00\x00",
            b"\x28\xb5\x2f\xfd\xe0" + size + compress(body)[6:],
            zstandard.ZstdCompressor(write_content_size=False).compress(body),
            compress(compress(body)),
            compress(ZSTD + compress(body)),
            compress(body) + compress(body),
            compress(bytes(rng.choice([0, 1, 2**22]))),
            b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"skip" + compress(body),
        ]
    )


def mutant(rng: random.Random, message: Message) -> bytes:
    match rng.randrange(8):
        case 0:
            return flip_bits(rng, message.encode(rng.choice(["none", "zstd"])))
        case 1:
            return cut(rng, message.encode(rng.choice(["none", "zstd"])))
        case 2:
            return framed(rng, flip_bits(rng, packb(message)))
        case 3:
            return framed(rng, forge_lengths(rng, message))
        case 4:
            return forge_frame(rng, message)
        case _:
            return framed(rng, forge_fields(rng, message))


def check_right(message: Message) -> None:
    """What every message must be, said a second time and in plain Python."""
    for name in ("round_number", "client_id", "num_examples"):
        value = getattr(message, name, 1)
        assert type(value) is int
        assert (name == "num_examples") <= value < 2**63
    of_tokens = isinstance(message, (TokenScores, TokenTargets))
    if of_tokens:
        assert all(type(token) is int and 0 <= token < 2**32 for answer in message.answers for token in answer)
        assert {type(message.tokens), type(message.probabilities)} == {bytes}
    for name in () if of_tokens else ("prompts", "answers", "responses"):
        prompts = getattr(message, name, ())
        conversations = [prompt for prompt in prompts if type(prompt) is tuple] if name == "prompts" else []
        for turns in conversations:
            assert turns[-1].role == "user"
            assert {turn.role for turn in turns} <= {"system", "user", "assistant"}
        texts = [prompt for prompt in prompts if prompt not in conversations]
        for text in [*texts, *(turn.content for turns in conversations for turn in turns)]:
            assert type(text) is str
            assert len(text) <= 2**20
            text.encode()
    if isinstance(message, Answers) and message.confidence:
        values = struct.unpack(f"<{len(message.answers) * len(message.samples)}f", message.confidence)
        texts = [text for sample in message.samples for text in sample]
        pairs = zip(texts, values, strict=True)
        assert all(-math.inf < value <= 0 if text else math.isnan(value) for text, value in pairs)
    if isinstance(message, Answers) and message.counts:
        assert all(type(count) is int and count >= 0 for count in message.counts)
        assert [count > 0 for count in message.counts] == [text != "" for text in message.answers]
        assert not message.further
    if isinstance(message, PseudoLabels):
        assert len(message.prompt_ids) == len(message.responses)
        assert sorted({*message.prompt_ids}) == list(message.prompt_ids)
        assert all(type(prompt) is int and prompt >= 0 for prompt in message.prompt_ids)
    assert type(message).decode(message.encode()) == message


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_a_mutant_is_refused_or_right(kind: type[Message]) -> None:
    rng = random.Random(kind.__name__)
    right = 0
    further = SEVERAL * 5 if kind is Answers else []
    for _ in range(NUM_MUTANTS):
        data = mutant(rng, rng.choice([EXAMPLES[kind]] * 9 + list(EXAMPLES.values()) + further))
        try:
            decoded = kind.decode(data)
        except MessageError as error:
            assert kind.__name__ in str(error)
        else:
            assert type(decoded) is kind
            check_right(decoded)
            assert data[0] or decoded.encode() == data  # of a message there is one plain encoding
            right += 1
    assert 0 < right < NUM_MUTANTS / 2  # else the mutants are no test


def forge_header(rng: random.Random, tensors: bytes) -> bytes:
    """Safetensors whose header says something else."""
    (length,) = struct.unpack("<Q", tensors[:8])
    header, values = json.loads(tensors[8 : 8 + length]), tensors[8 + length :]
    key = rng.choice(list(header))
    match rng.randrange(7):
        case 0:
            header[key]["dtype"] = rng.choice(["F32", "F64", "BF16", "I16", "BOOL", "F8_E8M0", "F4", "C64", "X", 1])
        case 1:
            header[key]["shape"] = rng.choice([[12], [6, 2], [3, 4], [2, 6, 1], [], [0, 6], [2**62, 8], [-1], "2x6"])
        case 2:
            header[key]["data_offsets"] = rng.choice([[0, 0], [0, 24], [24, 0], [0, 2**63], [-1, 23], [0], None])
        case 3:
            other = rng.choice(list(header))
            header[key], header[other] = header[other], header[key]
        case 4:
            header[rng.choice([key + "x", "", "\n", "__metadata__"])] = header.pop(key)
        case 5:
            header["more"] = {"dtype": "F16", "shape": [2], "data_offsets": [len(values), len(values) + 4]}
            values += b"\x00\x3c\x00\x3c"
        case 6:
            del header[key]
    text = json.dumps(header).encode() + b" " * rng.choice([0, 0, 9])
    length = rng.choice([len(text)] * 9 + [0, 2**63, 2**31, len(text) - 1])
    return struct.pack("<Q", length) + text + values


def mutated_tensors(rng: random.Random) -> bytes:
    return rng.choice([flip_bits, cut, forge_header, forge_header, forge_header])(rng, TENSORS)


def test_tensors_are_those_expected_and_finite_or_refused() -> None:
    rng = random.Random("tensors")
    expected, right = shapes_of(ADAPTER), 0
    for _ in range(NUM_MUTANTS):
        try:
            adapter = unpack(mutated_tensors(rng))
            check_shapes(adapter, expected)
        except MessageError as error:
            assert "tensors" in str(error)
        else:
            assert shapes_of(adapter) == expected
            assert all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in adapter.values())
            right += 1
    assert 0 < right < NUM_MUTANTS / 2


class OneVector:
    dimension = 2

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([1.0, 0.0]).repeat(len(texts), 1)


def reply(uplink: bytes) -> Reply:
    return Reply(
        client_id=1, round=3, uplink=uplink, train_loss=0.0, num_private=1, num_pseudo_labels=0, evaluation=None,
        rows=(),
    )  # fmt: skip


def test_no_answers_of_one_client_hurt_the_others() -> None:
    rng = random.Random("server")
    refused = 0
    for _ in range(NUM_MUTANTS // 4):
        judge = Server(OneVector(), num_prompts=5, election=Election("medoid"), seed=0, ledger=Ledger("server", "n"))
        judge.begin(3, [0, 1, 2])
        for client_id in rng.sample(range(3), 3):
            sent = structs.replace(EXAMPLES[Answers], client_id=client_id)
            judge.collect(client_id, mutant(rng, sent) if client_id == 1 else sent.encode())
        verdict = judge.conclude()
        assert verdict.answers[0] == verdict.answers[2] == TEXTS
        assert len(verdict.labels.prompt_ids) >= 4
        if verdict.refused:
            assert list(verdict.refused) == [1]
            assert verdict.refused[1].startswith("client 1, round 3: ")
            assert verdict.answers[1] == ("",) * 5
            refused += 1
    assert refused > NUM_MUTANTS / 8


class Postman:
    """A fleet whose client 0 sends what it should, and client 1 what it is told to."""

    adapter_shapes = shapes_of(ADAPTER)

    def __init__(self, uplink: bytes, honest: bytes = EXAMPLES[AdapterUpdate].encode()) -> None:
        self.uplink, self.honest = uplink, honest
        self.lost: Mapping[int, str] = {}

    def visit(self, round: int, downlinks: Mapping[int, bytes], *, evaluate: bool) -> Iterator[Reply]:
        yield structs.replace(reply(self.honest), client_id=0)
        yield reply(self.uplink)

    def leave_out(self, round: int, reasons: Mapping[int, str]) -> None:
        self.lost = reasons


def test_no_update_of_one_client_gets_to_the_average_but_one_that_fits() -> None:
    rng = random.Random("average")
    algorithm = FedAvgLora(Cohort(num_clients=2, participation=1.0, seed=0), (2, 2))
    own = structs.replace(EXAMPLES[AdapterUpdate], client_id=1)
    refused = 0
    for _ in range(NUM_MUTANTS // 2):
        if rng.random() < 0.5:
            fleet = Postman(mutant(rng, own))
        else:
            fleet = Postman(structs.replace(own, tensors=mutated_tensors(rng)).encode("zstd"))
        mean = unpack(algorithm.run_round(3, b"", fleet, None, evaluate=False).next_state)  # type: ignore[arg-type]
        assert shapes_of(mean) == shapes_of(ADAPTER)
        if fleet.lost:
            assert list(fleet.lost) == [1]
            assert fleet.lost[1].startswith("client 1, round 3: ")
            assert all(torch.equal(mean[key], value) for key, value in unpack(TENSORS).items())
            refused += 1
    assert refused > NUM_MUTANTS / 4


def test_no_token_probabilities_of_one_client_get_to_the_average_but_those_that_fit() -> None:
    rng = random.Random("tokens")
    algorithm = LogitExchange(Cohort(num_clients=2, participation=1.0, seed=0), exchanges=range(1, 9), top_k=2)
    own = EXAMPLES[TokenScores]
    honest = structs.replace(own, client_id=0).encode()
    refused = 0
    for _ in range(NUM_MUTANTS // 2):
        fleet = Postman(mutant(rng, own), honest)
        state = algorithm.run_round(3, b"", fleet, None, evaluate=False).next_state  # type: ignore[arg-type]
        targets = TokenTargets.decode(state)
        found = TokenProbabilities.unpacked(targets.answers, targets.tokens, targets.probabilities, 2)
        sums = [chances.astype(float).sum(axis=1) for chances in found.probabilities]
        assert all(abs(total - 1) < 1e-2 for totals in sums for total in totals)
        if fleet.lost:
            assert list(fleet.lost) == [1]
            assert fleet.lost[1].startswith("client 1, round 3: ")
            assert targets.answers == own.answers  # type: ignore[attr-defined]
            refused += 1
    assert refused > NUM_MUTANTS / 4


def test_nothing_large_is_made_of_little() -> None:
    """What says that it is large is believed only if it is there."""
    zeros = zstandard.ZstdCompressor().compress(bytes(2**27))
    body = packb(EXAMPLES[AdapterUpdate])
    bomb = body[: -len(TENSORS) - 3] + b"\xc6" + struct.pack(">I", 2**27) + bytes(2**27)
    bombs = [(kind, ZSTD + zeros) for kind in (PublicPrompts, Answers, PseudoLabels)]
    bombs += [
        (kind, PLAIN + packb(message)[:-place] + head + b"\xff" * 4 + bytes(1000))
        for kind, message in EXAMPLES.items()
        for head in LONG_HEADS
        for place in (1, 20, 40)
    ]
    uplink = ZSTD + zstandard.ZstdCompressor().compress(bomb)
    assert len(uplink) < 2**15
    del bomb
    algorithm = FedAvgLora(Cohort(num_clients=2, participation=1.0, seed=0), (2, 2))
    tracemalloc.start()
    try:
        for kind, data in bombs:
            with pytest.raises(MessageError):
                kind.decode(data)
        with pytest.raises(MessageError, match="client 1, round 3: AdapterUpdate: "):
            algorithm.received(reply(uplink), shapes_of(ADAPTER))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
