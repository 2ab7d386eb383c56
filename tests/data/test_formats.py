"""Formats that data sets have in this field: each, in its published schema, gives the examples of its plain twin."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from semcons_ray.data.examples import DataSet, Example
from semcons_ray.data.sources import load_examples
from semcons_ray.errors import DataError
from semcons_ray.messages import Turn

U, A, S = "user", "assistant", "system"


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> DataSet:
    return load_examples(jsonl(tmp_path / "x.jsonl", *rows), **options)


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def shared(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": content} for role, content in turns]


CHAT = Example((Turn("system", "Be brief."), Turn("user", "a?"), Turn("assistant", "1"), Turn("user", "and b?")), "2")
TURNS = ((S, "Be brief."), (U, "a?"), (A, "1"), (U, "and b?"), (A, "2"))

KNOWN = [
    ({"prompt": "p", "response": "r", "category": "c"}, Example("p", "r", "c")),
    ({"prompt": "p", "completion": " r"}, Example("p", "r")),
    ({"prompt": messages((U, "p")), "completion": messages((A, "r"))}, Example("p", "r")),
    ({"prompt": messages(*TURNS[:4]), "completion": messages(TURNS[4])}, CHAT),
    ({"messages": messages(*TURNS)}, CHAT),
    ({"messages": messages((U, "p"), (A, "r")), "prompt": "p", "prompt_id": "0"}, Example("p", "r")),  # UltraChat's
    ({"messages": [{"role": U, "content": [{"type": "text", "text": "p"}]}, *messages((A, "r"))]}, Example("p", "r")),
    ({"conversations": shared(("human", "p"), ("gpt", "r")), "id": "x_0"}, Example("p", "r")),
    ({"conversations": shared((S, "Be brief."), ("human", "a?"), ("gpt", "1"), ("human", "and b?"), ("gpt", "2"))},
     CHAT),
    ({"conversations": shared(("human", "p"), ("gpt", "r")), "system": "s"},
     Example((Turn("system", "s"), Turn("user", "p")), "r")),
    ({"instruction": "Add.", "input": "", "output": "3"}, Example("Add.", "3")),
    ({"instruction": "Add.", "input": "1 and 2", "output": 3}, Example("Add.\n\n1 and 2", "3")),
    ({"instruction": "Add.", "output": "3", "history": [["a?", "1"]]},
     Example((Turn("user", "a?"), Turn("assistant", "1"), Turn("user", "Add.")), "3")),
    ({"instruction": "Who?", "context": "He came.", "response": "He.", "category": "closed_qa"},
     Example("Who?\n\nHe came.", "He.", "closed_qa")),  # Dolly's
    ({"question": "1 + 2?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"}, Example("1 + 2?", "1 + 2 = <<1+2=3>>3\n#### 3")),
    ({"system_prompt": "s", "question": "q", "response": "a"}, None),  # OpenOrca's: question goes with answer only
    ({"question": "q", "choices": ["x", "y"], "answer": 1, "subject": "z"}, Example("q", "y", options=("x", "y"))),
    ({"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
     Example("q", "y", options=("x", "y"))),
    ({"question": "q", "options": ["x", "y"], "answer": "x"}, Example("q", "x", options=("x", "y"))),
    ({"question": "q", "options": ["1", "0"], "answer": 1}, Example("q", "1", options=("1", "0"))),
    ({"question": "q", "options": ["x", "y"], "answer": "B", "client_id": 7},
     Example("q", "y", options=("x", "y"), owner="7")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "example"), [known for known in KNOWN if known[1]])
def test_a_known_format_is_recognised_by_its_columns(tmp_path: Path, row: dict[str, Any], example: Example) -> None:
    assert load(tmp_path, row).examples == [example]
    mixed = any(isinstance(cell, list) and isinstance(cell[0], dict) and isinstance(cell[0].get("content"), list)
                for cell in row.values())  # fmt: skip
    if not mixed:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps([row]))
    cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    with (tmp_path / "x.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, cells, delimiter="\t")
        writer.writeheader()
        writer.writerow(cells)
    others = ["x.json"] + ([] if mixed else ["x.parquet"]) + ([] if isinstance(row.get("choices"), dict) else ["x.tsv"])
    for other in others:
        assert load_examples(str(tmp_path / other)).examples == [example], other


def test_what_was_recognised_is_said(tmp_path: Path) -> None:
    said = str(load(tmp_path, {"id": 1, "instruction": "i", "input": "", "output": "o", "topic": "t"}).tally)
    assert "x.jsonl (Alpaca's columns instruction as prompt, output as response, input as context; " in said
    assert "not used: id, topic): 0 of 1 rows left out" in said


@pytest.mark.parametrize(
    ("columns", "example"),
    [
        ({"prompt": "problem", "response": "solution"}, Example("p", "s")),
        ({"prompt": "problem", "response": "solution", "category": "kind"}, Example("p", "s", "k")),
        ({"prompt": "problem"}, Example("p", "a")),
        ({"response": "solution"}, Example("q", "s")),
        ({"category": "kind"}, Example("q", "a", "k")),
        ({"context": "problem"}, Example("q\n\np", "a")),
        ({"prompt": "problem", "client_id": "kind"}, Example("p", "a", owner="k")),
        ({"context": "problem", "category": None}, Example("q\n\np", "a")),
    ],
)
def test_columns_can_be_chosen(tmp_path: Path, columns: dict[str, str | None], example: Example) -> None:
    row = {"question": "q", "answer": "a", "problem": "p", "solution": "s", "kind": "k"}
    assert load(tmp_path, row, columns=columns).examples == [example]


@pytest.mark.parametrize("text", ["[]", '[{"a": 1}]', "[1, 2]", "[brackets]"])
def test_a_text_that_looks_like_a_list_is_a_text(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, {"prompt": text, "response": text}).examples == [Example(text, text)]


def test_a_column_that_is_known_can_be_left_out(tmp_path: Path) -> None:
    row = {"prompt": "p", "response": "r", "category": {"a": 1}}
    assert load(tmp_path, row, columns={"category": None}).examples == [Example("p", "r")]


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"problem": "p", "solution": "s"}, {},
         "is of no known format: it has problem, solution; say which is which with data.columns, as "
         "{prompt: problem, response: solution}"),
        ({"prompt": "p"}, {}, "is of no known format: it has prompt;"),
        ({"prompt": "p", "response": "r"}, {"response": "answer"},
         "data.columns says that response is answer, and"),
        ({"messages": [], "prompt": "p", "response": "r"}, {"messages": "messages", "prompt": "prompt"},
         "data.columns gives messages and prompt"),
        ({"messages": "hello"}, {}, "line 1: messages is 'hello' (str), not a list"),
        ({"messages": ["hello"]}, {}, "line 1: messages holds 'hello', not a message with role and content"),
        ({"messages": [{"content": "x"}]}, {}, "not a message with role and content"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, {}, "line 1: messages is {'a': 1} (dict), not text"),
        ({"question": "q", "answer": "a", "options": {"a": 1}}, {}, "line 1: options is {'a': 1} (dict), not a list"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, {}, "history holds ['a'], not a question with its"),
    ],
)  # fmt: skip
def test_what_is_of_no_format_is_one_line_that_says_what_to_set(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], said: str
) -> None:
    with pytest.raises(DataError) as raised:
        load(tmp_path, row, columns=columns)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_later_row_without_a_column_is_named(tmp_path: Path) -> None:
    for first, second, missing in (
        ({"messages": messages((U, "p"), (A, "r"))}, {"prompt": "p"}, "messages"),
        ({"instruction": "p", "output": "r"}, {"instruction": "q"}, "output"),
    ):
        with pytest.raises(DataError, match=f"line 2 has no {missing}; it has "):
            load(tmp_path, first, second)


def test_rows_that_are_no_conversations_are_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    good = messages((U, "p"), (A, "r"))
    bad = [
        messages((U, "q"), (U, "again"), (A, "r")),
        messages((U, "q"), (A, "r"), (S, "late"), (U, "q"), (A, "r")),
        messages((U, "q"), ("tool", "x"), (A, "r")),
        messages((U, ""), (A, "r")),
        messages((U, "q"), (A, "")),
        messages((U, "q"), (A, ""), (U, "q"), (A, "r")),
        messages((U, "q")),
        [],
        [{"role": U, "content": [{"type": "image", "url": "x"}]}, *messages((A, "r"))],
    ]
    found = load(tmp_path, *({"messages": turns} for turns in [good, *bad]))
    assert found.examples == [Example("p", "r")]
    assert {loss.words: loss.count for loss in found.tally.losses} == {
        "whose turns are not user and assistant in turn": 2,
        "with a turn of role tool": 1,
        "with an empty prompt": 1,
        "with an empty response": 4,
        "with a turn that is not text alone": 1,
    }
    assert found.turns is None


def test_turns_that_answer_nothing_or_are_not_answered_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        messages((A, "Hello!"), (U, "p"), (A, "r"), (U, "thanks")),
        messages((U, "q"), (A, "s")),
    ]
    found = load(tmp_path, *({"messages": turns} for turns in rows))
    assert found.examples == [Example("p", "r"), Example("q", "s")]
    assert found.turns is not None
    assert (found.turns.total, found.turns.lost) == (6, 2)
    assert "2 of 6 turns left out (1 answers to nothing, at the beginning, 1 questions without" in str(found.turns)


def test_an_answer_that_is_none_of_the_options_leaves_the_row_out(tmp_path: Path) -> None:
    rows = [{"question": n, "options": ["x", "y"], "answer": answer} for n, answer in enumerate(["x", "z", 2, "C"])]
    found = load(tmp_path, *rows)
    assert [example.prompt for example in found.examples] == ["0"]
    assert [(loss.words, loss.count) for loss in found.tally.losses] == [("whose answer is none of its options", 3)]


def test_a_conversation_differs_from_another_by_all_that_is_asked(tmp_path: Path) -> None:
    rows = [
        messages((U, "a?"), (A, "1"), (U, "why?"), (A, "x")),
        messages((U, "b?"), (A, "1"), (U, "why?"), (A, "y")),
        messages((U, "A?"), (A, "1"), (U, "WHY?"), (A, "z")),
    ]
    found = load(tmp_path, *({"messages": turns} for turns in rows))
    assert [example.response for example in found.examples] == ["x", "y"]


def test_any_answer_of_a_conversation_may_be_too_long(tmp_path: Path) -> None:
    rows = [messages((U, "a?"), (A, "x" * 9), (U, "b?"), (A, "y")), messages((U, "c?"), (A, "z"))]
    found = load(tmp_path, *({"messages": turns} for turns in rows), max_response_chars=8)
    assert [example.prompt for example in found.examples] == ["c?"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p"}, "p"),
        ({"instruction": "p", "input": "x"}, "p\n\nx"),
        ({"question": "p", "answer": "a"}, "p"),
        ({"messages": messages((U, "p"))}, "p"),
        ({"prompt": messages((U, "p"))}, "p"),
        ({"messages": messages((U, "p"), (A, "r"))}, "p"),
    ],
)
def test_public_prompts_need_no_response(tmp_path: Path, row: dict[str, Any], prompt: str) -> None:
    (found,) = load(tmp_path, row, needs_response=False).examples
    assert found.prompt == prompt
    if "prompt" in row or "input" in row:
        with pytest.raises(DataError, match="of no known format"):
            load(tmp_path, row)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.csv.gz", "x.jsonl.zst", "x.json.zst", "x.tsv.zst"])
def test_compressed_files_are_read(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "q", "response": "é"}]
    plain = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": "\ufeff" + json.dumps(rows, indent=1),
        "csv": "prompt,response\np,r\nq,é\n",
        "tsv": "prompt\tresponse\np\tr\nq\té\n",
    }[name.split(".")[1]].encode()
    packed = gzip.compress(plain) if name.endswith("gz") else zstandard.compress(plain)
    (tmp_path / name).write_bytes(packed)
    assert load_examples(str(tmp_path / name)).examples == [Example("p", "r"), Example("q", "é")]
    for broken in (packed[:-4], plain):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            load_examples(str(tmp_path / name))


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"prompt": "p", "response": "r"}\n{"prompt": "q", "response": "s"}\n')
    assert load_examples(str(tmp_path / "x.json")).examples == [Example("p", "r"), Example("q", "s")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"prompt": "p", "response": "r"}', "x.json is not JSON: "),
        ('[{"prompt": "p", "response": "r"}, 3]', "x.json, item 2 is a int, not an object with columns"),
        ('[{"prompt": "p", "prompt": "r"}]', "x.json, item 1 is not JSON: 'prompt' is there twice"),
        ('{"version": 1, "data": []}', "x.json is of no known format: it has version, data"),
        ("hello", "x.json, line 1 is not JSON"),
        ("", "holds no rows"),
        ("[]", "holds no rows"),
    ],
)
def test_a_json_file_that_holds_no_rows_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError) as raised:
        load_examples(str(tmp_path / "x.json"))
    assert said in str(raised.value)


def test_a_pattern_reads_files_in_order_and_each_is_an_owner(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "train.jsonl", {"prompt": name, "response": "r"})
    (tmp_path / "c" / "notes.txt").touch()
    found = load_examples(str(tmp_path / "*" / "*.jsonl")).examples
    assert [(example.prompt, example.owner) for example in found] == [(x, f"{x}/train") for x in "abc"]
    assert [example.prompt for example in load_examples(f"{tmp_path}/**/*.jsonl").examples] == ["a", "b", "c"]
    assert [example.owner for example in load_examples(f"{tmp_path}/a/*.jsonl").examples] == [""]
    with pytest.raises(DataError, match=r"data.source .*/nothing/\* matches no file"):
        load_examples(f"{tmp_path}/nothing/*")
    with pytest.raises(DataError, match=r"matches .*notes.txt, which is not a .json, "):
        load_examples(f"{tmp_path}/c/*")


def test_a_slice_of_files_goes_over_all_of_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        jsonl(tmp_path / f"{name}.jsonl", *({"prompt": f"{name}{n}", "response": "r"} for n in range(3)))
    found = load_examples(f"{tmp_path}/*.jsonl", split="train[1:5]").examples
    assert [example.prompt for example in found] == ["a1", "a2", "b0", "b1"]
    found = load_examples(f"{tmp_path}/a.jsonl", split="train[-1:]").examples
    assert [example.prompt for example in found] == ["a2"]
    with pytest.raises(DataError, match='Unknown split "test"'):
        load_examples(f"{tmp_path}/a.jsonl", split="test")


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": f"p{n}", "response": n, "other": [n]} for n in range(4)]
    data = Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data.select([0, 1]), test=data.select([2, 3])).save_to_disk(tmp_path / "many")
    for name, split, responses in (("one", "train", "0123"), ("one", "train[:2]", "01"), ("many", "test", "23")):
        found = load_examples(str(tmp_path / name), split=split).examples
        assert "".join(example.response for example in found) == responses
    assert "not used: other" in str(load_examples(str(tmp_path / "many")).tally)
    with pytest.raises(DataError, match='Unknown split "validation"'):
        load_examples(str(tmp_path / "many"), split="validation")


def test_prompts_of_the_test_set_are_left_out_of_the_rest(tmp_path: Path) -> None:
    rows = [{"prompt": "P  q", "response": "r"}, {"prompt": "s", "response": "t"}]
    found = load(tmp_path, *rows, besides=[Example("p q", "")])
    assert [example.prompt for example in found.examples] == ["s"]
    assert [loss.words for loss in found.tally.losses] == ["with a prompt of the test set"]
