"""The search: doubling, then bisection, as ask and tell; a memory model may advise the next size, the search decides.

    search = Search(space, advisor)
    while (size := search.ask()) is not None:
        search.tell(size, fits(size))

The guarantee does not depend on the advice. A size the advisor hints at is a *hinted* probe, any other a *plain* one. A hinted probe
has to earn its place: unless it halved the bracket or doubled the best, the next probe is plain. So two probes in a row always halve
the bracket or double the best, and a search ends within ``4·log2(limit) + 4`` probes. A search that expects something may begin with a
hint as well; where that does not fit, it goes on from the smallest size.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from autobatch.core.records import SearchSpace


class Ending(Enum):
    """What ended a search."""

    PROBED_WALL = "probed wall"  # a size within the tolerance of the best was run and did not fit
    PREDICTED_WALL = "predicted wall"  # a confirmed memory model puts the wall within the tolerance
    LIMIT = "limit"  # the largest permitted size fits
    NOTHING_FITS = "nothing fits"


class Advisor(Protocol):
    """What a search may ask; the answers may be wrong, or hostile, and cost probes at the most."""

    def start(self, last: int) -> int | None:
        """Return the batch size to begin with, at most ``last``, ``None`` for no advice."""

    def suggest(self, best: int, wall: int | None) -> int | None:
        """Return the batch size to try next, ``None`` for no advice."""

    def confirmed_limit(self, best: int) -> int | None:
        """Return the largest batch size that can fit, ``None`` unless a measurement close to it has confirmed that."""


class Search:
    """A search for the largest batch size of ``space`` that fits.

    Attributes:
        best: largest size that was told to fit.
        wall: smallest size that was told not to fit.
    """

    def __init__(self, space: SearchSpace, advisor: Advisor | None = None) -> None:
        self._space, self._advisor = space, advisor
        self._fitted: list[int] = []
        self._pending: int | None = None
        self._owes_plain = False
        self._rejected = self._retreats = False
        self.best: int | None = None
        self.wall: int | None = None

    @property
    def ending(self) -> Ending | None:
        """What ended the search, ``None`` while it goes on."""
        space = self._space
        if self.best is None:
            return Ending.NOTHING_FITS if self.wall is not None and self.wall <= space.first else None
        if self.best == space.last:
            return Ending.LIMIT
        if self.wall is not None and self._proves(self.wall - space.multiple_of):
            return Ending.PROBED_WALL
        return None if self.predicted_wall is None else Ending.PREDICTED_WALL

    @property
    def predicted_wall(self) -> int | None:
        """The smallest permitted size that a confirmed memory model says cannot fit, where the best is within the tolerance of it."""
        space = self._space
        if self._advisor is None or self.best is None or space.tolerance == 0 or self._rejected:
            return None
        limit = self._advisor.confirmed_limit(self.best)
        if limit is None or not self._proves(limit):
            return None
        return max(limit // space.multiple_of, self.best // space.multiple_of) * space.multiple_of + space.multiple_of

    @property
    def exact(self) -> bool:
        """Whether the next permitted size above the best is known not to fit, or not permitted."""
        return self.best is not None and (self.best == self._space.last or self.wall == self.best + self._space.multiple_of)

    @property
    def next_untested(self) -> int | None:
        """The smallest permitted size above the best whose fate is not known, ``None`` when there is none."""
        return None if self.best is None or self.exact else self.best + self._space.multiple_of

    def ask(self) -> int | None:
        """Return the size to run next, ``None`` when the search has ended; asking again before telling gives the same size."""
        if self._pending is None and self.ending is None:
            hint = None if self._owes_plain else self._retreat() if self._rejected else self._hint()
            self._owes_plain = self._retreats = False
            self._pending = self._plain() if hint is None else hint
            self._pending_is_hint = hint is not None
        return self._pending

    def tell(self, batch_size: int, fits: bool) -> None:
        """Take in whether ``batch_size``, the size last asked, fits.

        Raises:
            ValueError: another size was asked.
        """
        if batch_size != self._pending:
            raise ValueError(f"told about batch size {batch_size}, but {self._pending} was asked")
        best, width = self.best, self._width()
        self._pending = None
        if fits:
            self._fitted.append(batch_size)
            self.best = batch_size
        else:
            self.wall = batch_size
        if self._pending_is_hint:
            doubled = fits and (best is None or batch_size >= 2 * best)
            self._owes_plain = not doubled and 2 * self._width() > width

    def reject(self, batch_size: int, *, barely: bool = False) -> None:
        """Take back that ``batch_size`` fits: a longer trial of it failed, so it is the wall, and advice that led to it is void.

        ``barely`` says that it may have been a little too large only: the next probe is then just far enough below it to end the search.
        """
        self._pending, self._rejected, self._retreats = None, True, barely
        self._fitted = [size for size in self._fitted if size < batch_size]
        self.best = max(self._fitted, default=None)
        self.wall = batch_size

    def _proves(self, limit: int) -> bool:
        """Whether the best is within the tolerance of ``limit``, the largest size that can fit."""
        return self.best is not None and self.best >= limit * (1 - self._space.tolerance)

    def _width(self) -> int:
        """Return how many permitted sizes are left to decide."""
        top = self._space.last if self.wall is None else self.wall - self._space.multiple_of
        bottom = self._space.first - self._space.multiple_of if self.best is None else self.best
        return (top - bottom) // self._space.multiple_of

    def _hint(self) -> int | None:
        """Return the advisor's size as a permitted one inside the bracket, ``None`` when there is none."""
        space = self._space
        if self._advisor is None:
            return None
        multiple = space.multiple_of
        if self.best is None:
            begin = self._advisor.start(space.last) if self.wall is None else None
            return None if begin is None else min(max(begin // multiple * multiple, space.first), space.last)
        suggested = self._advisor.suggest(self.best, self.wall)
        if suggested is None:
            return None
        top = space.last if self.wall is None else self.wall - multiple
        return min(max(suggested // multiple * multiple, self.best + multiple), top)

    def _retreat(self) -> int | None:
        """Return a size half the tolerance below a wall that has just come closer, ``None`` when there is no room or no such wall."""
        if not self._retreats or self.wall is None or self.best is None:
            return None
        size = int(self.wall * (1 - self._space.tolerance / 2)) // self._space.multiple_of * self._space.multiple_of
        return size if self.best < size < self.wall else None

    def _plain(self) -> int:
        """Return the first size, twice the best while nothing has failed, then the middle of the bracket."""
        space = self._space
        if self.best is None:
            return space.first
        if self.wall is None:
            return min(2 * self.best, space.last)
        return self.best + (self._width() + 1) // 2 * space.multiple_of
