"""What could be learnt from the clients' answers at best: the NLL of the mixture of their models.

    python experiments/quality/ensemble.py COMPARISON [--arms "local only" "semantic consensus"]

An answer drawn from a client drawn at random is a draw from the mixture of the clients' distributions over answers.
Whoever learns from such answers learns that mixture, at best, however many there are. So its NLL, the sum over test
answers of -log(mean over clients of p_k(answer)) per token, says what one round of labels drawn from these clients can
teach. Writes ensemble.csv, a row an arm and seed, from the clients' last states.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from semcons_ray.data.split import read_split
from semcons_ray.federation.store import ClientStore
from semcons_ray.modeling.language_model import LanguageModel, Pair
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.run_folder import RunFolder

HERE = Path(__file__).parent


def answer_losses(model: LanguageModel, adapter: dict[str, torch.Tensor], pairs: list[Pair]) -> np.ndarray:
    """NLL (nats) of each reference answer as a whole, and its tokens, shape (2, N)."""
    return np.array([model.negative_log_likelihood(adapter, [pair], 1)[:2] for pair in pairs]).T


def bound(folder: Path, model: LanguageModel | None) -> tuple[dict[str, float], LanguageModel]:
    """Mean NLL of the clients of a run after its last round, and NLL of their mixture."""
    opened = RunFolder(folder)
    config = opened.read_config()
    model = model or LanguageModel(
        resolve_model(config.model.name),
        lora=config.model.lora,
        dtype=config.model.dtype,
        device="cpu",
        max_length=config.model.max_length,
        system_prompt=config.model.system_prompt,
    )
    pairs = [Pair(example.prompt, example.response) for example in read_split(opened.data).test]
    store = ClientStore(opened.state)
    losses = []
    for client in range(config.clients.num_clients):
        state = store.load(client, before=config.num_rounds + 1)
        adapter = {key.removeprefix("adapter."): value for key, value in state.items() if key.startswith("adapter.")}
        answers, tokens = answer_losses(model, adapter, pairs)
        losses.append(answers)
    by_client = np.stack(losses)
    mixture = np.log(len(losses)) - np.logaddexp.reduce(-by_client, axis=0)
    return {
        "mean_client_nll": float(by_client.sum(axis=1).mean() / tokens.sum()),
        "best_client_nll": float(by_client.sum(axis=1).min() / tokens.sum()),
        "mixture_nll": float(mixture.sum() / tokens.sum()),
        "best_client_of_each_answer_nll": float(by_client.min(axis=0).sum() / tokens.sum()),
    }, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder of semcons compare")
    parser.add_argument("--arms", nargs="+", default=["local only", "semantic consensus"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, model = [], None
    for arm in args.arms:
        slug = re.sub(r"[^\w.]+", "-", arm.casefold()).strip("-.")
        for folder in sorted((args.comparison / "runs" / slug).glob("seed_*")):
            values, model = bound(folder, model)
            rows.append({"arm": arm, "seed": int(folder.name.removeprefix("seed_")), **values})
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "ensemble.csv", index=False, float_format="%.4f")
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
