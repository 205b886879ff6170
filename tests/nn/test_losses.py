"Every loss on latents alone equals its definition in plain loops, and its limits on paper."
import cmath
import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from worldmodels_nb.nn.losses import (
    covariance_loss,
    inverse_loss,
    sigreg_loss,
    smoothness_loss,
    time_centred,
    variance_loss,
    within_covariance_loss,
    within_variance_loss,
)

seeds = st.integers(0, 2**31 - 1)


def seeded(seed): return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# the definitions, with loops

def mean(values): return sum(values) / len(values)
def columns(z): return [list(column) for column in zip(*z.tolist())]


def softmax(values):
    total = sum(map(math.exp, values))
    return [math.exp(v) / total for v in values]


def cov(x, y):
    return sum((p - mean(x)) * (q - mean(y)) for p, q in zip(x, y)) / (len(x) - 1)


def loop_variance(z, target=1.0, eps=1e-4):
    return mean([max(0.0, target - math.sqrt(cov(x, x) + eps)) for x in columns(z)])


def loop_covariance(z):
    c = columns(z)
    return sum(cov(c[i], c[j])**2 for i, j in product(range(len(c)), repeat=2) if i != j) / len(c)


def loop_sigreg(z, directions, points, largest, seed):
    u = torch.randn(z.shape[1], directions, generator=seeded(seed), dtype=torch.float64)
    step, total = largest / (points - 1), 0.0
    for k in range(directions):
        line = [c / math.sqrt(sum(x * x for x in u[:, k].tolist())) for c in u[:, k].tolist()]
        shadow = [sum(p * q for p, q in zip(row, line)) for row in z.tolist()]
        for p in range(1 - points, points):                       # the whole range, where the code takes half
            t = p * step
            normal_there = math.exp(-t * t / 2)
            height = abs(mean([cmath.exp(1j * t * x) for x in shadow]) - normal_there)**2 * normal_there
            total += height * (step / 2 if abs(p) == points - 1 else step)
    return total / directions


@given(seeds, st.integers(2, 7), st.integers(1, 5), st.sampled_from([0.01, 1.0, 4.0]))
@budget(max_examples=25, deadline=None)
def test_every_loss_is_its_definition(seed, n, d, scale):
    z = normal(n, d, seed=seed, scale=scale)
    pairs = [
        (variance_loss(z, 0.7, 1e-3), loop_variance(z, 0.7, 1e-3)),
        (covariance_loss(z), loop_covariance(z)),
        (sigreg_loss(z, 3, 6, 2.0, seeded(seed)), loop_sigreg(z, 3, 6, 2.0, seed)),
    ]
    for value, loop in pairs: assert value.item() == pytest.approx(loop, abs=1e-10, rel=1e-10)


def test_the_defaults_are_those_of_the_papers():
    z = normal(6, 4)
    assert variance_loss(z).item() == pytest.approx(loop_variance(z), abs=1e-10)
    value = sigreg_loss(z, generator=seeded(3)).item()
    assert value == pytest.approx(loop_sigreg(z, 64, 17, 3.0, 3), abs=1e-10)


def test_losses_in_time_are_their_definitions():
    z, everywhere = normal(2, 4, 3, 5), product(range(2), range(3), range(3), range(5))
    steps = [(z[b, t + 1, n, d] - z[b, t, n, d]).item()**2 for b, t, n, d in everywhere]
    assert smoothness_loss(z).item() == pytest.approx(mean(steps), abs=1e-12)
    logits, pressed = normal(2, 3, 4), torch.tensor([[0, 1, 2], [3, 3, 0]])
    costs = [
        -math.log(softmax(logits[b, t].tolist())[pressed[b, t]]) for b, t in product(range(2), range(3))]
    assert inverse_loss(logits, pressed).item() == pytest.approx(mean(costs), abs=1e-12)


def test_covariance_is_that_of_torch():
    z = normal(4096, 8)
    z[:, 4:] = 0.3
    c = torch.cov(z.T)
    off_diagonal = sum(c[i, j]**2 for i, j in product(range(8), repeat=2) if i != j).item() / 8
    assert covariance_loss(z).item() == pytest.approx(off_diagonal, abs=1e-10)


# limits that are known on paper

ROOT = math.sqrt(2 * math.pi)


def point_on_paper(c): return ROOT * (1 - math.sqrt(2) * math.exp(-c * c / 4) + 1 / math.sqrt(3))


@given(st.floats(-6, 6), st.integers(1, 4))
@budget(max_examples=25, deadline=None)
def test_sigreg_of_one_point_is_the_integral_on_paper(c, n):
    point = torch.full((n, 1), c, dtype=torch.float64)             # one dimension: directions are 1 and -1
    assert sigreg_loss(point, 3, 1001, 12.0).item() == pytest.approx(point_on_paper(c), abs=1e-9)


@pytest.mark.parametrize("c, shape", [(0.0, (2, 8)), (0.5, (2, 1)), (3.0, (2, 1))])
def test_a_fine_rule_meets_the_paper(c, shape):
    value = sigreg_loss(torch.full(shape, c, dtype=torch.float64), 2, 2001, 10.0).item()
    assert value == pytest.approx(point_on_paper(c), abs=1e-9)


def test_sigreg_of_normal_samples_is_one_over_n():
    on_paper = ROOT * (1 - 1 / math.sqrt(3))
    for n, rounds in ((16, 400), (256, 200)):
        draws = range(rounds)
        values = [n * sigreg_loss(normal(n, 8, seed=i), 32, 65, 8.0, seeded(i)).item() for i in draws]
        assert mean(values) == pytest.approx(on_paper, rel=0.1)
    by_default = mean([sigreg_loss(torch.randn(64, 8)).item() for _ in range(200)])
    assert by_default == pytest.approx(on_paper / 64, abs=3e-3)


def test_sigreg_orders_the_degenerate_batches():
    healthy, origin = normal(2048, 8), torch.zeros(2048, 8, dtype=torch.float64)
    half, copies = torch.cat([healthy[:, :4], origin[:, 4:]], 1), healthy[:, :1].expand(-1, 8)
    batches = (healthy, half, copies, origin)
    best, dead_half, copied, dead = (sigreg_loss(z, 512, generator=seeded(0)).item() for z in batches)
    assert best < 0.002 < 0.03 < dead_half < dead and 0.03 < copied < dead


@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("loss", [variance_loss, covariance_loss, sigreg_loss])
def test_no_loss_takes_an_exact_collapse_apart(center, loss):
    z = torch.full((64, 4), center, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(loss(z), z)
    assert (slope - slope.mean(0)).abs().max() < 1e-12


def test_sigreg_moves_a_heap_to_the_origin():
    z = torch.full((64, 1), 0.3, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(sigreg_loss(z), z)
    assert slope.min() > 0


def test_gradients_are_right():
    z, check = normal(2, 5, 3).requires_grad_(), torch.autograd.gradcheck
    assert check(variance_loss, z) and check(covariance_loss, z) and check(smoothness_loss, z)
    assert check(lambda z: sigreg_loss(z, 4, generator=seeded(0)), z)
    other = normal(2, 6, 3, seed=1).requires_grad_()
    assert check(lambda z: sigreg_loss(z, 5, generator=seeded(1)), other)


@pytest.mark.parametrize("loss", [variance_loss, covariance_loss])
def test_one_sample_is_refused(loss):
    with pytest.raises(ValueError, match="two samples; raise train.batch_size"): loss(torch.zeros(3, 1, 4))


# tokens

@given(seeds, st.integers(1, 4))
@budget(max_examples=15, deadline=None)
def test_a_sheet_per_token_is_the_mean_over_a_loop(seed, tokens):
    z = normal(tokens, 6, 3, seed=seed)
    def sigreg(z): return sigreg_loss(z, 5, generator=seeded(seed))
    for loss in (variance_loss, covariance_loss, sigreg):
        assert loss(z).item() == pytest.approx(mean([loss(sheet).item() for sheet in z]), abs=1e-12)


# what moves

SHAPES = [(3, 4, 2), (5, 2, 3), (2, 9, 1)]  # B, T, D


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, .2, 3.0])
def test_spread_within_windows_by_loops(shape, scale):
    z, (B, T, D) = normal(*shape, scale=scale) + normal(shape[0], 1, shape[2], seed=1, scale=50.0), shape
    terms = []
    for j in range(D):
        off = [z[b, t, j].item() - mean(z[b, :, j].tolist()) for b in range(B) for t in range(T)]
        terms.append(max(0.0, math.log(.5) - math.log(math.sqrt(mean([x * x for x in off]) + 1e-4))))
    assert within_variance_loss(time_centred(z).flatten(0, 1)).item() == pytest.approx(mean(terms), abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_stands_still_adds_nothing(shape):
    "Not to the spread within windows, however far windows lie apart, nor to its covariances."
    z, far = normal(*shape), 100 * normal(shape[0], 1, shape[2], seed=1)
    for loss in (within_variance_loss, within_covariance_loss):
        moved, still = (loss(time_centred(x).flatten(0, 1)).item() for x in (z + far, z))
        assert moved == pytest.approx(still, abs=1e-9)
    still = time_centred(far.expand(shape)).flatten(0, 1)
    assert within_variance_loss(still).item() == pytest.approx(math.log(.5 / .01), abs=1e-9)
    assert variance_loss(far.expand(shape).flatten(0, 1)) < .7


@pytest.mark.parametrize("size", [.1, 1.0, 30.0])
def test_correlations_within_do_not_depend_on_size(size):
    z = normal(64, 6)
    assert within_covariance_loss(size * z, 0.0).item() == pytest.approx(
        covariance_loss(z / z.square().mean().sqrt()).item(), rel=1e-9)
    repeated = z[:, :1].expand(-1, 6)
    assert within_covariance_loss(size * repeated).item() == pytest.approx(5 * (64 / 63)**2, rel=.05)


def test_a_small_spread_is_pulled_harder():
    "A hinge on the spread itself pulls alike wherever it is; its logarithm pulls more the less there is."
    pulls = []
    for scale in (.01, .1):
        z = (scale * normal(256, 1)).requires_grad_()
        slope, = torch.autograd.grad(within_variance_loss(z, eps=0.0), z)
        pulls.append((slope * z).sum().abs().item() / scale)
    assert pulls[0] == pytest.approx(10 * pulls[1])
