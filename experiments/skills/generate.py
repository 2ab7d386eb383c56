"""Makes the skills that the experiments divide among clients: questions with one right answer, by reasoning-gym 0.1.25.

    pip install reasoning-gym==0.1.25
    python experiments/skills/generate.py

Each skill has a file of questions that are all different: `questions/NAME.jsonl`, with prompt, response and category.
They are drawn with the seed below; the same version gives the same files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import reasoning_gym

SEED, MOST = 2026, 600
LARGEST_FACTOR = 26
SKILLS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_value": 2, "max_value": 40},
    "letter_counting": {"min_words": 3, "max_words": 6},
}


def wanted(skill: str, question: str) -> bool:
    """Whether a small model can learn it: products of numbers up to `LARGEST_FACTOR`, all of other skills."""
    return skill != "products" or max(map(int, re.findall(r"\d+", question))) <= LARGEST_FACTOR


def main() -> None:
    folder = Path(__file__).parent / "questions"
    for skill, settings in SKILLS.items():
        seen: dict[str, str] = {}
        for item in reasoning_gym.create_dataset(skill, seed=SEED, size=2_000 * MOST, **settings):
            if wanted(skill, item["question"]):
                seen.setdefault(item["question"], item["answer"])
            if len(seen) == MOST:
                break
        rows = [{"prompt": prompt, "response": answer, "category": skill} for prompt, answer in seen.items()]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{skill}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{skill}: {len(rows)} questions")


if __name__ == "__main__":
    main()
