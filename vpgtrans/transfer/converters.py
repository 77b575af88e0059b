"""Word converters: affine maps from one LLM's input-embedding space to another's, fitted on shared tokens.

Row form inside: `g(x) = (x - mean_x) C + mean_y` with C from the centred second moments

    G = XᵀX/n,  K = XᵀY/n,  H = YᵀY/n

    ridge       C = (G + λ tr(G)/d I)⁻¹ K
    procrustes  K = U Σ Vᵀ,  C = s U Vᵀ,  s = tr Σ / tr G
    cca         U S Vᵀ = G^-½ K H^-½,  C = G^-½ U S^α Vᵀ H^½     (α = 1 least squares, α = 0 the target's covariance)
    omp         sparse codes over the shared tokens, distilled into a linear map (`transfer.sparse`)
    sgd         the published baseline, kept for comparison: 1 - cos, plain SGD at lr 5.0 (VPGTrans, arXiv 2305.01278)

RMS match multiplies C by √(tr H / tr CᵀGC): least squares shrinks, and an LLM does not read shrunken prompts.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vpgtrans.config import InitialiserConfig
from vpgtrans.errors import TransferError

log = logging.getLogger(__name__)

TOKEN_CAP = 32_768
"""Default for `max_tokens`: beyond it more pairs cost time and change nothing (benchmarks/converters.py)."""

CHUNK = 8192
"""Rows gathered at once: 256 MiB in float32 for two tables of width 4,096."""

BLOCK = 1024
"""Columns of one product: symmetric moments are computed in blocks on and above the diagonal only."""


FLOAT32_WIDTH = 2048
"""From this width on, decompositions run in float32 where it costs nothing."""


@dataclass(frozen=True)
class AffineConverter:
    """`y = weight @ x + bias`: weight [d_target, d_source], bias [d_target], float32."""

    weight: Tensor
    bias: Tensor
    name: str
    seconds: float = 0.0
    stats: dict[str, float] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., d_source] -> [..., d_target], in float32."""
        return x.float() @ self.weight.T + self.bias

    def scaled(self, factor: float) -> "AffineConverter":
        """Output times `factor`, offset included: what a calibration multiplies prompts by."""
        return replace(self, weight=self.weight * factor, bias=self.bias * factor)


@dataclass(frozen=True)
class Moments:
    """First and centred second moments of n pairs, float64: mean_x [dx], mean_y [dy], G, K [dx, dy], H."""

    count: int
    mean_x: Tensor
    mean_y: Tensor
    G: Tensor
    K: Tensor
    H: Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of a table without a copy of it: `table [V, d]` in memory or memory-mapped, `ids` LongTensor[n]."""

    table: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        return self.table.shape[1]

    def take(self, index: Tensor) -> "Rows":
        return Rows(self.table, self.ids[index])

    def chunk(self, start: int, stop: int) -> Tensor:
        """Float32 copy of rows start to stop."""
        return self.table[self.ids[start:stop]].float()


def rows_of(x: Tensor | Rows) -> Rows:
    """All rows of a plain tensor."""
    return x if isinstance(x, Rows) else Rows(x, torch.arange(len(x)))


def fit(
    config: InitialiserConfig,
    X: Tensor | Rows,
    Y: Tensor | Rows,
    *,
    weights: Tensor | None = None,
    anchors: Tensor | None = None,
    found: Moments | None = None,
) -> AffineConverter:
    """Fit `config.fit` on pairs X [n, d_source] -> Y [n, d_target].

    Tables stay where they are: `Rows` gathers chunks, of any float dtype. Above `config.max_tokens` (None: the default
    cap) pairs, the first ones are taken: `pair_tokens` keeps the target's id order, in which BPE lists frequent
    tokens first.

    Args:
        weights: relative weight of each pair [n], for the closed forms.
        anchors: inputs [m, d_source] on which sparse codes are distilled (source visual prompts); words if None.
        found: moments of the same pairs, where another fit needed them already.

    Raises:
        TransferError: X and Y differ in length, hold too few pairs, or hold values that aren't finite.
    """
    start = time.perf_counter()
    source, target = rows_of(X), rows_of(Y)
    if len(source) != len(target):
        raise TransferError(f"{len(source)} source rows can't be paired with {len(target)} target rows")
    if len(source) < 2:
        raise TransferError(f"a converter needs at least 2 pairs, got {len(source)}")
    cap = config.max_tokens or TOKEN_CAP
    if len(source) > cap:
        index = torch.arange(cap)
        source, target = source.take(index), target.take(index)
        weights = None if weights is None else weights[:cap]
    found = moments(source, target, weights=weights) if found is None else found
    if not (torch.isfinite(found.G).all() and torch.isfinite(found.H).all()):
        raise TransferError("the embedding tables hold values that are not finite")
    if config.fit == "sgd":
        converter = _fit_sgd(source, target, found, rms_match=config.rms_match)
    elif config.fit == "omp":
        from vpgtrans.transfer.sparse import distil

        converter = distil(source, target, found, ridge=config.ridge, rms_match=config.rms_match, anchors=anchors)
    else:
        converter = solve(config, found)
    stats = converter.stats | {"pairs": len(source)}
    return replace(converter, seconds=time.perf_counter() - start, stats=stats)


def solve(config: InitialiserConfig, found: Moments) -> AffineConverter:
    """The closed forms, from moments alone (so that several fits can share them)."""
    C = _CLOSED_FORMS[config.fit](config, found)
    # A wider target: the map has rank d_source, and without a rescale the rest of the target's variance is missing.
    widens = C.shape[1] > C.shape[0] and config.fit in ("cca", "procrustes")
    scale = rms_scale(C, found) if config.rms_match or widens else 1.0
    name = f"cca(α={config.alpha:g})" if config.fit == "cca" else config.fit
    return affine(C * scale, found, name=name + (", RMS-matched" if config.rms_match else ""))


def affine(C: Tensor, found: Moments, *, name: str) -> AffineConverter:
    """Row form `(x - mean_x) C + mean_y` as weight and bias."""
    bias = found.mean_y - found.mean_x @ C
    return AffineConverter(weight=C.T.float().contiguous(), bias=bias.float(), name=name)


def rms_scale(C: Tensor, found: Moments) -> float:
    """√(tr H / tr CᵀGC): the factor that gives converted words the target words' RMS around the mean."""
    # Float32 products: a factor needs no sixteen digits.
    small = C.float()
    converted = ((found.G.float() @ small) * small).sum(dtype=torch.float64).item()
    return math.sqrt(found.H.trace().item() / max(converted, 1e-30))


# --- moments ------------------------------------------------------------------------------------


def moments(X: Tensor | Rows, Y: Tensor | Rows, *, weights: Tensor | None = None, chunk: int = CHUNK) -> Moments:
    """Centred moments in one pass over the rows.

    Products are float32 within a chunk and added up in float64. Rows are shifted by the first chunk's mean before the
    product, so that centring subtracts small numbers (a table whose mean is far from zero loses no digits).
    """
    source, target = rows_of(X), rows_of(Y)
    n, dx, width = len(source), source.width, source.width + target.width
    shift, total = torch.zeros(width), torch.zeros(width, dtype=torch.float64)
    second = torch.zeros(width, width, dtype=torch.float64)
    mass = 0.0
    chunk = min(chunk, n)
    buffer = torch.empty(chunk, width)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        Z = buffer[: stop - start]
        Z[:, :dx] = source.table[source.ids[start:stop]]
        Z[:, dx:] = target.table[target.ids[start:stop]]
        if start == 0:
            shift = Z.mean(dim=0)
        Z -= shift
        if weights is None:
            mass += stop - start
            total += Z.sum(dim=0)
        else:
            root = weights[start:stop].float().sqrt().unsqueeze(1)
            mass += weights[start:stop].sum().item()
            total += (Z * root.square()).sum(dim=0)
            Z *= root
        for rows, columns in _upper_blocks(width):
            second[rows, columns] += Z[:, rows].T @ Z[:, columns]
    mean = total / mass
    second /= mass
    for rows, columns in _upper_blocks(width):
        second[rows, columns] -= torch.outer(mean[rows], mean[columns])
        if rows != columns:
            second[columns, rows] = second[rows, columns].T
    mean += shift
    return Moments(n, mean[:dx], mean[dx:], second[:dx, :dx], second[:dx, dx:], second[dx:, dx:])


def _upper_blocks(width: int) -> Iterator[tuple[slice, slice]]:
    starts = range(0, width, BLOCK)
    for a in starts:
        for b in starts:
            if b >= a:
                yield slice(a, min(a + BLOCK, width)), slice(b, min(b + BLOCK, width))


# --- closed forms -------------------------------------------------------------------------------


def _regularised(moment: Tensor, ridge: float) -> Tensor:
    regularised = moment.clone()
    regularised.diagonal().add_(max(ridge, 1e-9) * moment.trace() / len(moment))
    return regularised


def _ridge(config: InitialiserConfig, found: Moments) -> Tensor:
    return torch.cholesky_solve(found.K, torch.linalg.cholesky(_regularised(found.G, config.ridge)))


def _procrustes(config: InitialiserConfig, found: Moments) -> Tensor:
    rotation, nuclear = _power_of_singular_values(found.K, 0.0)
    return rotation * (nuclear / found.G.trace())


def _cca(config: InitialiserConfig, found: Moments) -> Tensor:
    # Any whitening serves: with G = L Lᵀ instead of the symmetric root only a rotation is added, and it cancels.
    L = torch.linalg.cholesky(_regularised(found.G, config.ridge))
    M = torch.linalg.cholesky(_regularised(found.H, config.ridge))
    A = torch.linalg.solve_triangular(L, found.K, upper=False)
    A = torch.linalg.solve_triangular(M.T, A, upper=True, left=False)
    A, _ = _power_of_singular_values(A, config.alpha)
    return torch.linalg.solve_triangular(L.T, A @ M.T, upper=True)


def _power_of_singular_values(A: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """U S^power Vᵀ and tr S for A = U S Vᵀ, through the smaller Gram matrix: one eigh instead of an SVD.

    Singular values below the Gram matrix's noise count as that noise: 1e-6 of the largest in float64. Wide matrices
    are decomposed in float32 (a third of the time) with 1e-3 instead, far below what a canonical correlation of
    noise is with any number of pairs that fits a vocabulary (√(d/n)).
    """
    wide = A.shape[1] > A.shape[0]
    small = min(A.shape) >= FLOAT32_WIDTH
    work = A.float() if small else A
    values, vectors = torch.linalg.eigh(work @ work.T if wide else work.T @ work)
    singular = values.clamp_min((1e-6 if small else 1e-12) * values[-1]).clamp_min(1e-30).sqrt()
    inner = (vectors * singular.pow(power - 1)) @ vectors.T
    return (inner @ work if wide else work @ inner).double(), singular.double().sum()


_CLOSED_FORMS: dict[str, Callable[[InitialiserConfig, Moments], Tensor]] = {
    "ridge": _ridge,
    "procrustes": _procrustes,
    "cca": _cca,
}


# --- the published baseline ---------------------------------------------------------------------


def _fit_sgd(
    source: Rows,
    target: Rows,
    found: Moments,
    *,
    rms_match: bool,
    steps: int = 1500,
    batch: int = 4096,
    lr: float = 5.0,
) -> AffineConverter:
    """1 - cos between W x + b and y, plain SGD, as published, on true shared tokens; nothing is centred."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(source.width, target.width)
    with torch.no_grad():
        layer.weight.copy_((torch.rand(layer.weight.shape, generator=generator) * 2 - 1) / math.sqrt(source.width))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            index = torch.randint(len(source), (min(batch, len(source)),), generator=generator)
            x = source.table[source.ids[index]].float()
            y = target.table[target.ids[index]].float()
            loss = (1 - cosine_similarity(layer(x), y)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    W, b = layer.weight.detach().double(), layer.bias.detach().double()
    stats = {"steps": float(steps), "batch": float(batch), "loss": loss.item()}
    scale = 1.0
    if rms_match:
        # Around zero, not the mean: the cosine fit isn't centred.
        wanted = found.H.trace() + found.mean_y.square().sum()
        got = ((W @ found.G) * W).sum() + (W @ found.mean_x + b).square().sum()
        scale = math.sqrt((wanted / got).item())
    name = "sgd" + (", RMS-matched" if rms_match else "")
    return AffineConverter((W * scale).float(), (b * scale).float(), name, stats=stats)
