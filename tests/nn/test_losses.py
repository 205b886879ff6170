"Every loss equals its definition in plain loops; the module around them keeps its promises."
import cmath, math
from itertools import product
import pytest
import torch
from hypothesis import given, settings as budget, strategies as st
from torch.nn import functional as F
from worldmodels_nb.nn.regularizer import Regularizer, barlow_loss, dino_loss, invariance_loss
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.nn.losses import covariance_loss, inverse_loss, sigreg_loss, smoothness_loss, variance_loss
from worldmodels_nb.settings import Settings

TERMS = ("variance", "covariance", "invariance", "barlow", "dino", "sigreg", "smoothness", "inverse")
JOYSTICK = ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])
BUTTONS = ActionSpec("discrete", 4)
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def seeded(seed): return torch.Generator().manual_seed(seed)
def normal(*shape, seed=0, scale=1.0): return scale * torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)
def only(action=JOYSTICK, shape=(1, 4), share=1.0, sections={}, **loss):
    return Regularizer(shape, action, Settings(loss=dict.fromkeys(TERMS, 0.0) | loss, **sections), share)


# the definitions, with loops
def mean(values): return sum(values) / len(values)
def columns(z): return [list(column) for column in zip(*z.tolist())]
def softmax(values): total = sum(map(math.exp, values)); return [math.exp(v) / total for v in values]

def cov(x, y, missing=1):
    return sum((p - mean(x)) * (q - mean(y)) for p, q in zip(x, y)) / (len(x) - missing)

def loop_variance(z, target=1.0, eps=1e-4):
    return mean([max(0.0, target - math.sqrt(cov(x, x) + eps)) for x in columns(z)])

def loop_covariance(z):
    c = columns(z)
    return sum(cov(c[i], c[j])**2 for i, j in product(range(len(c)), repeat=2) if i != j) / len(c)

def loop_invariance(a, b):
    return mean([(p - q)**2 for row, other in zip(a.tolist(), b.tolist()) for p, q in zip(row, other)])

def loop_barlow(a, b, off_diagonal=0.0051, eps=1e-5):
    total = 0.0
    for (i, x), (j, y) in product(enumerate(columns(a)), enumerate(columns(b))):
        c = cov(x, y, 0) / math.sqrt((cov(x, x, 0) + eps) * (cov(y, y, 0) + eps))
        total += (1 - c)**2 if i == j else off_diagonal * c**2
    return total

def loop_dino(student, teacher, center, tau_s=0.1, tau_t=0.04):
    costs = []
    for a, b in zip(student.tolist(), teacher.tolist()):
        told, said = softmax([(x - c) / tau_t for x, c in zip(b, center)]), softmax([x / tau_s for x in a])
        costs.append(-sum(p * math.log(q) for p, q in zip(told, said)))
    return mean(costs)

def loop_sigreg(z, directions, points, largest, seed):
    u = torch.randn(z.shape[1], directions, generator=seeded(seed), dtype=torch.float64)
    step, total = largest / (points - 1), 0.0
    for k in range(directions):
        line = [c / math.sqrt(sum(x * x for x in u[:, k].tolist())) for c in u[:, k].tolist()]
        shadow = [sum(p * q for p, q in zip(row, line)) for row in z.tolist()]
        for p in range(1 - points, points):                       # the whole range, where the code takes half
            t = p * step
            height = abs(mean([cmath.exp(1j * t * x) for x in shadow]) - math.exp(-t * t / 2))**2 * math.exp(-t * t / 2)
            total += height * (step / 2 if abs(p) == points - 1 else step)
    return total / directions


@given(seeds, st.integers(2, 7), st.integers(1, 5), st.sampled_from([0.01, 1.0, 4.0]))
@budget(max_examples=25, deadline=None)
def test_every_loss_is_its_definition(seed, n, d, scale):
    a, b = normal(n, d, seed=seed, scale=scale), normal(n, d, seed=seed + 1, scale=scale)
    c = normal(d, seed=seed + 2)
    pairs = [(variance_loss(a, 0.7, 1e-3), loop_variance(a, 0.7, 1e-3)), (covariance_loss(a), loop_covariance(a)),
             (invariance_loss(a, b), loop_invariance(a, b)), (barlow_loss(a, b, 0.3, 1e-4), loop_barlow(a, b, 0.3, 1e-4)),
             (dino_loss(a, b, c, 0.9, 0.5), loop_dino(a, b, c.tolist(), 0.9, 0.5)),
             (sigreg_loss(a, 3, 6, 2.0, seeded(seed)), loop_sigreg(a, 3, 6, 2.0, seed))]
    for value, loop in pairs: assert value.item() == pytest.approx(loop, abs=1e-10, rel=1e-10)


def test_the_defaults_are_those_of_the_papers():
    a, b = normal(6, 4), normal(6, 4, seed=1)
    assert barlow_loss(a, b).item() == pytest.approx(loop_barlow(a, b), abs=1e-10)
    assert dino_loss(a, b, torch.zeros(4)).item() == pytest.approx(loop_dino(a, b, [0.0] * 4), abs=1e-10)
    assert sigreg_loss(a, generator=seeded(3)).item() == pytest.approx(loop_sigreg(a, 64, 17, 3.0, 3), abs=1e-10)


def test_losses_in_time_are_their_definitions():
    z = normal(2, 4, 3, 5)
    steps = [(z[b, t + 1, n, d] - z[b, t, n, d]).item()**2 for b, t, n, d in product(range(2), range(3), range(3), range(5))]
    assert smoothness_loss(z).item() == pytest.approx(mean(steps), abs=1e-12)
    logits, pressed = normal(2, 3, 4), torch.tensor([[0, 1, 2], [3, 3, 0]])
    costs = [-math.log(softmax(logits[b, t].tolist())[pressed[b, t]]) for b, t in product(range(2), range(3))]
    assert inverse_loss(logits, pressed).item() == pytest.approx(mean(costs), abs=1e-12)


# limits that are known on paper
def point_on_paper(c): return math.sqrt(2 * math.pi) * (1 - math.sqrt(2) * math.exp(-c * c / 4) + 1 / math.sqrt(3))

@given(st.floats(-6, 6), st.integers(1, 4))
@budget(max_examples=25, deadline=None)
def test_sigreg_of_one_point_is_the_integral_on_paper(c, n):
    value = sigreg_loss(torch.full((n, 1), c, dtype=torch.float64), 3, 1001, 12.0).item()  # one dimension: directions are 1 and -1
    assert value == pytest.approx(point_on_paper(c), abs=1e-9)


def test_sigreg_of_normal_samples_is_one_over_n():
    for n, rounds in ((16, 400), (256, 200)):
        values = [n * sigreg_loss(normal(n, 8, seed=i), 32, 65, 8.0, seeded(i)).item() for i in range(rounds)]
        assert mean(values) == pytest.approx(math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3)), rel=0.1)


def test_sigreg_orders_the_degenerate_batches():
    healthy, origin = normal(2048, 8), torch.zeros(2048, 8, dtype=torch.float64)
    half, copies = torch.cat([healthy[:, :4], origin[:, 4:]], 1), healthy[:, :1].expand(-1, 8)
    best, dead_half, copied, dead = (sigreg_loss(z, 512, generator=seeded(0)).item() for z in (healthy, half, copies, origin))
    assert best < 0.002 < 0.03 < dead_half < dead and 0.03 < copied < dead


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_no_loss_takes_an_exact_collapse_apart(center):
    z = torch.full((64, 4), center, dtype=torch.float64, requires_grad=True)
    for loss in (variance_loss, covariance_loss, lambda z: barlow_loss(z, z), lambda z: dino_loss(z, z, z.mean(0)), sigreg_loss):
        slope, = torch.autograd.grad(loss(z), z)
        assert (slope - slope.mean(0)).abs().max() < 1e-12


def test_sigreg_moves_a_heap_to_the_origin():
    z = torch.full((64, 1), 0.3, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(sigreg_loss(z), z)
    assert slope.min() > 0


@given(seeds, st.floats(0.5, 20.0), st.floats(-3, 3))
@budget(max_examples=20, deadline=None)
def test_barlow_sees_neither_scale_nor_shift_nor_order(seed, scale, shift):
    a, b = normal(12, 4, seed=seed), normal(12, 4, seed=seed + 1)
    value = barlow_loss(a, b, eps=1e-12).item()
    assert barlow_loss(scale * a + shift, b, eps=1e-12).item() == pytest.approx(value, abs=1e-7)
    assert barlow_loss(b, a, eps=1e-12).item() == pytest.approx(value, abs=1e-10)
    assert barlow_loss(a[torch.randperm(12, generator=seeded(0))], b, 0.0).item() >= 0


def test_barlow_limits():
    z, still = normal(4096, 8), torch.zeros(16, 8, dtype=torch.float64)
    copies = z[:, :1].expand(-1, 8)
    assert barlow_loss(z, z).item() < 1e-3
    assert barlow_loss(still, still).item() == pytest.approx(8)
    assert barlow_loss(z, -z).item() == pytest.approx(8 * 4, rel=1e-3)
    assert barlow_loss(copies, copies).item() == pytest.approx(0.0051 * 56, rel=1e-3)


@given(seeds, st.integers(3, 20), st.integers(2, 40))
@budget(max_examples=25, deadline=None)
def test_barlow_of_a_small_batch_cannot_pass_its_floor(seed, n, d):
    z = normal(n, d, seed=seed)
    assert barlow_loss(z, z, 1.0, 1e-12).item() >= d * d / (n - 1) - d - 1e-6


def test_barlow_with_one_view_has_a_diagonal_of_one():
    z, eps = normal(50, 6, scale=3.0), 1e-5
    assert barlow_loss(z, z, 0.0, eps).item() < 6 * eps**2
    corr = torch.corrcoef(z.T)
    rest = (corr.square().sum() - corr.diagonal().square().sum()).item()
    assert barlow_loss(z, z, 1.0, eps).item() == pytest.approx(rest, abs=1e-4)


def test_dino_limits():
    sure = 5.0 * F.one_hot(torch.arange(8), 8).double()
    same = sure[:1].expand(8, -1)
    assert dino_loss(sure, sure, sure.mean(0)).item() < 1e-9
    assert dino_loss(same, same, torch.zeros(8)).item() < 1e-9
    assert dino_loss(same, same, same.mean(0)).item() == pytest.approx(5 / 0.1 * 7 / 8, abs=1e-6)
    assert dino_loss(torch.zeros(8, 8), normal(8, 8).float(), torch.zeros(8)).item() == pytest.approx(math.log(8), abs=1e-6)


@given(seeds)
@budget(max_examples=20, deadline=None)
def test_dino_is_least_where_the_student_repeats_its_teacher(seed):
    teacher, center = normal(5, 4, seed=seed), normal(4, seed=seed + 1)
    repeated = (teacher - center) / 0.5 * 0.9                      # temperatures .9 and .5
    best = dino_loss(repeated, teacher, center, 0.9, 0.5).item()
    assert best <= dino_loss(repeated + normal(5, 4, seed=seed + 2), teacher, center, 0.9, 0.5).item() + 1e-12


def test_gradients_are_right():
    a, b = (normal(2, 5, 3, seed=seed).requires_grad_() for seed in (0, 1))
    check, center = torch.autograd.gradcheck, torch.zeros(3, dtype=torch.float64)
    assert check(variance_loss, a) and check(covariance_loss, a) and check(smoothness_loss, a)
    assert check(invariance_loss, (a, b)) and check(barlow_loss, (a, b))
    assert check(lambda z: sigreg_loss(z, 4, generator=seeded(0)), a)
    assert check(lambda z: dino_loss(z, b, center, 0.8, 0.4), a)
    dino_loss(a, b, center).backward()
    assert b.grad is None


@pytest.mark.parametrize("loss", [variance_loss, covariance_loss, lambda z: barlow_loss(z, z)])
def test_one_sample_is_refused(loss):
    with pytest.raises(ValueError, match="train.batch_size"): loss(torch.zeros(3, 1, 4))


# tokens
@given(seeds, st.integers(1, 4))
@budget(max_examples=15, deadline=None)
def test_a_sheet_per_token_is_the_mean_over_a_loop(seed, tokens):
    a, b, centers = normal(tokens, 6, 3, seed=seed), normal(tokens, 6, 3, seed=seed + 1), normal(tokens, 1, 3, seed=seed + 2)
    def looped(loss): return mean([loss(i).item() for i in range(tokens)])
    pairs = [(variance_loss(a), lambda i: variance_loss(a[i])), (covariance_loss(a), lambda i: covariance_loss(a[i])),
             (barlow_loss(a, b), lambda i: barlow_loss(a[i], b[i])), (invariance_loss(a, b), lambda i: invariance_loss(a[i], b[i])),
             (dino_loss(a, b, centers), lambda i: dino_loss(a[i], b[i], centers[i])),
             (sigreg_loss(a, 5, generator=seeded(seed)), lambda i: sigreg_loss(a[i], 5, generator=seeded(seed)))]
    for value, loss in pairs: assert value.item() == pytest.approx(looped(loss), abs=1e-12)


def test_tokens_do_not_share_statistics():
    "Two token positions, each on one point, far from one another: that is a collapse, not spread."
    z = torch.stack([torch.full((4, 3, 5), -1.0), torch.full((4, 3, 5), 1.0)], dim=2)
    terms = only(shape=(2, 5), variance=1.0, barlow=1.0, views="one")(z, None, None)
    assert terms["variance"].item() == pytest.approx(0.99) and terms["barlow"].item() == pytest.approx(5)


# the module
def test_module_computes_each_term_on_the_right_samples():
    z, predicted, actions = normal(4, 3, 2, 5), normal(4, 2, 2, 5, seed=1), normal(4, 2, 2, seed=2)
    module = only(shape=(2, 5), **dict.fromkeys(TERMS, 1.0)).double()
    state, center = torch.get_rng_state(), module.center.clone()
    terms = module(z, actions, predicted)
    def sheets(x): return x.permute(2, 0, 1, 3).flatten(1, 2)
    every, a, b = sheets(z), sheets(predicted), sheets(z[:, 1:])
    torch.set_rng_state(state)
    expected = dict(variance=variance_loss(every), covariance=covariance_loss(every), invariance=invariance_loss(a, b), barlow=barlow_loss(a, b),
                    dino=dino_loss(a, b, center), sigreg=sigreg_loss(every), smoothness=smoothness_loss(z), inverse=inverse_loss(module.inverse(z), actions))
    assert terms.keys() == expected.keys()
    for name, value in expected.items(): assert terms[name].item() == pytest.approx(value.item(), abs=1e-12), name


@pytest.mark.parametrize("changed", [
    dict(loss=dict(std_target=3.0)), dict(loss=dict(eps=0.5)), dict(barlow=dict(off_diagonal=2.0)), dict(barlow=dict(eps=0.5)),
    dict(dino=dict(student_temperature=2.0)), dict(dino=dict(teacher_temperature=2.0)),
    dict(sigreg=dict(directions=5)), dict(sigreg=dict(points=5)), dict(sigreg=dict(largest=1.0))], ids=str)
def test_every_setting_reaches_its_loss_and_no_other(changed):
    (section,), z, predicted = changed, normal(4, 3, 1, 5), normal(4, 2, 1, 5, seed=1)
    weights = dict.fromkeys(("variance", "covariance", "invariance", "barlow", "dino", "sigreg"), 1.0)
    def terms(loss={}, **sections):
        torch.manual_seed(0)
        return only(shape=(1, 5), sections=sections, **weights | loss)(z, None, predicted)
    before, after = terms(), terms(**changed)
    assert [name for name in before if before[name] != after[name]] == ["variance" if section == "loss" else section]


def test_one_view_looks_at_latents_alone():
    z = normal(4, 3, 1, 5)
    module = only(shape=(1, 5), barlow=1.0, dino=1.0, views="one").double().eval()
    assert not module.two_views
    terms, samples = module(z, None, None), z.flatten(0, 2)
    assert terms["barlow"].item() == pytest.approx(barlow_loss(samples, samples).item(), abs=1e-12)
    assert terms["dino"].item() == pytest.approx(dino_loss(samples, samples, module.center[0]).item(), abs=1e-12)
    assert terms == module(z, None, normal(4, 2, 1, 5, seed=1))


@pytest.mark.parametrize("name", TERMS)
def test_two_views_are_asked_for_only_where_they_are_compared(name):
    module, z = only(**{name: 1.0}), normal(4, 3, 1, 4).float()
    assert module.two_views == (name in ("invariance", "barlow", "dino"))
    if not module.two_views: assert module(z, normal(4, 2, 2).float(), None).keys() == {name}
    else:
        with pytest.raises(ValueError, match=f"^loss.{name} needs .* loss.views"): module(z, None, None)


def test_who_learns_from_two_views():
    z, predicted = normal(4, 3, 1, 4).requires_grad_(), normal(4, 2, 1, 4, seed=1).requires_grad_()
    for name, taught in (("dino", False), ("barlow", True), ("invariance", True)):
        slopes = torch.autograd.grad(only(**{name: 1.0}).double()(z, None, predicted)[name], (z, predicted), allow_unused=True)
        assert (slopes[0] is not None) == taught and slopes[1].abs().max() > 0


def test_invariance_with_one_view_is_refused():
    with pytest.raises(ValueError, match="loss.invariance .* loss.views"): only(invariance=1.0, views="one")


@pytest.mark.parametrize("name", ["variance", "covariance", "barlow", "dino", "sigreg"])
def test_a_batch_of_one_is_refused_in_training_and_measured_in_validation(name):
    module, z = only(**{name: 1.0}), normal(1, 9, 1, 4).float()
    with pytest.raises(ValueError, match="train.batch_size"): module(z, None, z[:, 1:])
    assert module.eval()(z, None, z[:, 1:])[name].isfinite()


@given(st.dictionaries(st.sampled_from(TERMS), st.floats(0, 30), min_size=1), st.sampled_from([0.0, 0.25, 1.0]))
@budget(max_examples=30, deadline=None)
def test_weights_are_shared_out_and_zero_costs_nothing(weights, share):
    module = only(share=share, **weights)
    assert module.weights == {name: share * weight for name, weight in weights.items() if share * weight > 0}
    z = normal(4, 3, 1, 4).float()
    assert module(z, normal(4, 2, 2).float(), z[:, 1:]).keys() == module.weights.keys()
    assert bool(list(module.parameters())) == ("inverse" in module.weights)


def test_a_share_of_zero_makes_an_empty_module():
    module = only(share=0.0, projector=[8], **dict.fromkeys(TERMS, 1.0))
    assert (module(torch.zeros(1, 2, 1, 4), None, None), module.weights, module.two_views, module.state_dict()) == ({}, {}, False, {})


def test_terms_that_are_off_are_not_computed(monkeypatch):
    import worldmodels_nb.regularizer as regularizer
    def refuse(*_): raise AssertionError("computed")
    for name in TERMS: monkeypatch.setattr(regularizer, f"{name}_loss", variance_loss if name == "variance" else refuse)
    assert only(variance=1.0)(normal(4, 3, 1, 4), None, None).keys() == {"variance"}


def test_discrete_actions_are_read_by_their_logits():
    module, z = only(BUTTONS, inverse=1.0), normal(4, 3, 1, 4).float()
    pressed = torch.tensor([[0, 1], [2, 3], [3, 3], [0, 0]])
    assert module(z, pressed, None)["inverse"].item() == pytest.approx(inverse_loss(module.inverse(z), pressed).item())


def test_projector_stands_before_batch_terms_only():
    module = only(shape=(2, 4), projector=[16, 6], variance=1.0, dino=1.0, smoothness=1.0, inverse=1.0)
    z, predicted, actions = normal(4, 3, 2, 4).float(), normal(4, 2, 2, 4, seed=1).float(), normal(4, 2, 2).float()
    assert [layer.weight.shape for layer in module.projector if hasattr(layer, "weight")] == [(16, 4), (6, 16)] and module.center.shape == (2, 1, 6)
    terms, seen = module(z, actions, predicted), module.projector(z)
    assert terms["variance"].item() == pytest.approx(variance_loss(seen.permute(2, 0, 1, 3).flatten(1, 2)).item(), abs=1e-6)
    assert terms["smoothness"].item() == pytest.approx(smoothness_loss(z).item(), abs=1e-6)
    assert terms["inverse"].item() == pytest.approx(inverse_loss(module.inverse(z), actions).item(), abs=1e-6)
    terms["variance"].backward()
    assert all(parameter.grad is not None for parameter in module.projector.parameters())
    assert not list(only(projector=[16, 6], smoothness=1.0).parameters())


def test_dino_center_follows_the_teacher_in_training_only():
    module, z, predicted = only(dino=1.0, shape=(2, 4)), normal(3, 3, 2, 4).float(), normal(3, 2, 2, 4, seed=1).float()
    center = torch.zeros(2, 1, 4)
    for _ in range(3):
        before = module(z, None, predicted)["dino"]
        assert before.item() == pytest.approx(dino_loss(predicted.permute(2, 0, 1, 3).flatten(1, 2), z[:, 1:].permute(2, 0, 1, 3).flatten(1, 2), center).item(), abs=1e-5)
        center = 0.9 * center + 0.1 * z[:, 1:].mean((0, 1))[:, None]
        assert torch.allclose(module.center, center, atol=1e-6)
    module.eval()(z, None, predicted)
    assert torch.allclose(module.center, center, atol=1e-6) and not module.center.requires_grad


def test_state_goes_on_bit_by_bit():
    "Two steps in a row, or one step, a checkpoint and one step: the same numbers."
    def make(): torch.manual_seed(1); return only(dino=1.0, sigreg=1.0, inverse=1.0, projector=[8])
    batches = [(normal(4, 3, 1, 4, seed=i).float(), normal(4, 2, 2, seed=i).float(), normal(4, 2, 1, 4, seed=i + 9).float()) for i in range(2)]
    straight = make()
    straight(*batches[0])
    kept, generator = {name: tensor.clone() for name, tensor in straight.state_dict().items()}, torch.get_rng_state()
    expected = straight(*batches[1])
    resumed = make()
    resumed.load_state_dict(kept); torch.set_rng_state(generator)
    assert all(torch.equal(value, expected[name]) for name, value in resumed(*batches[1]).items())
    assert all(torch.equal(tensor, straight.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    assert "center" in kept and not any("sigreg" in name for name in kept)


def test_directions_are_new_each_time_and_follow_the_seed():
    z, module = normal(8, 3, 1, 4).float(), only(sigreg=1.0)
    first, second = module(z, None, None), module(z, None, None)
    torch.manual_seed(0); again = only(sigreg=1.0)
    torch.manual_seed(5); one = again(z, None, None)
    torch.manual_seed(5); other = again(z, None, None)
    assert first["sigreg"] != second["sigreg"] and one["sigreg"] == other["sigreg"]


@pytest.mark.parametrize("latents_in", [torch.float32, torch.bfloat16])
def test_statistics_stay_exact_under_bf16(latents_in):
    weights = dict.fromkeys(TERMS, 1.0) | dict(inverse=0.0)
    module = only(shape=(2, 16), **weights).eval()
    z = (normal(32, 3, 2, 16) + 0.5).to(latents_in)
    predicted = z[:, 1:] + (0.1 * normal(32, 2, 2, 16, seed=1)).to(latents_in)
    torch.manual_seed(3); exact = module(z.float(), None, predicted.float())
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16): terms = module(z, None, predicted)
    for name, value in terms.items():
        assert value.dtype == torch.float32 and value.item() == pytest.approx(exact[name].item(), rel=1e-5, abs=1e-6), name


def test_bf16_with_networks_inside_is_finite_and_near():
    module = only(shape=(2, 16), projector=[32, 32], **dict.fromkeys(TERMS, 1.0)).eval()
    z, actions, predicted = normal(32, 3, 2, 16).float().requires_grad_(), normal(32, 2, 2).float(), normal(32, 2, 2, 16, seed=1).float()
    torch.manual_seed(3); exact = module(z, actions, predicted)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16): terms = module(z, actions, predicted)
    for name, value in terms.items(): assert value.item() == pytest.approx(exact[name].item(), rel=0.03, abs=3e-3), name
    sum(terms.values()).backward()
    assert z.grad.isfinite().all() and z.grad.abs().max() > 0


def test_collapsed_latents_have_finite_slopes():
    module = only(shape=(1, 8), **dict.fromkeys(TERMS, 1.0))
    z = torch.full((16, 3, 1, 8), 0.3, requires_grad=True)
    sum(module(z, torch.zeros(16, 2, 2), z[:, 1:]).values()).backward()
    assert z.grad.isfinite().all()
