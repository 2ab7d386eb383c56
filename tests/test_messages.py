import math
import pickle
import re
import struct
from pathlib import Path

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.errors import MessageError
from semcons_ray.messages import (
    NO_LABELS,
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
    decode_downlink,
    decode_uplink,
    turns_of,
)

WIRE_PAGE = Path(__file__).parent.parent / "docs" / "wire.md"
KINDS = [PublicPrompts, Answers, PseudoLabels, AdapterUpdate, GlobalAdapter, TokenScores, TokenTargets]
EXAMPLE = Answers(round_number=1, client_id=2, num_examples=64, answers=("Paris", ""))
UPDATE = AdapterUpdate(round_number=1, client_id=2, num_examples=64, tensors=b"\x00\xff")
GLOBAL = GlobalAdapter(round_number=1, tensors=b"\x00\xff")

numbers = st.integers(0, 2**63 - 1)
texts = st.text(max_size=300)
tuples = st.lists(texts, max_size=20).map(tuple)
turns = st.builds(Turn, role=st.sampled_from(["system", "user", "assistant"]), content=texts)
conversations = st.builds(
    lambda before, asked: (*before, Turn("user", asked)), st.lists(turns, max_size=4), texts
)
public_prompts = st.builds(PublicPrompts, prompts=st.lists(texts | conversations, max_size=20).map(tuple))
counts = st.integers(1, 2**63 - 1)
answers = st.builds(Answers, round_number=numbers, client_id=numbers, num_examples=counts, answers=tuples)
pseudo_labels = (
    st.lists(st.tuples(numbers, texts), max_size=20, unique_by=lambda pair: pair[0])
    .map(sorted)
    .flatmap(
        lambda pairs: st.builds(
            PseudoLabels,
            round_number=numbers,
            prompt_ids=st.just(tuple(prompt_id for prompt_id, _ in pairs)),
            responses=st.just(tuple(text for _, text in pairs)),
        )
    )
)
blobs = st.binary(max_size=70_000)
adapter_updates = st.builds(AdapterUpdate, round_number=numbers, client_id=numbers, num_examples=counts, tensors=blobs)
global_adapters = st.builds(GlobalAdapter, round_number=numbers, tensors=blobs)
token_ids = st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=20).map(tuple), max_size=20).map(tuple)
probabilities = {"answers": token_ids, "tokens": blobs, "probabilities": blobs}
token_scores = st.builds(TokenScores, round_number=numbers, client_id=numbers, **probabilities)
token_targets = st.builds(TokenTargets, round_number=numbers, **probabilities)
any_message = (
    public_prompts | answers | pseudo_labels | adapter_updates | global_adapters | token_scores | token_targets
)
compressions = st.sampled_from(["none", "zstd"])


def plain(fields: dict[str, object]) -> bytes:
    return PLAIN + msgspec.msgpack.encode(fields)


def fields_of(message: Message) -> dict[str, object]:
    return msgspec.to_builtins(message, builtin_types=(bytes,))


# MessagePack's own rules for the length of a value: https://github.com/msgpack/msgpack/blob/master/spec.md


def size_of_int(value: int) -> int:
    return 1 if value < 1 << 7 else 2 if value < 1 << 8 else 3 if value < 1 << 16 else 5 if value < 1 << 32 else 9


def size_of_text(text: str) -> int:
    length = len(text.encode())
    return length + (1 if length < 32 else 2 if length < 1 << 8 else 3 if length < 1 << 16 else 5)


def size_of_prompt(prompt: str | tuple[Turn, ...]) -> int:
    if isinstance(prompt, str):
        return size_of_text(prompt)
    return size_of_array([size_of_array([size_of_text(turn.role), size_of_text(turn.content)]) for turn in prompt])


def size_of_array(sizes: list[int]) -> int:
    return sum(sizes) + (1 if len(sizes) < 16 else 3)


@given(any_message, compressions)
def test_a_message_comes_back_as_it_was(message, compression):
    data = message.encode(compression)
    assert type(message).decode(data) == message
    assert data[:1] == (ZSTD if compression == "zstd" else PLAIN)
    assert message.encode(compression) == data  # the same bytes each time


def test_the_framing_is_what_the_page_says():
    message = PublicPrompts(prompts=tuple(f"What is {one} times {one**3 % 97}?" for one in range(300)))
    assert message.encode("zstd") == ZSTD + zstandard.ZstdCompressor(level=3).compress(message.encode()[1:])
    with pytest.raises(MessageError, match=re.escape(r"Answers: unknown framing byte b'\x02'") + "$"):
        Answers.decode(b"\x02" + EXAMPLE.encode()[1:])
    with pytest.raises(MessageError, match=r"^Answers: .*truncated"):
        Answers.decode(PLAIN)


@given(any_message)
def test_both_framings_hold_the_same_body(message):
    frame = message.encode("zstd")[1:]
    assert zstandard.ZstdDecompressor().decompress(frame) == message.encode()[1:]


@given(public_prompts)
def test_size_of_public_prompts(message):
    assert len(message.encode()) == 30 + size_of_array([size_of_prompt(prompt) for prompt in message.prompts])


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


def test_one_draw_is_written_as_if_there_were_never_more():
    several = Answers(round_number=1, client_id=2, num_examples=64, answers=("Paris", ""), further=(("", "Rome"),))
    assert several.samples == (("Paris", ""), ("", "Rome"))
    assert EXAMPLE.samples == (("Paris", ""),)
    assert len(several.encode()) == len(EXAMPLE.encode()) + 8 + 1 + 1 + 1 + 5
    for compression in ("none", "zstd"):
        assert Answers.decode(several.encode(compression)) == several
    body = bytearray(EXAMPLE.encode())
    body[1] += 1
    with pytest.raises(MessageError, match="longer than need be"):
        Answers.decode(bytes(body) + b"\xa7further\x90")
    for bad in ((("Rome",),), (("", "Rome"), ()), (("a", "b", "c"),)):
        with pytest.raises(MessageError, match="samples of different numbers of prompts"):
            Answers(round_number=1, client_id=2, num_examples=64, answers=("Paris", ""), further=bad)
    with pytest.raises(MessageError, match="Answers: samples of different numbers"):
        Answers.decode(bytes(body) + b"\xa7further\x91\x91\xa1a")


def test_a_count_is_there_where_a_choice_is_sent():
    fields = {"round_number": 1, "client_id": 2, "num_examples": 64, "answers": ("Paris", "")}
    message = Answers(**fields, counts=(200, 0))
    assert len(message.encode()) == len(EXAMPLE.encode()) + 7 + 1 + 2 + 1
    assert Answers.decode(message.encode("zstd")) == message
    for bad in ({"counts": (3, 1)}, {"counts": (0, 0)}, {"counts": (3,)}, {"counts": (3, 0), "further": (("", ""),)}):
        with pytest.raises(MessageError, match="needs a count for each answer, 0 for an empty one, and no further"):
            Answers(**fields, **bad)
    with pytest.raises(MessageError, match="counts"):
        Answers.decode(plain({**fields_of(EXAMPLE), "counts": [-1, 0]}))


def test_confidence_is_four_bytes_an_answer():
    fields = {"round_number": 1, "client_id": 2, "num_examples": 64, "answers": ("Paris", "")}
    message = Answers(**fields, confidence=struct.pack("<2f", -0.5, math.nan))
    assert len(message.encode()) == len(EXAMPLE.encode()) + 11 + 2 + 4 * 2
    decoded = Answers.decode(message.encode("zstd"))
    assert decoded.confidences[0][0] == -0.5
    both = Answers(**fields, further=(("", "Rome"),), confidence=struct.pack("<4f", -1, math.nan, math.nan, 0))
    assert str(both.confidences) == "((-1.0, nan), (nan, 0.0))"
    assert str(EXAMPLE.confidences) == "((nan, nan),)"
    for bad in ((-0.5,), (-0.5, 0.0), (0.5, math.nan), (math.nan, math.nan), (-math.inf, math.nan)):
        with pytest.raises(MessageError, match="confidence"):
            Answers(**fields, confidence=struct.pack(f"<{len(bad)}f", *bad))
    with pytest.raises(MessageError, match="confidence"):
        Answers.decode(plain({**fields_of(EXAMPLE), "confidence": b"\x00\x00"}))


@given(global_adapters)
def test_size_of_global_adapters(message):
    assert len(message.encode()) == 43 + size_of_int(message.round_number) + size_of_bytes(message.tensors)


def size_of_probabilities(message):
    ids = size_of_array([size_of_array([size_of_int(token) for token in answer]) for answer in message.answers])
    return ids + size_of_bytes(message.tokens) + size_of_bytes(message.probabilities)


def test_a_text_is_a_conversation_of_one_question() -> None:
    assert turns_of("how many?") == (Turn("user", "how many?"),)
    conversation = (Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"))
    assert turns_of(conversation) == conversation


@given(token_scores)
def test_size_of_token_scores(message):
    integers = size_of_int(message.round_number) + size_of_int(message.client_id)
    assert len(message.encode()) == 72 + integers + size_of_probabilities(message)


@given(token_targets)
def test_size_of_token_targets(message):
    assert len(message.encode()) == 63 + size_of_int(message.round_number) + size_of_probabilities(message)


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


@pytest.mark.parametrize("message", [PublicPrompts(prompts=("a",)), EXAMPLE, PseudoLabels(
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


@pytest.mark.parametrize(
    ("ids", "responses", "says"),
    [
        ((0, 1), ["a"], "^PseudoLabels: needs one prompt id for each response$"),
        ((), ["a"], "^PseudoLabels: needs one prompt id for each response$"),
        ((-1,), ["a"], "prompt_ids"),
        ((1, 1), ["a", "b"], "^PseudoLabels: prompt ids do not ascend$"),
        ((2, 1), ["a", "b"], "do not ascend"),
    ],
)
def test_labels_need_an_id_each_and_in_order(ids, responses, says):
    fields = {"type": "pseudo_labels", "round_number": 1, "prompt_ids": ids, "responses": responses}
    with pytest.raises(MessageError, match=says):
        PseudoLabels.decode(plain(fields))


def test_a_label_of_no_public_prompt_is_refused():
    labels = PseudoLabels(round_number=1, prompt_ids=(0, 1, 2), responses=("a", "b", "c"))
    labels.check_prompts(3)
    NO_LABELS.check_prompts(0)
    with pytest.raises(MessageError, match="a label for prompt 2, but there are 2"):
        labels.check_prompts(2)


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (EXAMPLE, "round_number", -1),
        (EXAMPLE, "client_id", -1),
        (EXAMPLE, "client_id", 2**63),
        (EXAMPLE, "num_examples", 0),
        (EXAMPLE, "num_examples", -(2**63)),
        (EXAMPLE, "answers", ["a" * ((1 << 20) + 1)]),
        (UPDATE, "num_examples", 0),
        (UPDATE, "client_id", -1),
        (UPDATE, "round_number", 2**64 - 1),
        (UPDATE, "tensors", "text"),
        (GLOBAL, "round_number", -1),
        (PublicPrompts(prompts=()), "prompts", [1]),
        (PublicPrompts(prompts=()), "prompts", [[]]),
        (PublicPrompts(prompts=()), "prompts", [[["assistant", "a"]]]),
        (PublicPrompts(prompts=()), "prompts", [[["judge", "a"], ["user", "a"]]]),
        (PublicPrompts(prompts=()), "prompts", [[["user", "a", "b"]]]),
        (PublicPrompts(prompts=()), "prompts", [[["user", 1]]]),
        (PublicPrompts(prompts=()), "prompts", ["a" * ((1 << 20) + 1)]),
    ],
)
def test_values_out_of_range_are_refused(message, field, value):
    with pytest.raises(MessageError, match=field):
        type(message).decode(plain({**fields_of(message), field: value}))


def test_the_longest_text_and_the_greatest_numbers_are_taken():
    greatest = 2**63 - 1
    for message in (
        Answers(round_number=greatest, client_id=greatest, num_examples=greatest, answers=("a" * (1 << 20),)),
        Answers(round_number=0, client_id=0, num_examples=1, answers=()),
    ):
        assert Answers.decode(message.encode()) == message


def test_a_message_is_written_in_one_way_only():
    names = msgspec.msgpack.encode
    fields = fields_of(EXAMPLE)
    whole = EXAMPLE.encode()
    others = {
        "twice": b"\x86" + whole[2:] + names("client_id") + names(2),
        "without its type": b"\x84" + names(fields)[1 + len(names("type") + names("answers")) :],
        "out of order": names(dict(reversed(fields.items()))),
        "longer than need be": whole[1:].replace(names("client_id") + b"\x02", names("client_id") + b"\xcc\x02"),
    }
    for says, body in others.items():
        assert msgspec.msgpack.Decoder(Answers).decode(body) == EXAMPLE
        with pytest.raises(MessageError, match=says):
            Answers.decode(PLAIN + body)


def test_half_a_surrogate_pair_is_not_sent():
    with pytest.raises(MessageError, match=r"Answers.*surrogates"):
        Answers(round_number=1, client_id=0, num_examples=1, answers=("\ud800",)).encode()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_what_would_be_too_long_is_neither_sent_nor_unpacked(compression, monkeypatch):
    fits, too_long = PublicPrompts(prompts=("a" * 900,)), PublicPrompts(prompts=("a" * 1000,))
    encoded = too_long.encode(compression)
    monkeypatch.setattr(PublicPrompts, "max_bytes", 1000)
    assert PublicPrompts.decode(fits.encode(compression)) == fits
    with pytest.raises(MessageError, match="1,033 bytes, not 0 to 1,000"):
        too_long.encode(compression)
    with pytest.raises(MessageError, match="1,033 bytes, not 0 to 1,000"):
        PublicPrompts.decode(encoded)
    with pytest.raises(MessageError, match="not 0 to 900"):
        PublicPrompts.decode(fits.encode(compression), max_bytes=900)
    assert PublicPrompts.decode(fits.encode(compression), max_bytes=1 << 40) == fits
    monkeypatch.setattr(PublicPrompts, "max_bytes", 1033)  # to the byte
    assert PublicPrompts.decode(too_long.encode(compression)) == too_long


def test_texts_and_tensors_have_limits_of_their_own():
    assert PublicPrompts.max_bytes == Answers.max_bytes == PseudoLabels.max_bytes == 1 << 26
    assert AdapterUpdate.max_bytes == GlobalAdapter.max_bytes == 1 << 30
    assert TokenScores.max_bytes == TokenTargets.max_bytes == 1 << 30


def test_who_has_sent_what_is_held_against_what_it_says():
    assert decode_uplink(Answers, EXAMPLE.encode(), client_id=2, round=1) is not None
    assert decode_uplink(AdapterUpdate, UPDATE.encode("zstd"), client_id=2, round=1) == UPDATE
    for client_id, round in ((3, 1), (2, 2)):
        with pytest.raises(MessageError, match=rf"^client {client_id}, round {round}: Answers: .*client 2's, round 1"):
            decode_uplink(Answers, EXAMPLE.encode(), client_id=client_id, round=round)
    with pytest.raises(MessageError, match=r"^client 5, round 1: AdapterUpdate: "):
        decode_uplink(AdapterUpdate, EXAMPLE.encode(), client_id=5, round=1)
    with pytest.raises(MessageError, match=r"^client 2, round 1: AdapterUpdate: .* not 0 to 10"):
        decode_uplink(AdapterUpdate, UPDATE.encode(), client_id=2, round=1, max_bytes=10)


def test_a_client_is_sent_what_came_of_earlier_rounds():
    assert decode_downlink(GlobalAdapter, GLOBAL.encode(), round=2) == GLOBAL
    assert decode_downlink(PseudoLabels, NO_LABELS.encode(), round=1) == NO_LABELS
    with pytest.raises(MessageError, match="GlobalAdapter: of round 1, sent in round 1"):
        decode_downlink(GlobalAdapter, GLOBAL.encode(), round=1)


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
