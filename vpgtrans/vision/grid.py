"""Tokens that stand in rows and columns: coarser grids, and where a place is."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vpgtrans.layout import Grid


def fit(grid: Grid, tokens: int, *, most: Grid) -> Grid:
    """The largest grid of the shape of `grid` with at most `tokens` places, no side of it longer than `most`'s.

    Of a square and a square number it is the root; `most` itself where that has few enough places.
    """
    if most[0] * most[1] <= tokens:
        return most
    rows = max(1, min(most[0], math.isqrt(tokens * grid[0] // grid[1]), tokens))
    return rows, max(1, min(most[1], math.isqrt(tokens * grid[1] // grid[0]), tokens // rows))


def average(features: Tensor, grid: Grid) -> Tensor:
    """Features [B, r, c, d] averaged to another grid, [B, *grid, d]; every place averages what it covers."""
    if tuple(features.shape[1:3]) == grid:
        return features
    return F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)


def sincos(like: Tensor, grid: Grid, *, frame: Grid) -> Tensor:
    """Positions [rows * columns, width] of the places of a grid, for tokens `like` [B, N, width].

    A quarter of the channels each are sines and cosines of the row, then of the column, as of a transformer's positions
    (arXiv 1706.03762). A place counts by its centre, in units of `frame`'s places: another grid over the same image
    has its places between those of `frame`. (Qwen-VL interpolates a table to the same end.)
    """
    width = like.shape[-1]
    frequencies = 10000 ** -(torch.arange(width // 4, device=like.device) / (width // 4))
    parts = []
    for axis, shape in ((0, (-1, 1)), (1, (1, -1))):
        centres = (torch.arange(grid[axis], device=like.device) + 0.5) * (frame[axis] / grid[axis]) - 0.5
        angles = centres.view(*shape, 1) * frequencies
        parts += [angles.sin().expand(*grid, -1), angles.cos().expand(*grid, -1)]
    return torch.cat(parts, dim=-1).flatten(0, 1).to(like.dtype)
