"""Makes the skills that the experiments divide among clients: questions with one right answer, by reasoning-gym 0.1.25.

    pip install reasoning-gym==0.1.25
    python experiments/skills/generate.py

Each skill has a file of questions that are all different: `skills/NAME.jsonl`, with prompt, response and category.
They are drawn with the seed below; the same version gives the same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import reasoning_gym

SEED, MOST = 2026, 400
SKILLS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_value": 2, "max_value": 40},
    "letter_counting": {"min_words": 3, "max_words": 6},
}


def main() -> None:
    folder = Path(__file__).parent
    for skill, settings in SKILLS.items():
        seen: dict[str, str] = {}
        for item in reasoning_gym.create_dataset(skill, seed=SEED, size=4 * MOST, **settings):
            seen.setdefault(item["question"], item["answer"])
        rows = [{"prompt": prompt, "response": answer, "category": skill} for prompt, answer in seen.items()][:MOST]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{skill}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{skill}: {len(rows)} questions")


if __name__ == "__main__":
    main()
