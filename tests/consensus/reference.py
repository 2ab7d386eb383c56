"""The rules once more, one prompt and one answer at a time in float64, as plain as they can be written."""

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float64]
TIE = 1e-6


def first_best(scores: dict[int, float]) -> int:
    best = max(scores.values())
    return min(client for client, score in scores.items() if score >= best - TIE)


def mean_cosines(e: Vectors, here: list[int]) -> dict[int, float]:
    if len(here) == 1:
        return {here[0]: 1.0}
    return {i: float(np.mean([e[i] @ e[j] for j in here if j != i])) for i in here}


def medoid(e: Vectors, here: list[int]) -> int:
    return first_best(mean_cosines(e, here))


def weighted_medoid(e: Vectors, here: list[int], weights: list[float]) -> int:
    if sum(weights[j] for j in here) == 0:
        weights = [1.0] * len(weights)
    total = sum(weights[j] for j in here)
    return first_best({i: sum(weights[j] * (e[i] @ e[j]) for j in here) / total for i in here if weights[i] > 0})


def geometric_median(e: Vectors, here: list[int]) -> int:
    z = np.mean([e[i] for i in here], axis=0)
    for _ in range(32):
        pull = {i: 1 / max(float(np.linalg.norm(e[i] - z)), 1e-3) for i in here}
        z = sum(pull[i] * e[i] for i in here) / sum(pull.values())
    return first_best({i: float(e[i] @ z) for i in here})


def trimmed(e: Vectors, here: list[int], trim: float) -> int:
    cosines = mean_cosines(e, here)
    worst_first = sorted(here, key=lambda i: (cosines[i], -i))
    kept = sorted(worst_first[int(trim * len(here) + 1e-9) :])
    return first_best({i: float(np.mean([e[i] @ e[j] for j in kept])) for i in kept})


def plurality(e: Vectors, here: list[int], min_cosine: float) -> int:
    cosines = mean_cosines(e, here)
    opinion = {i: [j for j in here if j == i or e[i] @ e[j] >= min_cosine - TIE] for i in here}
    most = max(len(members) for members in opinion.values())
    members = opinion[first_best({i: cosines[i] for i in here if len(opinion[i]) == most})]
    return first_best({i: float(np.mean([e[i] @ e[j] for j in members])) for i in members})


def mode(e: Vectors, here: list[int], texts: list[int]) -> int:
    counts = {i: sum(texts[j] == texts[i] for j in here) for i in here}
    cosines = mean_cosines(e, here)
    return first_best({i: cosines[i] for i in here if counts[i] == max(counts.values())})


def multi_krum(e: Vectors, here: list[int], num_byzantine: int) -> int:
    if len(here) == 1:
        return here[0]
    nearest = max(1, len(here) - num_byzantine - 2)
    return first_best(
        {i: float(np.mean(sorted((e[i] @ e[j] for j in here if j != i), reverse=True)[:nearest])) for i in here}
    )
