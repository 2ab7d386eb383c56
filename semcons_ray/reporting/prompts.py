"""The public prompts with all answers to them, as compact JSON for the page's searchable table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from semcons_ray.reporting.tables import Run

MAX_TABLE_BYTES = 4_000_000
MAX_TEXT_CHARS = 800


def prompt_table(run: Run, max_bytes: int = MAX_TABLE_BYTES) -> dict[str, Any]:
    """Prompts and answers, newest round first, up to about `max_bytes` of JSON.

    Equal answers to a prompt are one entry with all clients that gave it, and each text is stored once.

    Returns:
        texts: every text, cut to `MAX_TEXT_CHARS` characters.
        prompts: by prompt id, [prompt, reference, category], each as an index into texts.
        rounds: newest first, each {round, rows}; a row is [prompt id, agreement, abstained, answers], and an answer is
            [index into texts, similarity, client if it was elected or -1, clients]; the elected answer comes first,
            then the others by similarity.
        shown, total: how many rows are in rounds, and how many the run has.
    """
    texts: dict[str, int] = {}
    size = 0

    def index(text: str) -> int:
        nonlocal size
        if len(text) > MAX_TEXT_CHARS:
            text = text[: MAX_TEXT_CHARS - 1] + "…"
        if text not in texts:
            size += len(text.encode()) + 4
        return texts.setdefault(text, len(texts))

    public = run.data[run.data["role"] == "public"]
    prompts: dict[int, list[int]] = {}
    rounds: list[dict[str, Any]] = []
    shown = 0
    for round in sorted(set(run.consensus["round"]), reverse=True):
        rows: list[tuple[int, float | None, int, list[list[Any]]]] = []
        for _, group in run.consensus[run.consensus["round"] == round].groupby("prompt_id"):
            if size >= max_bytes:
                break
            prompt = int(group["prompt_id"].iloc[0])
            if prompt not in prompts and prompt < len(public):
                example = public.iloc[prompt]
                prompts[prompt] = [index(example["prompt"]), index(example["response"]), index(example["category"])]
            answers = _answers(group, index)
            rows.append((prompt, _rounded(group["agreement"].iloc[0]), int(group["abstained"].iloc[0]), answers))
            size += 40 + sum(25 + 4 * len(answer[3]) for answer in answers)
        if rows:
            rounds.append({"round": int(round), "rows": rows})
            shown += len(rows)
    return {
        "texts": list(texts),
        "prompts": prompts,
        "rounds": rounds,
        "shown": shown,
        "total": len(run.consensus.drop_duplicates(["round", "prompt_id"])),
    }


def _answers(group: pd.DataFrame, index: Callable[[str], int]) -> list[list[Any]]:
    entries = []
    for text, same in group[group["answer"] != ""].groupby("answer", sort=False):
        chosen = same.loc[same["chosen"], "client_id"]
        entries.append(
            [
                index(str(text)),
                _rounded(same["similarity"].mean()),
                int(chosen.iloc[0]) if len(chosen) else -1,
                [int(client) for client in same["client_id"].unique()],
            ]
        )
    return sorted(entries, key=lambda entry: (entry[2] < 0, -(entry[1] if entry[1] is not None else -2.0)))


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 3)
