"""The search behind `packing.pack`: samples dealt to as few packs as there could be, then swapped until they fit.

First-fit decreasing fills a pack as long as something fits, so its last tokens stay empty where the shortest sample is
long (576 visual tokens before any text). Here the number of packs comes first: `deal` spreads the samples so that all
packs are about as full, and `Swaps` exchanges samples between a pack that is too full and one that is not, until both
fit. What still does not fit gets packs of its own.

Many samples are packed a part at a time. Sorted by length, every n-th sample is a smaller set of nearly the same
lengths, and a packing of the longest of each n neighbours holds for all n. That wastes some n/2 times the largest
length, whatever the number of samples, and the search costs the same for a million samples as for ten thousands.
"""

from dataclasses import dataclass

import numpy as np

PACKS = 6000
"""That the search works on at once, up to twice as many: a rounding to whole packs costs less than 0.02 %."""
ROUNDS = 600
WARM = 6
"""Rounds of random pairs before looked-up ones: while half the packs are too full, any partner helps."""
KICK = 15
"""Rounds between two moves that make another pack too full: what single swaps can't repair, two can."""
SLOTS = 8
"""Of a pack that one round looks at: 64 swaps a pair."""
TRIED = 16
"""Partners that one round tries for a slot."""
_NEVER = 1 << 60


@dataclass(frozen=True)
class Limits:
    """What a pack may hold."""

    tokens: int
    images: int
    samples: int


@dataclass
class Items:
    """Samples by decreasing length, int64 [n] each; those of equal length by decreasing images, then by index."""

    index: np.ndarray
    tokens: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def take(self, places: np.ndarray) -> "Items":
        return Items(self.index[places], self.tokens[places], self.images[places])


def sort_items(index: np.ndarray, tokens: np.ndarray, images: np.ndarray) -> Items:
    key = tokens.max(initial=0) - tokens
    if images.any():
        key = key * (int(images.max()) + 1) + (images.max() - images)
    order = _argsort(key)
    return Items(index[order], tokens[order], images[order])


def _argsort(keys: np.ndarray) -> np.ndarray:
    """The stable order of numbers from 0 on: by radix where 16 bits hold them, which is six times as fast."""
    return np.argsort(keys.astype(np.uint16) if keys.max(initial=0) < 1 << 16 else keys, kind="stable")


# --- how few packs there can be -----------------------------------------------------------------


def lower_bound(items: Items, limits: Limits) -> int:
    """A number of packs that no packing can go below.

    The largest of: the sums over the limits; L2 of Martello and Toth (samples above half a pack each need their own,
    and only so much of the rest fits beside them); the dual feasible functions of Fekete and Schepers (how many samples
    of this length fit a pack at all).
    """
    if not len(items):
        return 0
    bound = max(_up(int(items.images.sum()), limits.images), _up(len(items), limits.samples))
    lengths, counts = np.unique(items.tokens, return_counts=True)
    return max(bound, _up(int(items.tokens.sum()), limits.tokens), _l2(lengths, counts, limits.tokens),
               _dual(lengths, counts, limits.tokens))  # fmt: skip


def _up(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _l2(lengths: np.ndarray, counts: np.ndarray, capacity: int) -> int:
    number = np.append(0, np.cumsum(counts))
    total = np.append(0, np.cumsum(counts * lengths))
    half = np.searchsorted(lengths, capacity // 2, side="right")
    small = np.arange(half)  # each length up to half a pack as the smallest one that counts
    large = np.searchsorted(lengths, capacity - lengths[:half], side="right")
    # Beside the lengths from half to `large` a small sample may fit; beside longer ones none does.
    room = (number[large] - number[half]) * capacity - (total[large] - total[half])
    rest = np.maximum(0, total[half] - total[small] - room)
    own = number[-1] - number[half]
    return int(max(own, (own + -(-rest // capacity)).max(initial=0)))


def _dual(lengths: np.ndarray, counts: np.ndarray, capacity: int) -> int:
    best = 0
    for k in range(1, 21):
        scaled = (k + 1) * lengths
        weight = np.where(scaled % capacity == 0, k * lengths, scaled // capacity * capacity)  # over k * capacity
        best = max(best, _up(int((weight * counts).sum()), k * capacity))
    return best


# --- first-fit decreasing, by length ------------------------------------------------------------


def first_fit(items: Items, limits: Limits) -> np.ndarray:
    """The pack of each item by first-fit decreasing, int64 [n].

    Equal samples are placed at once: packs that are alike and neighbours are one run (room, number), and a class of
    samples splits at most one run. So it costs classes x runs, whatever the number of samples.
    """
    if not len(items):
        return np.empty(0, dtype=np.int64)
    starts = np.flatnonzero(np.append(True, (np.diff(items.tokens) != 0) | (np.diff(items.images) != 0)))
    counts = np.diff(np.append(starts, len(items)))
    smallest = int(items.tokens[-1])
    runs = np.empty((4, 0), dtype=np.int64)  # room for tokens, images and samples, and number of packs
    first = np.empty(0, dtype=np.int64)  # the first pack of each run
    packs = 0
    result = np.empty(len(items), dtype=np.int64)
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        tokens, images = int(items.tokens[start]), int(items.images[start])
        new = np.array([limits.tokens, limits.images, limits.samples, count])
        runs = np.concatenate([runs, new[:, None]], axis=1)
        first = np.append(first, packs)
        each = np.minimum(runs[0] // tokens, runs[2])
        if images:
            np.minimum(each, runs[1] // images, out=each)
        upto = np.cumsum(each * runs[3])
        last = int(np.searchsorted(upto, count))  # the run where the class ends
        before = int(upto[last - 1]) if last else 0
        whole, part = divmod(count - before, int(each[last]))
        placed = np.repeat(first[:last], runs[3, :last]) + _steps(runs[3, :last])
        numbers = np.repeat(placed, np.repeat(each[:last], runs[3, :last]))
        ends = first[last] + np.append(np.repeat(np.arange(whole), each[last]), np.repeat(whole, part))
        result[start : start + count] = np.concatenate([numbers, ends])
        use = np.array([tokens, images, 1])
        split = np.stack([runs[:, last]] * 3, axis=1)
        split[:3, 0] -= use * each[last]
        split[:3, 1] -= use * part
        is_new = last == runs.shape[1] - 1
        split[3] = whole, int(part > 0), 0 if is_new else runs[3, last] - whole - (part > 0)
        if is_new:
            packs += whole + (part > 0)
        runs[:3, :last] -= use[:, None] * each[:last]
        starts_of = first[last] + np.array([0, whole, whole + (part > 0)])
        stop = last + 1 if not is_new else runs.shape[1]
        after = slice(stop, runs.shape[1] - 1)  # the run of new packs goes, where it was not needed
        runs = np.concatenate([runs[:, :last], split, runs[:, after]], axis=1)
        first = np.concatenate([first[:last], starts_of, first[after]])
        kept = (runs[3] > 0) & (runs[0] >= smallest) & (runs[2] > 0)
        runs, first = runs[:, kept], first[kept]
    return result


def _steps(counts: np.ndarray) -> np.ndarray:
    """0 .. c-1 for each count c, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


# --- deal and swap ------------------------------------------------------------------------------


def deal(items: Items, limits: Limits, packs: int) -> np.ndarray:
    """A pack for each item, int64 [n]: the longest item that is left to the emptiest pack; only samples are limited.

    All packs that would get one before any gets a second get theirs at once.
    """
    load, held = np.zeros((2, packs), dtype=np.int64)
    result = np.empty(len(items), dtype=np.int64)
    position = 0
    while position < len(items):
        chosen = np.flatnonzero(held < limits.samples)
        loads = load[chosen]
        loads -= loads.min()
        near = loads < items.tokens[position]
        chosen, loads = chosen[near], loads[near]
        chosen = chosen[_argsort(loads)][: len(items) - position]
        stop = position + len(chosen)
        result[position:stop] = chosen
        load[chosen] += items.tokens[position:stop]
        held[chosen] += 1
        position = stop
    return result


class Swaps:
    """Packs whose samples are swapped. Each has a blank beside its samples, where one more is allowed, so that a sample
    can also move.
    """

    def __init__(self, items: Items, packs: np.ndarray, count: int, limits: Limits):
        """`packs`: int64 [n], the pack of each item."""
        held = np.bincount(packs, minlength=count)
        self.limits = limits
        self.size = held + (held < limits.samples)
        self.start = np.cumsum(self.size) - self.size
        self.blank = len(items)
        self.slots = np.full(int(self.size.sum()), self.blank)
        """The item in each slot, pack after pack."""
        self.slots[np.repeat(self.start, held) + _steps(held)] = _argsort(packs)
        self.tokens_of = np.append(items.tokens, 0)
        self.images_of = np.append(items.images, 0)
        self.load = np.bincount(packs, items.tokens, count).astype(np.int64)
        self.images = np.bincount(packs, items.images, count).astype(np.int64)
        self.limits_images = int(items.images.sum()) > limits.images
        self._generator = np.random.Generator(np.random.PCG64(0))

    def repair(self) -> None:
        """Swap until no pack is too full, or `ROUNDS` are over."""
        for number in range(ROUNDS):
            over = np.flatnonzero(self._excess() > 0)
            under = np.flatnonzero((self.load < self.limits.tokens) & (self.images <= self.limits.images))
            if not len(over) or not len(under):
                return
            if number > 2 * KICK and number % KICK == KICK - 1 and number < ROUNDS - KICK:
                self._kick(over, under)
            elif number < WARM or number % 4 == 0:
                self._swap_pairs(over, under)
            else:
                self._swap_looked_up(over, under)

    def take_out(self) -> None:
        """Take samples out of packs until none is too full."""
        while len(over := np.flatnonzero(self._excess() > 0)):
            slots = self._smallest_that_helps(over)
            self._move(slots, over, -1)
            self.slots[slots] = self.blank

    def packs(self) -> np.ndarray:
        """The pack of each item, int64 [n]; -1 where it was taken out."""
        result = np.full(self.blank + 1, -1)
        result[self.slots] = np.repeat(np.arange(len(self.size)), self.size)
        return result[:-1]

    def _excess(self) -> np.ndarray:
        """By how many tokens packs are too full; an image too many counts as its share of a pack."""
        tokens = np.maximum(self.load - self.limits.tokens, 0)
        if self.limits_images:
            tokens += np.maximum(self.images - self.limits.images, 0) * self._image_weight
        return tokens

    @property
    def _image_weight(self) -> int:
        return max(1, self.limits.tokens // self.limits.images)

    def _swap_pairs(self, over: np.ndarray, under: np.ndarray) -> None:
        """Each pack that is too full with one of those with the most room: the best of 64 swaps."""
        pairs = min(len(over), len(under))
        over = self._generator.permutation(over)[:pairs]
        under = self._generator.permutation(under[np.argsort(self.load[under], kind="stable")[:pairs]])
        slot_a, slot_b = self._some_slots(over), self._some_slots(under)
        tokens = self._difference(self.tokens_of, slot_a, slot_b)
        excess = (self.load[over] - self.limits.tokens)[:, None, None] - tokens
        wrong = np.maximum(excess, 0)
        wrong += np.maximum((self.load[under] - self.limits.tokens)[:, None, None] + tokens, 0)
        if self.limits_images:
            images = self._difference(self.images_of, slot_a, slot_b)
            many = np.maximum((self.images[over] - self.limits.images)[:, None, None] - images, 0)
            many += np.maximum((self.images[under] - self.limits.images)[:, None, None] + images, 0)
            wrong += many * self._image_weight
        # Of swaps that are as good, the one after which the fuller pack is just full: the other keeps its room.
        best = (wrong * 4 + np.abs(excess)).reshape(pairs, -1).argmin(axis=1)
        row = np.arange(pairs)
        good = wrong.reshape(pairs, -1)[row, best] < self._excess()[over]
        row, best = row[good], best[good]
        self._exchange(slot_a[row, best // SLOTS], slot_b[row, best % SLOTS], over[row], under[row])

    def _swap_looked_up(self, over: np.ndarray, under: np.ndarray) -> None:
        """Each pack that is too full with one that holds a sample shorter by what is too much, and has room for it."""
        excess = self.load[over] - self.limits.tokens
        bar = int(np.quantile(excess, self._generator.random()))
        over = over[(excess <= bar) & (excess > 0)]
        under = under[self.limits.tokens - self.load[under] >= bar]
        if not len(over) or not len(under):
            return
        size = self.size[under]
        slots = self._all_slots(under)
        order = _argsort(self.tokens_of[self.slots[slots]])
        slots, owner = slots[order], np.repeat(under, size)[order]
        tokens = self.tokens_of[self.slots[slots]]
        own = self._some_slots(over)
        own_tokens = self.tokens_of[self.slots[own]]
        excess = (self.load[over] - self.limits.tokens)[:, None]
        # The candidates are the ones just below the wanted length.
        place = np.searchsorted(tokens, own_tokens - excess, side="right")[:, :, None] - 1 - np.arange(TRIED)
        fits = place >= 0
        place = place.clip(0)
        moved = own_tokens[:, :, None] - tokens[place]
        fits &= (moved >= excess[:, :, None]) & (moved <= (self.limits.tokens - self.load[owner])[place])
        if self.limits_images:
            images = self.images_of[self.slots[own]][:, :, None] - self.images_of[self.slots[slots]][place]
            fits &= (images <= (self.limits.images - self.images[owner])[place]) & (
                self.images[over][:, None, None] - images <= self.limits.images
            )
        cost = np.where(fits, moved, _NEVER).reshape(len(over), -1)
        best = cost.argmin(axis=1)
        row = np.flatnonzero(cost[np.arange(len(over)), best] < _NEVER)
        partner = place.reshape(len(over), -1)[row, best[row]]
        once = np.unique(owner[partner], return_index=True)[1]  # a pack swaps once a round
        row, partner = row[once], partner[once]
        self._exchange(own[row, best[row] // TRIED], slots[partner], over[row], owner[partner])

    def _kick(self, over: np.ndarray, under: np.ndarray) -> None:
        """Packs that are too full give a sample to those with the most room, which become too full."""
        blanks = self._blanks()
        under = under[blanks[under] >= 0]
        under = under[np.argsort(self.load[under], kind="stable")[: len(over)]]
        over = over[: len(under)]
        if len(over):
            self._exchange(self._smallest_that_helps(over), blanks[under], over, under)

    def _exchange(self, slot_a: np.ndarray, slot_b: np.ndarray, pack_a: np.ndarray, pack_b: np.ndarray) -> None:
        """Swap slots of packs, each [k]; no pack is named twice."""
        for slot, pack in ((slot_a, pack_a), (slot_b, pack_b)):
            self._move(slot, pack, -1)
        self.slots[slot_a], self.slots[slot_b] = self.slots[slot_b], self.slots[slot_a]
        for slot, pack in ((slot_a, pack_a), (slot_b, pack_b)):
            self._move(slot, pack, 1)

    def _move(self, slots: np.ndarray, packs: np.ndarray, sign: int) -> None:
        self.load[packs] += sign * self.tokens_of[self.slots[slots]]
        self.images[packs] += sign * self.images_of[self.slots[slots]]

    def _difference(self, values: np.ndarray, slot_a: np.ndarray, slot_b: np.ndarray) -> np.ndarray:
        """What each swap takes from the first pack, int64 [pairs, SLOTS, SLOTS]."""
        return values[self.slots[slot_a]][:, :, None] - values[self.slots[slot_b]][:, None, :]

    def _some_slots(self, packs: np.ndarray) -> np.ndarray:
        """Slots of packs, spread over each, int64 [packs, SLOTS]; some twice where it has fewer."""
        size = self.size[packs][:, None]
        first = self._generator.integers(0, 1 << 20, size=(len(packs), 1))
        return self.start[packs][:, None] + (first + np.arange(SLOTS) * np.maximum(1, size // SLOTS)) % size

    def _smallest_that_helps(self, packs: np.ndarray) -> np.ndarray:
        """A slot of each pack, int64 [k]: its shortest sample without which it fits, else its longest."""
        size = self.size[packs]
        slots = self._all_slots(packs)
        tokens = self.tokens_of[self.slots[slots]]
        helps = tokens >= np.repeat(self._excess()[packs], size)
        rank = np.where(helps, tokens, _NEVER - tokens)
        if self.limits_images:
            images = self.images_of[self.slots[slots]]
            many = np.repeat(self.images[packs] - self.limits.images, size)
            rank = np.where(many > 0, np.where(images >= many, tokens, _NEVER - images), rank)
        rank[self.slots[slots] == self.blank] = 2 * _NEVER
        first = np.minimum.reduceat(rank, np.cumsum(size) - size)
        found = np.flatnonzero(rank == np.repeat(first, size))
        return slots[found[np.unique(np.repeat(np.arange(len(packs)), size)[found], return_index=True)[1]]]

    def _blanks(self) -> np.ndarray:
        """A blank slot of each pack, int64 [packs]; -1 where it has none."""
        result = np.full(len(self.size), -1)
        blanks = np.flatnonzero(self.slots == self.blank)
        result[np.searchsorted(self.start, blanks, side="right") - 1] = blanks
        return result

    def _all_slots(self, packs: np.ndarray) -> np.ndarray:
        size = self.size[packs]
        return np.repeat(self.start[packs], size) + _steps(size)


def search(items: Items, limits: Limits) -> np.ndarray:
    """The pack of each item, int64 [n]. Never more packs than first-fit decreasing makes."""
    bound = lower_bound(items, limits)
    best = _dealt(items, limits, bound)
    if best.max(initial=-1) + 1 > bound:
        best = min(best, first_fit(items, limits), key=lambda packs: int(packs.max()))
    return best


def _dealt(items: Items, limits: Limits, bound: int) -> np.ndarray:
    """The pack of each item, int64 [n], by dealing and swapping every n-th item."""
    number = max(1, bound // PACKS)
    first = np.arange(0, len(items), number)
    part = items.take(first)
    if len(items):
        part.images = np.maximum.reduceat(items.images, first)
    # No pack more than the bound: what does not fit gets packs of its own, and spare room in all packs would cost more.
    packs = lower_bound(part, limits)
    swaps = Swaps(part, deal(part, limits, packs), packs, limits)
    swaps.repair()
    swaps.take_out()
    best = swaps.packs()
    # The i-th of each n neighbours goes to the i-th copy of the pack.
    copies = np.repeat(best, number)[: len(items)]
    result = np.where(copies < 0, -1, copies * number + np.arange(len(items)) % number)
    used, result = np.unique(result, return_inverse=True)  # the last copies of a pack may have stayed empty
    if len(used) and used[0] < 0:
        rest = np.flatnonzero(result == 0)
        result -= 1
        result[rest] = len(used) - 1 + first_fit(items.take(rest), limits)
    return result
