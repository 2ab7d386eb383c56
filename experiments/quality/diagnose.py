"""Explains the quality that semantic consensus reaches, by its labels and by what the clients know together.

    python experiments/quality/diagnose.py COMPARISON [--out DIR]

From the runs of a comparison it writes two tables. labels.csv has a row for each arm, seed and round that formed a
consensus: ROUGE-L of the labels and of all answers against the data's own, how wins are spread over clients, how
answers differ, and churn. mixtures.csv has a row for each arm and seed: test NLL of the clients' last adapters (mean);
of their mixture, p(y|x) = mean_k p_k(y|x), from which the answers of all clients are drawn; and of the mean of their
adapters, which no client may know.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from semcons_ray.data.split import read_split
from semcons_ray.evaluation.scores import rouge_l
from semcons_ray.federation.weights import weighted_mean
from semcons_ray.modeling.adapter import Adapter
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.runs.run_folder import RunFolder

HERE = Path(__file__).parent


def labels(run: Path) -> pd.DataFrame:
    """A row for each round of one run: the quality of answers and labels."""
    references = [example.response for example in read_split(run / "data.parquet").public]
    rounds = pd.read_parquet(run / "rounds.parquet").set_index("round")
    rows = []
    for path in sorted(run.glob("consensus/round_*.parquet")):
        answers = pd.read_parquet(path)
        number = int(path.stem.removeprefix("round_"))
        answers["rouge_l"] = [rouge_l(row.answer, references[row.prompt_id]) for row in answers.itertuples()]
        chosen = answers[answers["chosen"]]
        rows.append(
            {
                "round": number,
                "labels": rounds.loc[number, "num_labels"],
                "label_rouge_l": chosen["rouge_l"].mean(),
                "answer_rouge_l": answers["rouge_l"].mean(),
                "best_answer_rouge_l": answers.groupby("prompt_id")["rouge_l"].max().mean(),
                "most_wins": chosen["client_id"].value_counts(normalize=True).max() if len(chosen) else math.nan,
                "distinct_answers": answers.groupby("prompt_id")["answer"].nunique().mean(),
                "agreement": rounds.loc[number, "mean_agreement"],
                "label_churn": rounds.loc[number, "label_churn"],
            }
        )
    return pd.DataFrame(rows)


def mixture(nll: np.ndarray, num_tokens: np.ndarray) -> tuple[float, float]:
    """NLL (nats a token) of clients on average, and of their mixture.

    Args:
        nll: NLL (nats) of each response by each client, (C, N), summed over the response's tokens.
        num_tokens: Tokens of each response, (N,).
    """
    mixed = -(np.logaddexp.reduce(-nll, axis=0) - math.log(len(nll)))
    return float(nll.sum(axis=1).mean() / num_tokens.sum()), float(mixed.sum() / num_tokens.sum())


def read_adapter(folder: Path) -> Adapter:
    """Read what `LanguageModel.export_adapter` wrote, under the names of the model's parameters."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key.replace(".weight", ".default.weight"): value.float() for key, value in tensors.items()}


def mixtures(run: Path, models: dict[str, LanguageModel]) -> dict[str, float]:
    """NLL of the last adapters of one run, whose clients have one model and rank: the mean, of the mixture and of the
    average.

    `models` keeps loaded models, by their settings.
    """
    config = RunFolder(run).read_config()
    name, *others = sorted(set(config.client_models()))
    if others or len(set(config.client_ranks())) > 1:
        raise SystemExit(f"{run}: clients have several models or ranks, and neither tokens nor adapters of these mix")
    settings = config.model.model_copy(update={"name": name})
    if (key := settings.model_dump_json()) not in models:
        models[key] = LanguageModel(
            resolve_model(name),
            lora=settings.lora,
            dtype=settings.dtype,
            device="cpu",
            max_length=settings.max_length,
            quantization=settings.quantization,
            system_prompt=settings.system_prompt,
            chat_template_kwargs=settings.chat_template_kwargs,
            template_date=settings.template_date,
        )
    model = models[key]
    pairs = [Pair(example.prompt, example.response) for example in read_split(run / "data.parquet").test]
    adapters = [read_adapter(folder) for folder in sorted((run / "adapters").glob("client_*"))]
    scores = [model.negative_log_likelihood(adapter, pairs, 32) for adapter in adapters]
    mean, mixed = mixture(np.array([score.nll for score in scores]), np.array(scores[0].num_tokens))
    averaged = model.negative_log_likelihood(weighted_mean(adapters, [1.0] * len(adapters)), pairs, 32)
    return {
        "mean_nll": mean,
        "mixture_nll": mixed,
        "averaged_nll": averaged.nll_sum / sum(averaged.num_tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder that semcons compare wrote")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--mixtures", nargs="*", default=["local-only", "local-only-averaged", "semantic-consensus"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = sorted(path.parent for path in args.comparison.glob("runs/*/seed_*/adapters"))
    names = {run: {"arm": run.parent.name, "seed": int(run.name.removeprefix("seed_"))} for run in runs}
    tables = [labels(run).assign(**names[run]) for run in runs if any(run.glob("consensus/*.parquet"))]
    if tables:
        table = pd.concat(tables).set_index(["arm", "seed", "round"])
        table.to_csv(args.out / "labels.csv", float_format="%.4f")
        print(table.groupby(["arm", "round"]).mean().round(3).to_string())
    models: dict[str, LanguageModel] = {}
    rows = [names[run] | mixtures(run, models) for run in runs if run.parent.name in args.mixtures]
    if rows:
        table = pd.DataFrame(rows).set_index(["arm", "seed"])
        table.to_csv(args.out / "mixtures.csv", float_format="%.4f")
        print(table.round(3).to_string())


if __name__ == "__main__":
    main()
