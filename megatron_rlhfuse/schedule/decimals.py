"""Decimal numbers as whole multiples of a common unit: arithmetic without rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction

MAX_DECIMALS = 9
"""Numbers with more digits after the point are measured ones: no common unit is worth having."""


def as_decimal(value: float) -> Fraction | None:
    """The decimal number that prints as `value`; None if it has more than MAX_DECIMALS decimals."""
    decimal = Decimal(repr(float(value)))
    if decimal != round(decimal, MAX_DECIMALS):
        return None
    return Fraction(decimal)


def common_unit(values: Iterable[Fraction]) -> Fraction:
    """The largest number of which all values are multiples; 1 if all of them are zero."""
    listed = list(values)
    denominator = math.lcm(*(value.denominator for value in listed))
    divisor = math.gcd(*(int(value * denominator) for value in listed))
    return Fraction(divisor, denominator) if divisor else Fraction(1)
