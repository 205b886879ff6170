"Principal axes and ridge regression along them: closed forms, rounding, the formula of what is left out."
import numpy as np
import pytest
import torch

from worldmodels_nb.eval.axes import (
    FOLDS,
    RIDGES,
    choose_ridge,
    episode_folds,
    principal_axes,
    ridge_errors,
    ridge_weights,
    spread,
)


@pytest.mark.parametrize("n, width", [(50, 8), (20, 60), (12, 12)])
def test_principal_axes_are_those_of_numpy(n, width):
    x = torch.from_numpy(np.random.default_rng(n).normal(size=(n, width)) * np.arange(1, width + 1) + 3)
    axes = principal_axes(x)
    variance = np.linalg.svd(x.numpy() - x.numpy().mean(0), compute_uv=False) ** 2 / n
    rank = min(n - 1, width)
    assert np.allclose(axes.share, (variance / variance.sum())[:rank])
    assert axes.share.sum() == pytest.approx(1)
    assert torch.allclose(axes.z, (x - x.mean(0)) @ axes.basis)
    assert torch.allclose(axes.z.T @ axes.z / n, torch.diag(axes.share), atol=1e-12)
    assert (axes.z.pow(3).sum(0) >= 0).all()


@pytest.mark.parametrize("what", [torch.full((9, 4), .3), 1000 + 1e-5 * torch.randn(9, 4)])
def test_rounding_is_no_axis(what):
    assert principal_axes(what).basis.shape == (4, 0)


def test_ridge_weights_equal_least_squares_of_numpy_to_the_last_digits():
    for shape in ((50, 8), (20, 60)):
        x, y = (np.random.default_rng(i).normal(size=size) for i, size in ((1, shape), (2, (shape[0], 3))))
        _, _, share, z = principal_axes(torch.from_numpy(x))
        rows = np.sqrt(.03 * len(x)) * np.eye(len(share))
        zeros = np.zeros((len(share), 3))
        by_numpy = np.linalg.lstsq(np.vstack([z, rows]), np.vstack([y, zeros]), rcond=None)[0]
        y = torch.from_numpy(y)
        assert np.abs(ridge_weights(z, share, y, .03).numpy() - by_numpy).max() < 1e-12
        each = ridge_weights(z, share, y, torch.tensor([.03, 1., 0.]))
        for i, ridge in enumerate((.03, 1., 0.)):
            assert torch.allclose(each[:, i], ridge_weights(z, share, y, ridge)[:, i], atol=1e-12)


@pytest.mark.parametrize("n, width, parts", [(48, 6, 4), (48, 6, 24), (30, 40, 5), (40, 3, 2)])
def test_errors_left_out_are_those_of_probes_fitted_on_the_rest(n, width, parts):
    g = np.random.default_rng(n + parts)
    x, y = (torch.from_numpy(g.normal(size=(n, k))) for k in (width, 2))
    fold, y = g.permutation(np.arange(n) % parts), y - y.mean(0)
    axes = principal_axes(x)
    found = ridge_errors(axes.z, axes.share, y, fold)
    total = x.var(0, correction=0).sum()
    for i in range(0, len(RIDGES), 4):
        wrong = torch.zeros(2, dtype=x.dtype)
        for part in range(parts):
            a, b = x[fold != part], y[fold != part]
            mean, centre = a.mean(0), b.mean(0)
            inner = (a - mean).T @ (a - mean) + RIDGES[i] * n * total * torch.eye(width)
            w = torch.linalg.solve(inner, (a - mean).T @ (b - centre))
            wrong += ((x[fold == part] - mean) @ w + centre - y[fold == part]).square().sum(0)
        assert torch.allclose(found[i], wrong / n, rtol=1e-5)


@pytest.mark.parametrize("groups", [
    None, np.arange(60) // 6, np.arange(60) % 7, np.zeros(60), np.arange(60) + .5])
def test_a_ridge_is_chosen_whatever_the_groups(groups):
    g = np.random.default_rng(0)
    x, y = (torch.from_numpy(g.normal(size=(60, k))) for k in (5, 3))
    axes = principal_axes(x)
    assert np.isin(choose_ridge(axes.z, axes.share, y - y.mean(0), groups).numpy(), RIDGES).all()


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("value", [0., 3., 1e6])
def test_what_does_not_vary_has_no_spread(n, value):
    assert (spread(torch.full((n, 3), value)) == 0).all()


@pytest.mark.parametrize("groups, at_most, folds", [
    (None, 5, 5), (np.arange(60) // 6, 5, 5), (np.arange(60) // 6, FOLDS, 10), (np.zeros(60), FOLDS, 60),
    (np.arange(60)[::-1] // 2 + .5, 7, 7)])
def test_no_episode_is_in_two_folds(groups, at_most, folds):
    fold = episode_folds(60, groups, at_most)
    assert np.unique(fold).tolist() == list(range(folds))
    if groups is not None and len(np.unique(groups)) > 1:
        assert all(len(np.unique(fold[groups == group])) == 1 for group in groups)
    assert np.bincount(fold).max() <= 2 * np.bincount(fold).min()
