"""How many rows of each source a step of a mix has: exact shares, as a function of the step's number.

With R rows a step and shares p, a step has floor(R p) or ceil(R p) rows of a source, and all steps before any step have
less than one row more or less than their number times R p. Sources that are due one row more than the floor in a step
are chosen as a Pfair scheduler chooses tasks: by PD2's priorities, with which there is such a choice in every step
(Anderson and Srinivasan 2001, Mixed Pfair/ERfair scheduling of asynchronous periodic tasks, ECRTS).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

BLOCK = 256
"""Steps between those whose counts are kept."""
Counts = tuple[int, ...]


class Shares:
    """Rows of each source before each step.

    The pattern repeats after `period` steps, which is short for weights with few digits. A step's counts take up to
    BLOCK steps of work for each source, and once as many as there are before it in its period.
    """

    def __init__(self, weights: Sequence[Fraction], rows_per_step: int) -> None:
        total = sum(weights)
        per_step = [rows_per_step * weight / total for weight in weights]
        self.floors = tuple(math.floor(each) for each in per_step)
        self.most = tuple(math.ceil(each) for each in per_step)
        """Rows of each source that a step has at most."""
        rests = [each - floor for each, floor in zip(per_step, self.floors, strict=True)]
        self.period = math.lcm(*(rest.denominator for rest in rests))
        self.rests = tuple(int(rest * self.period) for rest in rests)
        """Rows of a period beyond the floors."""
        self.due = sum(self.rests) // self.period
        """Rows of a step beyond the floors."""
        self._starts: list[Counts] = [(0,) * len(self.rests)]
        self._lock = threading.Lock()  # the loop prepares a step while it takes another
        self._block: tuple[int, list[Counts]] = (-1, [])

    def before(self, step: int) -> Counts:
        """Rows of each source in all steps before this one, which counts from 0."""
        periods, at = divmod(step, self.period)
        parts = zip(self.floors, self.rests, self._beyond(at), strict=True)
        return tuple(step * floor + periods * rest + beyond for floor, rest, beyond in parts)

    def _beyond(self, at: int) -> Counts:
        """Rows beyond the floors before a step of the first period."""
        block, place = divmod(at, BLOCK)
        with self._lock:
            for number in range(len(self._starts) - 1, block):
                self._starts.append(self._walked(number)[-1])
            if self._block[0] != block:
                self._block = (block, self._walked(block))
            return self._block[1][place]

    def _walked(self, block: int) -> list[Counts]:
        """Before each step of a block and after its last."""
        counts = [self._starts[block]]
        for step in range(block * BLOCK, min((block + 1) * BLOCK, self.period)):
            chosen = self._chosen(step, counts[-1])
            counts.append(tuple(count + (i in chosen) for i, count in enumerate(counts[-1])))
        return counts

    def _chosen(self, step: int, counts: Counts) -> set[int]:
        """Those whose next row may come by now and is due first. Of equals, first those whose row after it may come in
        the step before it is due, and of these those of which a longer chain of rows would be hurried by waiting.
        """
        D, urgent = self.period, list[tuple[int, bool, int, int]]()
        for i, (rest, count) in enumerate(zip(self.rests, counts, strict=True)):
            if rest and count * D // rest <= step:
                due = _ceil((count + 1) * D, rest)
                hurries_next = (count + 1) * D % rest != 0
                chain = _ceil(_ceil(due * (D - rest), D) * D, D - rest) if 2 * rest >= D else 0
                urgent.append((due, not hurries_next, -chain, i))
        return {i for *_, i in sorted(urgent)[: self.due]}


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


@lru_cache(maxsize=8)
def shares_of(weights: tuple[Fraction, ...], rows_per_step: int) -> Shares:
    """The same object for the same shares: what it has worked out is kept."""
    return Shares(weights, rows_per_step)
