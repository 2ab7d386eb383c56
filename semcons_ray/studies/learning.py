"""What models become when they learn other labels than those that their run elected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from semcons_ray.config import ExperimentConfig
from semcons_ray.data.split import read_split
from semcons_ray.errors import UserError
from semcons_ray.federation.server import ServerState
from semcons_ray.messages import PseudoLabels, text_of
from semcons_ray.runs.experiment import resume_experiment
from semcons_ray.runs.run_folder import RunFolder


def check_answers_last(config: ExperimentConfig, where: str | Path) -> None:
    """Check that clients answer in the last round, so that a run can go on with other labels.

    Args:
        config: Settings of the run.
        where: What they are of, for the error.

    Raises:
        UserError: They do not.
    """
    if not config.algorithm.forms_consensus or config.num_rounds not in config.algorithm.exchanges(config.num_rounds):
        raise UserError(f"{where}: nobody answers in the last round; set algorithm.answer_last_round to true")


def check_learning(run: Path) -> ExperimentConfig:
    """Check that a run can go on with other labels, and return its settings.

    Raises:
        UserError: It is not finished, or nobody answered in its last round.
    """
    folder = RunFolder(run)
    config = folder.stored_config()
    if not folder.is_finished(config.num_rounds):
        raise UserError(f"{run} is not finished; semcons resume {run} goes on")
    check_answers_last(config, run)
    return config


def one_round_more(config: ExperimentConfig, num_answers: int) -> ExperimentConfig:
    """Settings with which a finished run goes on for a round, in which nobody answers public prompts, and then clients
    answer so many test prompts."""
    return config.model_copy(
        update={
            "num_rounds": config.num_rounds + 1,
            "algorithm": config.algorithm.model_copy(update={"answer_last_round": False}),
            "evaluation": config.evaluation.model_copy(update={"num_answers": num_answers}),
            "tracking": config.tracking.model_copy(update={"report_to": ()}),
        }
    )


def learn(run: Path, labels: Sequence[str | None], out: Path) -> pd.DataFrame:
    """Let the clients of a finished run learn labels for one more round, and then answer all test prompts.

    The run goes on in a folder of its own with these labels, in place of those of its last exchange. What is there
    already is finished, or taken as it is.

    Args:
        run: Its folder.
        labels: A label of each public prompt, (P,); None where there is none.
        out: The folder in which it goes on.

    Returns:
        A row for each client and test prompt: columns client_id, prompt, response (the right answer)
        and answer.

    Raises:
        UserError: See `check_learning` and `resume_experiment`.
        RunFolderError: A file is missing or damaged, or the folder cannot be written.
    """
    folder, config = RunFolder(run), check_learning(run)
    last, algorithm = config.num_rounds, config.algorithm
    test = read_split(folder.data).test
    if not out.exists():
        message = PseudoLabels.of(last, labels).encode(algorithm.compression)
        kept = ServerState.decode(folder.server_state(last)).kept
        folder.branch(out, one_round_more(config, len(test)), ServerState(message, kept).encode())
    resume_experiment(out)
    items = pd.read_parquet(out / "items" / f"round_{last + 1:03d}.parquet", columns=["client_id", "item", "answer"])
    asked = [test[item] for item in items["item"]]
    items = items.assign(prompt=[text_of(one.prompt) for one in asked], response=[one.response for one in asked])
    return items.drop(columns="item")
