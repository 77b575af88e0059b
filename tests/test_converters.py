"""Converter fits against the textbook formulas in float64, and what must hold whatever the tables are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpgtrans.config import InitialiserConfig
from vpgtrans.errors import TransferError
from vpgtrans.transfer.converters import Moments, Rows, fit, moments, rms_scale, solve
from vpgtrans.transfer.sparse import SparseCoder


def related(n: int, dx: int, dy: int, *, seed: int = 0, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that share a linear structure, with means far from zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dx, generator=generator) * torch.linspace(0.3, 2, dx) + 5
    y = x @ torch.randn(dx, dy, generator=generator) / dx**0.5 + noise * torch.randn(n, dy, generator=generator) - 3
    return x, y


def reference(x: torch.Tensor, y: torch.Tensor, config: InitialiserConfig) -> np.ndarray:
    """C in row form from the formulas, with symmetric roots and a full SVD."""
    X, Y = x.double().numpy(), y.double().numpy()
    X, Y = X - X.mean(0), Y - Y.mean(0)
    n = len(X)
    G, K, H = X.T @ X / n, X.T @ Y / n, Y.T @ Y / n
    Gr = G + config.ridge * np.trace(G) / len(G) * np.eye(len(G))
    Hr = H + config.ridge * np.trace(H) / len(H) * np.eye(len(H))
    if config.fit == "ridge":
        C = np.linalg.inv(Gr) @ K
    elif config.fit == "procrustes":
        U, S, Vt = np.linalg.svd(K, full_matrices=False)
        C = S.sum() / np.trace(G) * U @ Vt
    else:
        U, S, Vt = np.linalg.svd(_root(Gr, -0.5) @ K @ _root(Hr, -0.5), full_matrices=False)
        C = _root(Gr, -0.5) @ U @ np.diag(S**config.alpha) @ Vt @ _root(Hr, 0.5)
    if config.rms_match:
        C = C * np.sqrt(np.trace(H) / np.trace(C.T @ G @ C))
    return C


def _root(M: np.ndarray, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(M)
    return vectors * values**power @ vectors.T


CONFIGS = [
    InitialiserConfig(fit="ridge"),
    InitialiserConfig(fit="ridge", rms_match=False, ridge=0.1),
    InitialiserConfig(fit="procrustes"),
    InitialiserConfig(fit="cca", alpha=0.0),
    InitialiserConfig(fit="cca", alpha=0.25),
    InitialiserConfig(fit="cca", alpha=1.0, rms_match=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.fit}-{c.alpha}-{c.rms_match}")
@pytest.mark.parametrize(("dx", "dy"), [(24, 16), (16, 16), (16, 24)])
def test_closed_forms_equal_the_formulas(config, dx, dy):
    x, y = related(2000, dx, dy)
    if dx < dy and config.fit == "cca":
        config = config.model_copy(update={"rms_match": True})  # rescaled by trace in any case
    C = reference(x, y, config)
    converter = fit(config, x, y)
    assert converter.weight.shape == (dy, dx)
    np.testing.assert_allclose(converter.weight.T.numpy(), C, rtol=2e-3, atol=2e-4)
    wanted = (x.double().numpy() - x.double().numpy().mean(0)) @ C + y.double().numpy().mean(0)
    np.testing.assert_allclose(converter(x).numpy(), wanted, rtol=1e-3, atol=5e-3)


def test_cca_at_alpha_one_is_ridge_and_at_zero_has_the_targets_covariance():
    x, y = related(4000, 20, 12)
    ridge = fit(InitialiserConfig(fit="ridge", ridge=0, rms_match=False), x, y)
    cca = fit(InitialiserConfig(fit="cca", alpha=1, ridge=0, rms_match=False), x, y)
    torch.testing.assert_close(ridge.weight, cca.weight, rtol=1e-3, atol=1e-4)
    coloured = fit(InitialiserConfig(fit="cca", alpha=0, ridge=0, rms_match=False), x, y)(x)
    torch.testing.assert_close(torch.cov(coloured.T), torch.cov(y.T), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["ridge", "procrustes", "cca", "omp"])
def test_rms_match_gives_converted_words_the_targets_spread(kind):
    x, y = related(600, 16, 12, noise=2.0)
    wanted = _spread(y)
    converted = _spread(fit(InitialiserConfig(fit=kind), x, y)(x))
    assert converted == pytest.approx(wanted, rel=0.01)
    if kind in ("ridge", "omp"):
        assert _spread(fit(InitialiserConfig(fit=kind, rms_match=False), x, y)(x)) < 0.9 * wanted


def test_rms_match_of_the_uncentred_sgd_is_around_zero():
    x, y = related(600, 16, 12, noise=2.0)
    converted = fit(InitialiserConfig(fit="sgd"), x, y)(x)
    assert converted.square().mean().item() == pytest.approx(y.square().mean().item(), rel=0.01)


def _spread(x: torch.Tensor) -> float:
    return (x - x.mean(dim=0)).square().mean().sqrt().item()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), chunk=st.integers(50, 700), weighted=st.booleans())
def test_moments_do_not_depend_on_the_chunks(seed, chunk, weighted):
    x, y = related(500, 9, 7, seed=seed)
    weights = torch.rand(500, generator=torch.Generator().manual_seed(seed)) + 0.1 if weighted else None
    found = moments(x, y, weights=weights, chunk=chunk)
    w = (weights if weights is not None else torch.ones(500)).double()
    w = w / w.sum()
    X, Y = x.double(), y.double()
    mean_x, mean_y = w @ X, w @ Y
    torch.testing.assert_close(found.mean_x, mean_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean_y, mean_y, rtol=1e-5, atol=1e-5)
    X, Y = X - mean_x, Y - mean_y
    for got, wanted in ((found.G, (X * w[:, None]).T @ X), (found.K, (X * w[:, None]).T @ Y)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.H, (Y * w[:, None]).T @ Y, rtol=1e-4, atol=1e-4)


def test_moments_keep_their_digits_when_the_mean_is_large():
    x, y = related(5000, 6, 6)
    found, moved = moments(x, y), moments(x + 1000, y - 1000)
    torch.testing.assert_close(found.K, moved.K, rtol=1e-2, atol=1e-2)


def test_block_boundaries(monkeypatch):
    monkeypatch.setattr("vpgtrans.transfer.converters.BLOCK", 5)
    x, y = related(400, 9, 8)
    Z = torch.cat([x, y], dim=1).double()
    Z = Z - Z.mean(dim=0)
    found = moments(x, y)
    whole = Z.T @ Z / 400
    torch.testing.assert_close(found.G, whole[:9, :9], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.K, whole[:9, 9:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.H, whole[9:, 9:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_memory_mapped_tables_are_gathered_by_row(tmp_path, dtype):
    x, y = related(300, 8, 6)
    for name, table in (("x", x), ("y", y)):
        torch.save(table.to(dtype), tmp_path / f"{name}.pt")
    left = torch.load(tmp_path / "x.pt", mmap=True)
    right = torch.load(tmp_path / "y.pt", mmap=True)
    ids = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:200]
    mapped = fit(InitialiserConfig(), Rows(left, ids), Rows(right, ids))
    plain = fit(InitialiserConfig(), x.to(dtype)[ids].float(), y.to(dtype)[ids].float())
    torch.testing.assert_close(mapped.weight, plain.weight)


def test_max_tokens_takes_the_first_pairs():
    x, y = related(500, 8, 6)
    capped = fit(InitialiserConfig(max_tokens=200), x, y)
    torch.testing.assert_close(capped.weight, fit(InitialiserConfig(), x[:200], y[:200]).weight)
    assert capped.stats["pairs"] == 200


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.fit}-{c.alpha}-{c.rms_match}")
def test_wide_tables_in_float32_give_the_same(monkeypatch, config):
    x, y = related(2000, 24, 16)
    exact = fit(config, x, y)
    monkeypatch.setattr("vpgtrans.transfer.converters.FLOAT32_WIDTH", 1)
    torch.testing.assert_close(fit(config, x, y)(x), exact(x), rtol=1e-3, atol=5e-3)


def test_an_exact_relation_is_found():
    x, _ = related(800, 12, 12)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0]
    y = x @ rotation * 2 + 1
    for kind in ("ridge", "procrustes", "cca"):
        converter = fit(InitialiserConfig(fit=kind, ridge=0), x, y)
        torch.testing.assert_close(converter(x), y, rtol=1e-3, atol=1e-3)


def test_procrustes_is_a_scaled_rotation():
    x, y = related(500, 10, 10)
    weight = fit(InitialiserConfig(fit="procrustes"), x, y).weight
    gram = weight @ weight.T
    torch.testing.assert_close(gram / gram.diagonal().mean(), torch.eye(10), rtol=1e-3, atol=1e-3)


def test_rms_scale_by_hand():
    eye = torch.eye(2, dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    found = Moments(10, zero, zero, eye, eye, 9 * eye)
    assert rms_scale(eye, found) == pytest.approx(3.0)
    converter = solve(InitialiserConfig(fit="ridge", ridge=0), found)
    torch.testing.assert_close(converter.weight, 3 * torch.eye(2))


def test_sgd_turns_towards_the_targets():
    x, y = related(800, 12, 8, noise=0.05)
    x, y = x - 5, y - y.mean(dim=0)
    converter = fit(InitialiserConfig(fit="sgd", rms_match=False), x, y)
    assert torch.nn.functional.cosine_similarity(converter(x), y).mean() > 0.95


def test_sparse_codes_rebuild_sums_of_dictionary_words():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 64, generator=generator), torch.randn(200, 20, generator=generator)
    coder = SparseCoder.build(Rows(x, torch.arange(200)), Rows(y, torch.arange(200)))
    mixed = coder.mean_x + 2 * coder.source[3] - coder.source[50]
    wanted = coder.mean_y + 2 * coder.target[3] - coder.target[50]
    torch.testing.assert_close(coder.convert(mixed[None], atoms=2)[0], wanted, rtol=1e-3, atol=1e-3)


def test_sparse_codes_leave_out_what_they_are_told_to():
    x, y = related(200, 16, 12)
    coder = SparseCoder.build(Rows(x, torch.arange(200)), Rows(y, torch.arange(200)))
    own = coder.convert(x[:5], atoms=1)
    torch.testing.assert_close(own, y[:5], rtol=1e-3, atol=1e-3)
    others = coder.convert(x[:5], atoms=1, exclude=torch.arange(5))
    assert (others - y[:5]).norm(dim=1).min() > 0.1


def test_distilled_sparse_codes_fit_their_anchors():
    x, y = related(400, 16, 12)
    anchors = x[:100].reshape(20, 5, 16) * 3
    converter = fit(InitialiserConfig(fit="omp"), x, y, anchors=anchors)
    assert converter.weight.shape == (12, 16)
    assert torch.isfinite(converter(anchors)).all()


def test_inputs_that_cannot_be_fitted_are_errors():
    x, y = related(50, 6, 5)
    with pytest.raises(TransferError, match="49 source rows"):
        fit(InitialiserConfig(), x[:49], y)
    with pytest.raises(TransferError, match="at least 2 pairs"):
        fit(InitialiserConfig(), x[:1], y[:1])
    x[3, 2] = float("nan")
    with pytest.raises(TransferError, match="not finite"):
        fit(InitialiserConfig(), x, y)
