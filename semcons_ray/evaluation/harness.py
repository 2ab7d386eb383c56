"""Tasks of lm-eval (EleutherAI's Language Model Evaluation Harness, 0.4.13), run on models that are in memory.

A task asks, answers and scores as it is defined there; only what a run's settings say of the model is taken over: its
system prompt and the arguments of its chat template.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cache
from typing import Any

import msgspec

from semcons_ray.errors import ConfigError, first_line

INSTALL = "pip install --no-deps -r requirements-lm-eval.lock"
PREFIX = "lm_eval/"
"""Columns of metrics.parquet with scores of tasks begin so: lm_eval/TASK/METRIC, and the same with `STDERR`."""
STDERR = "_stderr"
SEED = 1234
"""lm-eval's own seed, for the choice of examples in a prompt and for tasks that sample answers."""
_BOOTSTRAP = 1000


class TaskScore(msgspec.Struct, frozen=True):
    """What a model scores in a task.

    Attributes:
        task: Name of the task.
        metric: Name of the metric, with its filter if it has one: acc, or exact_match,strict-match.
        value: The score.
        stderr: Its standard error over items; NaN if lm-eval gives none.
        num_items: Number of items.
    """

    task: str
    metric: str
    value: float
    stderr: float
    num_items: int


@dataclass(frozen=True)
class Harness:
    """Runs tasks.

    Attributes:
        tasks: Names of tasks, groups or tags, or paths of YAML files.
        limit: The first items of each task that are used; None: all.
        rounds: Rounds after which clients' models are measured; 0 is the base model.
        batch_size: Requests in a batch.
        system_prompt: Text of a system turn; "": none.
        template_kwargs: Arguments for the chat template.
        template_date: The day that a chat template is told is today.
    """

    tasks: tuple[str, ...]
    limit: int | None
    rounds: frozenset[int]
    batch_size: int
    system_prompt: str
    template_kwargs: Mapping[str, Any]
    template_date: date

    def check(self, setting: str) -> None:
        """Check that lm-eval is installed, knows the tasks and has their data, if there are any tasks.

        Args:
            setting: Where the tasks were named, for errors.

        Raises:
            ConfigError: It is not, or does not.
        """
        if not self.tasks:
            return
        try:
            import lm_eval.evaluator  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"{setting} needs lm-eval ({error}): {INSTALL}") from error
        for task in self.tasks:
            try:
                self._load([task])
            except Exception as error:  # whatever a task's own code, or a library of data sets, raises
                raise ConfigError(f"{setting}: lm-eval cannot load {task}: {first_line(error)}") from error

    def scores(self, model: Any, tokenizer: str) -> tuple[TaskScore, ...]:
        """What a model scores in each task.

        Args:
            model: A causal language model of transformers, which may have adapters.
            tokenizer: Folder or hub id of its tokenizer.
        """
        import torch
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        is_chat = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).chat_template is not None
        today = datetime.combine(self.template_date, time()).strftime
        asked = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=self.batch_size,
            softmax_dtype="float32",
            add_bos_token=False if is_chat else None,  # a chat template has it where it belongs
            chat_template_args={**self.template_kwargs, "strftime_now": today},
        )
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(SEED)
            results = evaluate(
                asked,
                self._load(self.tasks),
                limit=self.limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=False,
                system_instruction=self.system_prompt or None,
                apply_chat_template=is_chat,
                fewshot_as_multiturn=is_chat,
            )
        return tuple(_scores(results))

    @staticmethod
    def _load(tasks: Iterable[str]) -> Any:
        loaded = _manager().load([*tasks])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        return loaded


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _scores(results: Mapping[str, Any]) -> Iterable[TaskScore]:
    for task, found in {**results["results"], **results.get("groups", {})}.items():
        for key, value in found.items():
            metric, _, name = key.partition(",")
            if name and not metric.endswith(STDERR):
                error = found.get(f"{metric}{STDERR},{name}")
                yield TaskScore(
                    task=task,
                    metric=metric if name == "none" else key,
                    value=float(value),
                    stderr=float(error) if isinstance(error, (int, float)) else math.nan,
                    num_items=int(found["sample_len"]),
                )
