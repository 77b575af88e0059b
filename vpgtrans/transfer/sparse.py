"""Sparse codes over shared tokens: a vector as a few source words, rebuilt from the same words of the target.

Orthogonal matching pursuit (as mergekit's tokensurgeon uses for vocabularies, and LangBridge's idea for visual tokens).
It is not linear, so for a projector it is distilled: code the projector's outputs, then fit a linear map to the codes'
reconstructions.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from vpgtrans.transfer.converters import AffineConverter, Moments, Rows, affine, moments, rms_scale

log = logging.getLogger(__name__)

DICTIONARY_CAP = 16_384
"""Words of the dictionary used for distilling; the first ones, which are the frequent ones."""

ANCHOR_CAP = 1024
"""Vectors coded for distilling."""


@dataclass(frozen=True)
class SparseCoder:
    """Dictionary of paired words: `source [n, d_s]` and `target [n, d_t]`, both centred; `unit` has rows of norm 1."""

    source: Tensor
    target: Tensor
    unit: Tensor
    mean_x: Tensor
    mean_y: Tensor

    @classmethod
    def build(cls, X: Rows, Y: Rows, *, cap: int | None = None) -> "SparseCoder":
        """From the first `cap` pairs (all if None)."""
        stop = min(len(X), cap or len(X))
        source, target = X.chunk(0, stop), Y.chunk(0, stop)
        mean_x, mean_y = source.mean(dim=0), target.mean(dim=0)
        source, target = source - mean_x, target - mean_y
        return cls(source, target, source / source.norm(dim=1, keepdim=True).clamp_min(1e-12), mean_x, mean_y)

    @torch.no_grad()
    def convert(self, x: Tensor, *, atoms: int = 64, exclude: Tensor | None = None, batch: int = 128) -> Tensor:
        """x [m, d_s] -> [m, d_t]. `exclude` [m]: a dictionary row each that its vector may not use (itself)."""
        parts = []
        for start in range(0, len(x), batch):
            own = None if exclude is None else exclude[start : start + batch]
            ids, codes = self._pursue(x[start : start + batch].float() - self.mean_x, atoms, own)
            parts.append(torch.einsum("ba,bad->bd", codes, self.target[ids]))
        return torch.cat(parts) + self.mean_y

    def _pursue(self, x: Tensor, atoms: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [b, d] -> chosen rows [b, atoms] and their least-squares coefficients on `source`."""
        rows = torch.arange(len(x))
        taken = torch.zeros(len(x), len(self.unit), dtype=torch.bool)
        if exclude is not None:
            taken[rows, exclude] = True
        residual, ids = x, torch.empty(len(x), 0, dtype=torch.long)
        codes = torch.zeros(len(x), 0)
        for _ in range(min(atoms, len(self.unit) - 1)):
            match = (residual @ self.unit.T).abs_().masked_fill_(taken, -1.0)
            best = match.argmax(dim=1)
            taken[rows, best] = True
            ids = torch.cat([ids, best.unsqueeze(1)], dim=1)
            chosen = self.source[ids]  # [b, k, d]
            gram = chosen @ chosen.transpose(1, 2)
            jitter = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(dim=1)
            gram.diagonal(dim1=1, dim2=2).add_(jitter.unsqueeze(1))
            right = (chosen @ x.unsqueeze(2)).squeeze(2)
            codes = torch.linalg.solve(gram, right)
            residual = x - torch.einsum("ba,bad->bd", codes, chosen)
        return ids, codes


def distil(
    X: Rows,
    Y: Rows,
    found: Moments,
    *,
    ridge: float,
    rms_match: bool,
    anchors: Tensor | None = None,
    atoms: int = 64,
    cap: int = ANCHOR_CAP,
) -> AffineConverter:
    """A linear map that does what sparse coding does to `anchors` (source visual prompts [m, d_s]; words if None).

    Few anchors against d_s dimensions: the map is shrunk towards the words' ridge map instead of towards zero, and
    learns the codes' departure from it. A word is coded without itself.
    """
    from vpgtrans.config import InitialiserConfig
    from vpgtrans.transfer.converters import solve

    coder = SparseCoder.build(X, Y, cap=DICTIONARY_CAP)
    generator = torch.Generator().manual_seed(0)
    if anchors is None:
        index = torch.randperm(len(coder.source), generator=generator)[:cap]
        inputs, codes_to = (
            X.table[X.ids[index]].float(),
            coder.convert(X.table[X.ids[index]], atoms=atoms, exclude=index),
        )
    else:
        inputs = anchors.flatten(0, -2).float()
        inputs = inputs[torch.randperm(len(inputs), generator=generator)[:cap]]
        codes_to = coder.convert(inputs, atoms=atoms)
    prior = solve(InitialiserConfig(fit="ridge", ridge=ridge, rms_match=False), found)
    C = prior.weight.T.double()
    rest = moments(inputs, codes_to - prior(inputs))
    # As many pseudo-observations of "no departure" (in the words' covariance) as there are dimensions.
    strength = len(C) / rest.count
    C = C + torch.linalg.solve(rest.G + strength * found.G, rest.K)
    if rms_match:
        C = C * rms_scale(C, found)
    return affine(C, found, name="omp, distilled" + (", RMS-matched" if rms_match else ""))
