"""Do a client's answers tell of what its private data is: its mix of categories?

The server knows the answers, and examples of each category that are nobody's. It takes a client to know more of the
categories towards which its answers differ from the other clients' answers to the same prompts. This attack is our own;
that answers tell of the distribution of labels is known for class scores (arXiv:2502.08001).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from math import factorial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from semcons_ray.data.examples import Example
from semcons_ray.messages import text_of
from semcons_ray.security.chance import Floats
from semcons_ray.security.disclosure import Embed

DRAWS = 9_999


def infer_mixes(answers: pd.DataFrame, known: Sequence[Example], embed: Embed) -> tuple[list[str], dict[int, Floats]]:
    """The mix of categories of each client, as far as its answers tell.

    For each prompt, a client's mean vector less the mean of the others' is nearest to the direction of one category,
    from the centre of all categories to the mean vector of its examples; the mix is how often it is which.

    Args:
        answers: Columns prompt_id, client_id and answer, of one or several rounds.
        known: Examples that are nobody's, with their categories.
        embed: The embedder of the run.

    Returns:
        The categories (K), and by client the shares that are inferred, (K,), in their order.
    """
    categories = sorted({example.category for example in known})
    of_known = embed([text_of(example.prompt) + " " + example.response for example in known]).double().numpy()
    named = np.array([example.category for example in known])
    centres = np.array([of_known[named == category].mean(axis=0) for category in categories])
    directions = centres - centres.mean(axis=0)
    said = answers[answers["answer"].str.strip() != ""]
    texts, code = np.unique(said["answer"].to_numpy(str), return_inverse=True)
    vectors = embed(texts.tolist()).double().numpy()[code]
    places = said.groupby(["prompt_id", "client_id"]).indices
    means = pd.DataFrame({place: vectors[rows].mean(axis=0) for place, rows in places.items()}).T
    by_prompt = means.groupby(level=0)
    count = by_prompt[0].transform("size").to_numpy()[:, None]
    differing = means[count > 1]
    # A client's vector less the mean of the others' is this, times count / (count - 1).
    differing = differing - by_prompt.transform("mean")[count > 1]
    nearest = (differing.to_numpy() @ directions.T).argmax(axis=1)
    clients = differing.index.get_level_values(1).to_numpy()
    size = len(categories)
    return categories, {
        int(client): np.bincount(nearest[clients == client], minlength=size) / (clients == client).sum()
        for client in np.unique(clients)
    }


def compare_mixes(
    inferred: Mapping[int, Floats], true: Mapping[int, Floats], random: np.random.Generator
) -> pd.DataFrame:
    """How far inferred mixes are from the true ones.

    Args:
        inferred: By client, shares of categories, (K,).
        true: The same, of private examples.
        random: Random numbers of the permutations.

    Returns:
        A row for each client. Columns: client_id; error, half the sum of absolute differences of shares, 0 to 1;
        guess, that of the mean of all true mixes; p, the same in all rows: the share of ways to give clients' inferred
        mixes to other clients in which the mean error is as small. All ways are tried up to 7 clients; of more, 9,999
        drawn ones and the true one.
    """
    clients = [*inferred]
    found, truth = (np.array([mixes[client] for client in clients]) for mixes in (inferred, true))
    errors = np.abs(found[:, None] - truth[None]).sum(axis=2) / 2
    own = np.arange(len(clients))
    orders: NDArray[np.int64]
    if factorial(len(clients)) <= DRAWS:
        orders = np.array([*permutations(own)])
    else:
        orders = np.array([own, *(random.permutation(own) for _ in range(DRAWS))])
    means = errors[orders, own].mean(axis=1)
    return pd.DataFrame(
        {
            "client_id": clients,
            "error": errors[own, own],
            "guess": np.abs(truth - truth.mean(axis=0)).sum(axis=1) / 2,
            "p": (means <= means[0] + 1e-9).mean(),
        }
    )
