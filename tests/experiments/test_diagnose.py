import math

import numpy as np
import pytest

from tests.experiments.scripts import load_script

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
