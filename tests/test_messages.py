import pickle
import re
import struct
from pathlib import Path

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray import messages
from semcons_ray.errors import MessageError
from semcons_ray.messages import (
    PLAIN,
    ZSTD,
    AdapterUpdate,
    Answers,
    GlobalAdapter,
    Message,
    PseudoLabels,
    PublicPrompts,
)

WIRE_PAGE = Path(__file__).parent.parent / "docs" / "wire.md"
KINDS = [PublicPrompts, Answers, PseudoLabels, AdapterUpdate, GlobalAdapter]
EXAMPLE = Answers(round_number=1, client_id=2, num_examples=64, answers=("Paris", ""))

numbers = st.integers(0, 2**63 - 1)
texts = st.text(max_size=300)
tuples = st.lists(texts, max_size=20).map(tuple)
public_prompts = st.builds(PublicPrompts, prompts=tuples)
answers = st.builds(Answers, round_number=numbers, client_id=numbers, num_examples=numbers, answers=tuples)
pseudo_labels = st.lists(st.tuples(numbers, texts), max_size=20).flatmap(
    lambda pairs: st.builds(
        PseudoLabels,
        round_number=numbers,
        prompt_ids=st.just(tuple(prompt_id for prompt_id, _ in pairs)),
        responses=st.just(tuple(text for _, text in pairs)),
    )
)
blobs = st.binary(max_size=70_000)
adapter_updates = st.builds(AdapterUpdate, round_number=numbers, client_id=numbers, num_examples=numbers, tensors=blobs)
global_adapters = st.builds(GlobalAdapter, round_number=numbers, tensors=blobs)
any_message = public_prompts | answers | pseudo_labels | adapter_updates | global_adapters
compressions = st.sampled_from(["none", "zstd"])


def plain(fields: dict[str, object]) -> bytes:
    return PLAIN + msgspec.msgpack.encode(fields)


def fields_of(message: Message) -> dict[str, object]:
    return msgspec.to_builtins(message)


# MessagePack's own rules for the length of a value: https://github.com/msgpack/msgpack/blob/master/spec.md


def size_of_int(value: int) -> int:
    return 1 if value < 1 << 7 else 2 if value < 1 << 8 else 3 if value < 1 << 16 else 5 if value < 1 << 32 else 9


def size_of_text(text: str) -> int:
    length = len(text.encode())
    return length + (1 if length < 32 else 2 if length < 1 << 8 else 3 if length < 1 << 16 else 5)


def size_of_array(sizes: list[int]) -> int:
    return sum(sizes) + (1 if len(sizes) < 16 else 3)


@given(any_message, compressions)
def test_a_message_comes_back_as_it_was(message, compression):
    data = message.encode(compression)
    assert type(message).decode(data) == message
    assert data[:1] == (ZSTD if compression == "zstd" else PLAIN)
    assert message.encode(compression) == data  # the same bytes each time


@given(any_message)
def test_both_framings_hold_the_same_body(message):
    frame = message.encode("zstd")[1:]
    assert zstandard.ZstdDecompressor().decompress(frame) == message.encode()[1:]


@given(public_prompts)
def test_size_of_public_prompts(message):
    assert len(message.encode()) == 30 + size_of_array([size_of_text(text) for text in message.prompts])


@given(answers)
def test_size_of_answers(message):
    integers = [message.round_number, message.client_id, message.num_examples]
    texts = size_of_array([size_of_text(text) for text in message.answers])
    assert len(message.encode()) == 59 + sum(size_of_int(value) for value in integers) + texts


@given(pseudo_labels)
def test_size_of_pseudo_labels(message):
    ids = size_of_array([size_of_int(value) for value in message.prompt_ids])
    texts = size_of_array([size_of_text(text) for text in message.responses])
    assert len(message.encode()) == 55 + size_of_int(message.round_number) + ids + texts


def size_of_bytes(value: bytes) -> int:
    return len(value) + (2 if len(value) < 1 << 8 else 3 if len(value) < 1 << 16 else 5)


@given(adapter_updates)
def test_size_of_adapter_updates(message):
    integers = [message.round_number, message.client_id, message.num_examples]
    assert len(message.encode()) == 66 + sum(size_of_int(value) for value in integers) + size_of_bytes(message.tensors)


@given(global_adapters)
def test_size_of_global_adapters(message):
    assert len(message.encode()) == 43 + size_of_int(message.round_number) + size_of_bytes(message.tensors)


def test_zstd_makes_real_answers_smaller_and_short_ones_hardly_larger():
    texts = tuple(f"The answer to question {number} is a city in France." for number in range(64))
    message = Answers(round_number=1, client_id=0, num_examples=64, answers=texts)
    assert len(message.encode("zstd")) < len(message.encode()) / 4
    assert len(EXAMPLE.encode("zstd")) <= len(EXAMPLE.encode()) + 10


def test_the_size_that_the_page_works_out():
    message = Answers(round_number=1, client_id=0, num_examples=64, answers=("x" * 400,) * 500)
    assert f"{len(message.encode()):,} bytes" in WIRE_PAGE.read_text(encoding="utf-8")


@given(any_message, compressions, st.data())
def test_a_message_cut_short_is_refused(message, compression, data):
    encoded = message.encode(compression)
    length = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(MessageError, match=type(message).__name__):
        type(message).decode(encoded[:length])


@given(any_message, compressions, st.binary(min_size=1, max_size=20))
def test_a_message_with_something_behind_it_is_refused(message, compression, more):
    with pytest.raises(MessageError):
        type(message).decode(message.encode(compression) + more)


@given(any_message, compressions, st.data())
def test_a_damaged_message_is_refused_or_well_formed(message, compression, data):
    encoded = bytearray(message.encode(compression))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        decoded = type(message).decode(bytes(encoded))
    except MessageError:
        return
    assert type(message).decode(decoded.encode()) == decoded


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.binary(max_size=200))
def test_foreign_bytes_are_refused(kind, data):
    with pytest.raises(MessageError, match=kind.__name__):
        kind.decode(data)


@pytest.mark.parametrize("kind", KINDS)
@given(message=any_message, compression=compressions)
def test_a_message_of_another_kind_is_refused(kind, message, compression):
    if not isinstance(message, kind):
        with pytest.raises(MessageError, match=kind.__name__):
            kind.decode(message.encode(compression))


class Exploding:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("framing", [b"", PLAIN, ZSTD])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_unpickled(framing, protocol):
    pickled = pickle.dumps(Exploding(), protocol)
    body = zstandard.ZstdCompressor().compress(pickled) if framing == ZSTD else pickled
    for kind in KINDS:
        with pytest.raises(MessageError):
            kind.decode(framing + body)


@pytest.mark.parametrize("message", [PublicPrompts(prompts=("a",)), EXAMPLE, messages.PseudoLabels(
    round_number=3, prompt_ids=(1,), responses=("a",))], ids=lambda message: type(message).__name__)  # fmt: skip
def test_a_field_too_many_or_too_few_is_refused(message):
    kind, fields = type(message), fields_of(message)
    assert kind.decode(plain(fields)) == message
    with pytest.raises(MessageError, match="unknown field `gradients`"):
        kind.decode(plain({**fields, "gradients": [0.1]}))
    for name in set(fields) - {"type"}:
        with pytest.raises(MessageError, match=f"missing required field `{name}`"):
            kind.decode(plain({key: value for key, value in fields.items() if key != name}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("client_id", "2"),
        ("client_id", 2.0),
        ("client_id", True),
        ("num_examples", None),
        ("answers", "Paris"),
        ("answers", [b"Paris"]),
        ("answers", ["Paris", None]),
        ("answers", {"0": "Paris"}),
        ("type", "pseudo_labels"),
        ("type", 1),
    ],
)
def test_a_field_of_the_wrong_type_is_refused(field, value):
    with pytest.raises(MessageError, match=field):
        Answers.decode(plain({**fields_of(EXAMPLE), field: value}))


def test_text_that_is_not_utf8_is_refused():
    with pytest.raises(MessageError, match="utf-8"):
        Answers.decode(EXAMPLE.encode().replace(b"Paris", b"Par\xffs"))


def test_labels_need_an_id_each():
    for ids, responses in (((0, 1), ["a"]), ((), ["a"]), ((-1,), ["a"])):
        with pytest.raises(MessageError, match="prompt id"):
            PseudoLabels.decode(plain({"round_number": 1, "prompt_ids": ids, "responses": responses}))


def test_a_frame_that_would_grow_too_large_is_refused_before_it_does(monkeypatch):
    monkeypatch.setattr(messages, "MAX_DECODED_BYTES", 1000)
    fits = PublicPrompts(prompts=("a" * 900,))
    assert PublicPrompts.decode(fits.encode("zstd")) == fits
    with pytest.raises(MessageError, match="1000"):
        PublicPrompts.decode(PublicPrompts(prompts=("a" * 1000,)).encode("zstd"))


def test_a_frame_that_lies_about_its_size_is_refused():
    # A zstd header (RFC 8878, 3.1.1) of one segment that claims a pebibyte; then an empty last block.
    frame = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 50) + b"\x01\x00\x00"
    with pytest.raises(MessageError, match="Answers"):
        Answers.decode(ZSTD + frame)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(EXAMPLE.encode()[1:])
    with pytest.raises(MessageError, match="Answers"):
        Answers.decode(ZSTD + silent)


def test_messages_cannot_be_changed():
    with pytest.raises(AttributeError):
        EXAMPLE.client_id = 3


# docs/wire.md


def test_the_bytes_on_the_page_are_the_bytes_on_the_wire():
    block = re.search(r"```hex\n(.*?)```", WIRE_PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    data = bytes.fromhex("".join(line.split("  ")[0] for line in block.splitlines()))
    assert data == EXAMPLE.encode()
    assert Answers.decode(data) == EXAMPLE
    assert f"{len(data)} bytes" in WIRE_PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_lists_every_field_in_order(kind):
    section = re.split("\n##", WIRE_PAGE.read_text(encoding="utf-8").split(f"### {kind.__name__}\n")[1])[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert listed == ["type", *(field.name for field in msgspec.structs.fields(kind))]
    assert f'`"{msgspec.inspect.type_info(kind).tag}"`' in section


def test_there_is_no_message_beside_those_on_the_page():
    assert Message.__subclasses__() == KINDS
