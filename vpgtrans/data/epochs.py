"""Draws that go through one epoch after another, each in an order of its own."""

from collections.abc import Callable

import numpy as np


def over_epochs(order: Callable[[int], np.ndarray], length: int, start: int, stop: int) -> np.ndarray:
    """Draws number `start` to `stop`, int64 [stop - start].

    order: epoch -> what is drawn in it, int64 [length].
    """
    pieces = [np.empty(0, dtype=np.int64)]
    while start < stop:
        epoch, offset = divmod(start, length)
        piece = order(epoch)[offset : offset + stop - start]
        pieces.append(piece)
        start += len(piece)
    return np.concatenate(pieces)
