"""Where samples stand among the tokens of a batch, for `isolation`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

ALIKE = 0.8
"""Samples whose lengths are within this factor are padded to one length, inside attention alone."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Where samples stand among the tokens [B, L] of a batch, and what in them sees in both directions.

    Attributes:
        shape: (B, L). starts, lengths: of each sample, starts counted over the flattened batch (row · L + place).
        spans: (start, stop) of each image's visual tokens, counted likewise, if they see each other in both directions
            (as in Gemma 3, arXiv 2503.19786); else empty.
    """

    shape: tuple[int, int]
    starts: Sequence[int]
    lengths: Sequence[int]
    spans: Sequence[tuple[int, int]] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def in_a_row(
        cls, lengths: Sequence[int], *, spans: Sequence[tuple[int, int]] = (), device: torch.device | str = "cpu"
    ) -> "Segments":
        """Samples that share one row, one after another."""
        starts = [0, *accumulate(lengths)]
        return cls((1, starts[-1]), starts[:-1], lengths, spans, torch.device(device))

    def repeated(self, times: int) -> "Segments":
        """Of a batch in which each row of this one comes several times running."""
        rows, width = self.shape

        def again(place: int) -> list[int]:
            first = place + place // width * width * (times - 1)
            return [first + copy * width for copy in range(times)]

        return Segments(
            (rows * times, width),
            [place for start in self.starts for place in again(start)],
            [length for length in self.lengths for _ in range(times)],
            [(place, place + stop - start) for start, stop in self.spans for place in again(start)],
            self.device,
        )

    @cached_property
    def positions(self) -> Tensor:
        """Of each token in its sample, int64 [B, L]; 0 outside of samples."""
        positions = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.long)
        for start, length in zip(self.starts, self.lengths, strict=True):
            positions[start : start + length] = torch.arange(length)
        return positions.view(self.shape).to(self.device)

    @cached_property
    def borders(self) -> Tensor:
        """Where samples begin and the last one ends, int32 [n + 1]; of samples that follow each other closely."""
        return torch.tensor([*self.starts, self.starts[-1] + self.lengths[-1]], dtype=torch.int32, device=self.device)

    @cached_property
    def groups(self) -> list["_Group"]:
        """Samples of like length, padded to the longest of them on the right, where a causal mask hides it."""
        order = sorted(range(len(self.starts)), key=lambda sample: -self.lengths[sample])
        groups: list[list[int]] = []
        for sample in order:
            if not groups or self.lengths[sample] < ALIKE * self.lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(sample)
        return [self._group(samples) for samples in groups]

    def _group(self, samples: list[int]) -> "_Group":
        length = self.lengths[samples[0]]
        starts = torch.tensor([self.starts[sample] for sample in samples])
        lengths = torch.tensor([self.lengths[sample] for sample in samples])
        places = torch.arange(length)
        real = places < lengths[:, None]
        index = torch.where(real, starts[:, None] + places, starts[:, None])
        images: Tensor | None = None
        if self.spans:
            of = torch.full((self.shape[0] * self.shape[1],), -1)
            for image, (start, stop) in enumerate(self.spans):
                of[start:stop] = image
            seen = torch.where(real, of[index], -1)
            images = ((seen[:, :, None] == seen[:, None, :]) & (seen >= 0)[:, :, None])[:, None].to(self.device)
        return _Group(index.to(self.device), real.to(self.device), images)

    @cached_property
    def back(self) -> Tensor:
        """Where each token of the batch, in order, is among the groups' padded tokens laid end to end; int64 [B · L].

        Tokens outside of samples take the place after the last.
        """
        sizes = [group.index.numel() for group in self.groups]
        back = torch.full((self.shape[0] * self.shape[1],), sum(sizes), device=self.device)
        for group, first in zip(self.groups, [0, *accumulate(sizes)][: len(sizes)], strict=True):
            there = torch.arange(group.index.numel(), device=self.device).view(group.index.shape) + first
            back[group.index[group.real]] = there[group.real]
        return back

    @property
    def whole(self) -> bool:
        """Whether every token of the batch is in a sample."""
        return sum(self.lengths) == self.shape[0] * self.shape[1]


@dataclass(frozen=True, eq=False)
class _Group:
    """k samples of like length: index [k, l] into the flattened batch, real [k, l], images [k, 1, l, l] or None."""

    index: Tensor
    real: Tensor
    images: Tensor | None

    def mask(self, window: int | None) -> Tensor | None:
        """What sees what, bool [k or 1, 1, l, l]; None where it is causal and no more."""
        length = self.index.shape[1]
        if self.images is None and (window is None or window >= length):
            return None
        place = torch.arange(length, device=self.index.device)
        behind = place[:, None] - place
        seen = (behind >= 0) & (behind < (window or length))
        return seen[None, None] if self.images is None else seen | self.images
