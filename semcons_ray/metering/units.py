"""Formats bytes, joules and seconds with an SI prefix (kB = 1000 B)."""

from __future__ import annotations

import math


def scale(largest: float, unit: str) -> tuple[float, str]:
    """The divisor, and the unit with its SI prefix, that suit numbers up to `largest`."""
    power = min(max(int(math.log10(largest)) // 3, 0), 4) if largest > 0 else 0
    return 1000.0**power, ("", "k", "M", "G", "T")[power] + unit


def format_mark(value: float, unit: str) -> str:
    """A round number, such as one at an axis's tick, without needless decimals; positive."""
    divisor, prefixed = scale(value, unit)
    return f"{value / divisor:g} {prefixed}"


def format_quantity(value: float, unit: str) -> str:
    """A quantity to three digits; a dash for NaN."""
    if math.isnan(value):
        return "–"
    rounded = float(f"{abs(value):.3g}")  # 999.6 would be shown as 1000
    divisor, prefixed = scale(rounded, unit)
    shown = value / divisor
    digits = 0 if divisor == 1 and float(value).is_integer() else max(0, 3 - len(str(int(abs(shown)))))
    return f"{shown:,.{digits}f} {prefixed}"
