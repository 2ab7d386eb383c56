import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.experiments.scripts import load_script
from tests.reporting.builder import write_run

diagnose = load_script("quality", "diagnose.py")


def test_the_mixture_averages_probabilities_not_their_logarithms() -> None:
    # One client is sure of the first response (p = 1/2), the other of the second; else p = 1/4 and 1/8.
    nll = np.log([[2.0, 8.0], [4.0, 2.0]])
    mean, mixed = diagnose.mixture(nll, np.array([1, 3]))
    assert mean == pytest.approx((math.log(16) + math.log(8)) / 2 / 4)
    assert mixed == pytest.approx((math.log(8 / 3) + math.log(16 / 5)) / 4)


def test_a_mixture_of_equals_is_each_of_them() -> None:
    mean, mixed = diagnose.mixture(np.array([[1.0, 2.0]] * 3), np.array([2, 1]))
    assert mean == pytest.approx(1.0) and mixed == pytest.approx(1.0)


def test_labels_are_of_rounds_that_formed_a_consensus(tmp_path: Path) -> None:
    table = diagnose.labels(write_run(tmp_path / "run", num_rounds=3, answer_last_round=False))
    assert table["round"].tolist() == [1, 2]
    assert table["labels"].tolist() == [4, 4]
    assert table["agreement"].tolist() == pytest.approx([0.4, 0.4])


def test_reference_answers_are_labels_though_no_client_gave_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", settings={"algorithm": {"rule": "reference"}}, num_rounds=1)
    rows = pd.read_parquet(folder / "consensus" / "round_001.parquet")
    rows.assign(chosen=False).to_parquet(folder / "consensus" / "round_001.parquet", index=False)
    assert diagnose.labels(folder)["labels"].tolist() == [4]


def test_clients_of_several_models_or_ranks_have_no_mixture(tmp_path: Path) -> None:
    mixed = write_run(
        tmp_path / "mixed", settings={"clients": {"num_clients": 2, "mix": {"a": 1, "b": 1}}}, num_clients=2
    )
    ranks = write_run(tmp_path / "ranks", settings={"clients": {"num_clients": 3, "lora_ranks": [4, 8]}})
    for folder in (mixed, ranks):
        with pytest.raises(SystemExit, match="clients have several models or ranks"):
            diagnose.mixtures(folder, {})
