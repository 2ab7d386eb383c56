import math
import subprocess
import sys

import pytest

from semcons_ray.metering.units import format_quantity, scale


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1.00 kB"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (123_456, "123 kB"),
     (999_499, "999 kB"), (999_501, "1.00 MB"), (1e6, "1.00 MB"), (1e9, "1.00 GB"), (5e15, "5,000 TB"),
     (0.25, "0.25 B"), (-1500, "-1.50 kB"), (math.nan, "–")],
)  # fmt: skip
def test_quantities_have_three_digits(value: float, text: str) -> None:
    assert format_quantity(value, "B") == text


def test_an_axis_has_the_prefix_of_its_largest_number() -> None:
    assert scale(999, "J") == (1.0, "J")
    assert scale(1000, "J") == (1000.0, "kJ")
    assert scale(1e18, "J") == (1e12, "TJ")
    assert scale(0, "J") == (1.0, "J")


def test_help_and_costs_need_neither_pandas_nor_matplotlib() -> None:
    code = (
        "import sys, contextlib\n"
        "from semcons_ray.commands.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None): main(['--help'])\n"
        "import semcons_ray.metering.units\n"
        "print({'pandas', 'matplotlib', 'torch', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
