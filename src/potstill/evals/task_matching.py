"""Whether an answer is the expected one: as a text, by its last number, or by a regular expression."""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(
    r"""(?<![\w.])
    (?P<sign>[-+](?=[.0-9]))?                                    # not between two numbers, as in 5-3
    (?:(?P<whole>[0-9]+)[ ](?=[0-9]+/))?                         # of 1 1/2
    (?P<number>(?:[0-9]{1,3}(?:[,_\u00a0\u2009\u202f][0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)
    (?P<exponent>[eE][-+]?[0-9]+)?
    (?:[ ]?/[ ]?(?P<denominator>0*[1-9][0-9]*)(?!\.[0-9]))?
    """,
    re.VERBOSE,
)
FRAC = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
"""A fraction in LaTeX."""
MIXED = re.compile(r"(?<=[0-9])(?=\\[dt]?frac\{)")
"""Between a whole number and its fraction in LaTeX."""
GROUPS = re.compile("[,_\u00a0\u2009\u202f]")
MOST_DIGITS, MOST_OF_EXPONENT = 4000, 6
"""Characters of a number, and of its exponent: Python reads no longer number, and writing one out takes for ever."""


def last_number(text: str) -> Fraction | None:
    """The value of the last number in a text; None where there is none.

    Read are 1,234.5, 1_234 and 1 234 with a space that does not break, signs, exponents, 3/4, 1 1/2 and fractions in
    LaTeX. A point is a decimal point, and a comma a thousands separator where three digits follow.
    """
    numbers = list(NUMBER.finditer(FRAC.sub(r"\1/\2", MIXED.sub(" ", text.replace("\u2212", "-")))))
    if not numbers:
        return None
    found = numbers[-1]
    if len(found[0]) > MOST_DIGITS or len(found["exponent"] or "") > MOST_OF_EXPONENT:
        return None
    value = Fraction(GROUPS.sub("", found["number"]) + (found["exponent"] or ""))
    if found["denominator"]:
        value /= int(found["denominator"])
    value += int(found["whole"] or 0)
    return -value if found["sign"] == "-" else value


def matches(answer: str, expected: str, match: str) -> bool:
    """`match` is exact, number or regex; white space around an answer does not count."""
    if match == "exact":
        return answer.strip() == expected.strip()
    if match == "regex":
        return re.fullmatch(expected, answer.strip()) is not None
    value = last_number(answer)
    return value is not None and value == last_number(expected)
