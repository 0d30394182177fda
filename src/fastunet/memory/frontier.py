"""Which maps to forget: every choice worth making, between the least memory and the least work.

Kept, a map is there from when it is made until its last reader in backward has read it. Forgotten,
it is there until its last reader in forward, and again from when backward first needs it: for that
map's first reader, or to make another forgotten map. So each forgotten map is made once more, and
the work of a choice is the sum of its maps'; but how long a map is there depends on the others.

A U-Net is solved from the bottom up. To what is above a level, it and what lies below it are a few
numbers: the bytes it keeps; those it makes, and at most holds while making, when its output is
wanted; its own peak; the work. Of two choices, the one that is no better in any of them can be
dropped (Bellman's principle of optimality), so nothing worth having is lost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """Bytes there besides maps: as an operator begins, and the most until the next one does."""

    before: int
    peak: int


@dataclass(frozen=True)
class Map:
    """The output of a convolution.

    cost: of making it again, for which ``temporary`` bytes are needed. forward, backward: of its
    operator. own: whether that backward still reads the map. fixed: it cannot be forgotten.
    """

    name: str
    nbytes: int
    cost: float
    temporary: int
    forward: Slot
    backward: Slot | None
    own: bool
    fixed: bool = False


@dataclass(frozen=True)
class Level:
    """Encoder and decoder block of one resolution, as forward goes; the lowest has no decoder.

    upsampled: made of the output of the level below, where an operator does that. skip_first:
    whether backward reads the encoder's map before that one.
    """

    encoder: Sequence[Map]
    upsampled: Map | None = None
    decoder: Sequence[Map] = ()
    skip_first: bool = True

    @property
    def maps(self) -> list[Map]:
        return [*self.encoder, *([self.upsampled] if self.upsampled else []), *self.decoder]


# What is there of the levels below a moment: nothing; what they keep; also their output; also what
# they make; also what they hold while making it.
NOTHING, KEPT, OUTPUT, MADE, MAKING = range(5)


class Moment(NamedTuple):
    nbytes: int  # besides what is there of the levels below
    below: int


class Walk:
    """One choice for one level: its moments in forward and backward."""

    def __init__(self, level: Level, forgotten: Sequence[Map]) -> None:
        self.level, self.forgotten = level, forgotten
        self.there: set[Map] = set()
        self.below = NOTHING
        self.moments: list[Moment] = []
        self.forward()
        self.there = {m for m in level.maps if m not in forgotten}
        self.below = KEPT if level.decoder else NOTHING
        # What is made where the output is wanted, which is before this level's own backward.
        self.kept = self.nbytes()
        ours, self.moments = self.moments, []
        self.need((level.decoder or level.encoder)[-1], 0)
        self.making = [Moment(m.nbytes - self.kept, m.below) for m in self.moments]
        self.made = Moment(self.nbytes() - self.kept, self.below)
        self.moments = ours
        self.backward()

    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.there)

    def at(self, nbytes: int) -> None:
        self.moments.append(Moment(nbytes + self.nbytes(), self.below))

    def forward(self) -> None:
        level = self.level
        self.make(level.encoder)
        self.below = OUTPUT
        if level.upsampled:
            self.make([level.upsampled])
        self.make(level.decoder)

    def make(self, chain: Sequence[Map]) -> None:
        """Each of the one before it, which is forgotten then."""
        for m, before in zip(chain, [None, *chain], strict=False):
            self.there.add(m)
            self.at(m.forward.peak)
            if before in self.forgotten:
                self.there.discard(before)

    def sources(self, m: Map) -> list[Map | None]:
        """None is the output of the level below."""
        level = self.level
        if m is level.upsampled:
            return [None]
        if m in level.encoder:
            i = level.encoder.index(m)
            return [level.encoder[i - 1]] if i else []
        if i := level.decoder.index(m):
            return [level.decoder[i - 1]]
        pair = [level.encoder[-1], level.upsampled]
        return pair if level.skip_first else pair[::-1]

    def need(self, m: Map | None, before: int) -> None:
        """Backward reads a map, which is made unless it is there."""
        if m is None:
            if self.below == KEPT:
                self.below = MAKING
                self.at(before)
                self.below = MADE
        elif m not in self.there:
            for source in self.sources(m):
                self.need(source, before)
            self.there.add(m)
            self.at(before + m.temporary)

    def read(self, m: Map) -> None:
        """The backward of the operator that made m."""
        if not m.own:
            self.there.discard(m)
        if m.backward is not None:
            for source in self.sources(m):
                self.need(source, m.backward.before)
            self.at(m.backward.peak)
        self.there.discard(m)

    def backward(self) -> None:
        level = self.level
        for m in reversed(level.decoder):
            self.read(m)
        if level.upsampled:
            self.read(level.upsampled)
        self.while_below = self.nbytes()
        self.below = NOTHING
        for m in reversed(level.encoder):
            self.read(m)


class Choices(NamedTuple):
    """A row for each choice for a level and those below it; the columns' numbers in bytes.

    made, making, output: where the output is wanted; 0 where it is kept. peak: without what is
    above. chosen: a bit for each map that is forgotten.
    """

    kept: Tensor
    made: Tensor
    making: Tensor
    output: Tensor
    peak: Tensor
    cost: Tensor
    chosen: Tensor

    def besides_kept(self, below: int) -> Tensor:
        """What is there at a moment, without the bytes kept."""
        columns = {OUTPUT: self.output, MADE: self.made, MAKING: self.making}
        return columns.get(below, torch.zeros_like(self.kept))

    def there(self, moments: Sequence[Moment]) -> Tensor:
        """The most over these moments."""
        most = torch.zeros_like(self.kept)
        for below in {m.below for m in moments}:
            nbytes = max(m.nbytes for m in moments if m.below == below)
            also = self.besides_kept(below) + nbytes
            most = torch.maximum(most, also if below == NOTHING else also + self.kept)
        return most

    def best(self) -> "Choices":
        """Without the rows that are no better than another one in any number."""
        order = torch.arange(len(self.cost))
        for number in self[-2::-1]:
            order = order[torch.argsort(number[order], stable=True)]
        # Now a row can be no better than earlier ones alone. Ranks compare faster than numbers.
        ranks = (torch.unique(number, return_inverse=True)[1] for number in self[:-1])
        rows = torch.stack([rank.int() for rank in ranks])[:, order]
        better: list[Tensor] = []
        found = []
        for chunk, of in zip(rows.split(CHUNK, 1), order.split(CHUNK), strict=True):
            for others in better:
                alive = ~no_better(chunk, others).any(1)
                chunk, of = chunk[:, alive], of[alive]
            alive = ~no_better(chunk, chunk).tril(-1).any(1)
            better.append(chunk[:, alive])
            found.append(of[alive])
        kept = torch.cat(found)
        return Choices(*(column[kept] for column in self))


CHUNK = 512  # rows compared at a time: the comparisons stay in the cache


def no_better(rows: Tensor, than: Tensor) -> Tensor:
    """[row, other row]: whether the other one is as good in every number."""
    found = torch.ones((rows.size(1), than.size(1)), dtype=torch.bool)
    for number, others in zip(rows, than, strict=True):
        found &= others <= number[:, None]
    return found


def nothing_below() -> Choices:
    zero = torch.zeros(1, dtype=torch.float64)
    return Choices(zero, zero, zero, zero, zero, zero, torch.zeros(1, dtype=torch.int64))


def subsets(maps: Sequence[Map]) -> Iterator[tuple[Map, ...]]:
    for count in range(len(maps) + 1):
        yield from combinations(maps, count)


def extend(
    level: Level, below: Choices, first_bit: int, forgotten: Sequence[str] | None = None
) -> Choices:
    """The choices for a level and those below it; forgotten: for this choice alone."""
    maps = [m for m in level.maps if not m.fixed]
    bits = {m: first_bit + i for i, m in enumerate(maps)}
    every = subsets(maps) if forgotten is None else [[m for m in maps if m.name in forgotten]]
    found = []
    for choice in every:
        walk = Walk(level, choice)
        output = (level.decoder or level.encoder)[-1]
        peak = below.there(walk.moments)
        if level.decoder:
            peak = torch.maximum(peak, below.peak + walk.while_below)
        zero = torch.zeros_like(below.kept)
        making = zero
        for moment in walk.making:
            making = torch.maximum(making, below.besides_kept(moment.below) + moment.nbytes)
        found.append(
            Choices(
                below.kept + walk.kept,
                below.besides_kept(walk.made.below) + walk.made.nbytes,
                making,
                zero + (output.nbytes if output in choice else 0),
                peak,
                below.cost + sum(m.cost for m in choice),
                below.chosen | sum(1 << bits[m] for m in choice),
            )
        )
    return Choices(*(torch.cat(columns) for columns in zip(*found, strict=True)))


class Choice(NamedTuple):
    """peak: bytes; cost: work that is done again; forgotten: names of maps."""

    peak: int
    cost: float
    forgotten: tuple[str, ...]


def frontier(
    levels: Sequence[Level], head: Sequence[Slot], forgotten: Sequence[str] | None = None
) -> list[Choice]:
    """The choices from the cheapest to the one with the least peak.

    Args:
        levels: from the first to the lowest.
        head: the slots of the forward and the backward of what reads the last map.
        forgotten: only this choice.
    """
    names: list[str] = []
    choices = nothing_below()
    for level in reversed(levels):
        choices = extend(level, choices.best(), len(names), forgotten)
        names += [m.name for m in level.maps if not m.fixed]
    assert len(names) < 64, "a bit for each map"
    forward, backward = head
    moments = [Moment(forward.peak, OUTPUT), Moment(backward.before, MAKING)]
    moments.append(Moment(backward.peak, MADE))
    peak = torch.maximum(choices.peak, choices.there(moments))
    found: list[Choice] = []
    for i in torch.argsort(choices.cost, stable=True).tolist():
        if found and peak[i] >= found[-1].peak:
            continue
        bits = int(choices.chosen[i])
        chosen = tuple(name for j, name in enumerate(names) if bits >> j & 1)
        if found and choices.cost[i] == found[-1].cost:
            found.pop()
        found.append(Choice(int(peak[i]), float(choices.cost[i]), chosen))
    return found
