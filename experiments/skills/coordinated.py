"""Whether clients that draw with the same random numbers elect better labels: tried on the models of finished runs,
whose clients answer the public prompts again. The figures of README.md.

    python experiments/skills/coordinated.py runs/labels-? --out experiments/skills/results

With the Gumbel trick a token is the one with the largest sum of its log-probability and a random number of its own. If
these numbers are the same for all clients, clients with like distributions choose the same tokens, each still from its
own distribution (coordinated ensembles, arXiv:2312.02132).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from semcons_ray.config import GenerationConfig
from semcons_ray.consensus import Election
from semcons_ray.federation.store import ClientStore
from semcons_ray.modeling import language_model
from semcons_ray.modeling.language_model import LanguageModel
from semcons_ray.modeling.packaged import resolve_model
from semcons_ray.reporting.intervals import mean_and_half_width
from semcons_ray.runs.run_folder import RunFolder
from semcons_ray.studies.labels import Answered, elect, read_answered


def by_gumbel(logits: Tensor, generation: GenerationConfig, draws: Tensor) -> Tensor:
    """As `decoding.chosen_tokens`, with a seed for all numbers of a token in place of a quantile."""
    chosen = []
    for row, draw in zip(logits, draws.tolist(), strict=True):
        numbers = torch.empty_like(row).exponential_(generator=torch.Generator().manual_seed(int(draw * 2**53)))
        chosen.append((row / generation.temperature - numbers.log()).argmax())
    return torch.stack(chosen)


def answers(folder: Path, run: Answered, *, together: bool) -> Answered:
    """The run with answers that its clients draw anew, with the same random numbers or each with its own."""
    config, last = RunFolder(folder).stored_config(), max(run.samples)
    model = LanguageModel.of(config.model, str(resolve_model(config.model.name)), device="cpu")
    samples = {}
    with mock.patch.object(language_model, "chosen_tokens", by_gumbel):
        for client in sorted(run.samples[last]):
            state = ClientStore(folder / "state").load(client, before=last + 1)
            adapter = {name.partition("adapter.")[2]: value for name, value in state.items() if "adapter." in name}
            seed = [config.seed, 0 if together else client + 1]
            texts, _ = model.generate(adapter, run.prompts, config.generation, np.random.default_rng(seed))
            samples[client] = np.array(texts).reshape(-1, len(run.prompts)).tolist()
    return dataclasses.replace(run, samples={last: samples})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for coordinated.csv")
    args = parser.parse_args()
    rows = []
    for folder in args.runs:
        run = read_answered(folder)
        for together in (False, True):
            drawn = answers(folder, run, together=together)
            for competence in ("equal", "expertise"):
                for count in (1, 2, 4, 8):
                    election = Election("plurality", {"min_cosine": 1.0}, competence=competence)
                    (labels,) = elect(drawn, election, count).values()
                    row = {"seed": run.seed, "together": together, "competence": competence, "draws": count}
                    rows.append(row | {"right": float(np.nanmean(run.is_right(labels)))})
            print(folder, "together" if together else "apart", rows[-1]["right"], flush=True)
            pd.DataFrame(rows).to_csv(args.out / "coordinated.csv", index=False, float_format="%.4f")
    by = pd.DataFrame(rows).pivot(index=["competence", "draws", "seed"], columns="together", values="right")
    for (competence, draws), seeds in by.groupby(level=[0, 1]):
        gain, half = mean_and_half_width((seeds[True] - seeds[False]).to_numpy())
        print(f"{competence}, {draws}: {seeds[False].mean():.3f}, {seeds[True].mean():.3f}, {gain:+.3f} ± {half:.3f}")


if __name__ == "__main__":
    main()
