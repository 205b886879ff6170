"The losses of two views are their definitions; a term is declared once; the module keeps its promises."
import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.nn import regularizer
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
from worldmodels_nb.nn.regularizer import (
    TERMS,
    InverseTerm,
    Regularizer,
    barlow_loss,
    dino_loss,
    invariance_loss,
    loss_term,
)
from worldmodels_nb.settings import FURTHER_TERMS, Settings, SettingsError, make_settings

NAMES = ("variance", "covariance", "invariance", "barlow", "dino", "sigreg", "smoothness",
         "within_variance", "within_covariance", "inverse")
ALL = dict.fromkeys(NAMES, 1.0)
JOYSTICK = ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])
BUTTONS = ActionSpec("discrete", 4)
KEYS = Settings().flat()
seeds = st.integers(0, 2**31 - 1)


def seeded(seed): return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def settings_with(sections=None, **loss):
    "All terms off but for these; the weight of a term with a section of its own stands there."
    values = {name: dict(own) for name, own in (sections or {}).items()}
    for name, value in (dict.fromkeys(NAMES, 0.0) | loss).items():
        has_section = f"loss.{name}.weight" in KEYS
        section, key = (f"loss.{name}", "weight") if has_section else ("loss", name)
        values.setdefault(section, {})[key] = value
    return make_settings(values)


def only(action=JOYSTICK, shape=(1, 4), weight=1.0, sections=None, **loss):
    return Regularizer(shape, action, settings_with(sections, **loss), weight)


# the definitions, with loops

def mean(values): return sum(values) / len(values)
def columns(z): return [list(column) for column in zip(*z.tolist())]
def cov(x, y): return mean([(p - mean(x)) * (q - mean(y)) for p, q in zip(x, y)])


def softmax(values):
    total = sum(map(math.exp, values))
    return [math.exp(v) / total for v in values]


def loop_invariance(a, b):
    return mean([(p - q)**2 for row, other in zip(a.tolist(), b.tolist()) for p, q in zip(row, other)])


def loop_barlow(a, b, off_diagonal=0.0051, eps=1e-5):
    total = 0.0
    for (i, x), (j, y) in product(enumerate(columns(a)), enumerate(columns(b))):
        c = cov(x, y) / math.sqrt((cov(x, x) + eps) * (cov(y, y) + eps))
        total += (1 - c)**2 if i == j else off_diagonal * c**2
    return total


def loop_dino(student, teacher, center, tau_s=0.1, tau_t=0.04):
    costs = []
    for a, b in zip(student.tolist(), teacher.tolist()):
        goal, guess = softmax([(x - c) / tau_t for x, c in zip(b, center)]), softmax([x / tau_s for x in a])
        costs.append(-sum(p * math.log(q) for p, q in zip(goal, guess)))
    return mean(costs)


@given(seeds, st.integers(2, 7), st.integers(1, 5), st.sampled_from([0.01, 1.0, 4.0]))
@budget(max_examples=25, deadline=None)
def test_every_loss_is_its_definition(seed, n, d, scale):
    a, b = normal(n, d, seed=seed, scale=scale), normal(n, d, seed=seed + 1, scale=scale)
    c = normal(d, seed=seed + 2)
    pairs = [
        (invariance_loss(a, b), loop_invariance(a, b)),
        (barlow_loss(a, b, 0.3, 1e-4), loop_barlow(a, b, 0.3, 1e-4)),
        (dino_loss(a, b, c, 0.9, 0.5), loop_dino(a, b, c.tolist(), 0.9, 0.5)),
    ]
    for value, loop in pairs: assert value.item() == pytest.approx(loop, abs=1e-10, rel=1e-10)


def test_the_defaults_are_those_of_the_papers():
    a, b = normal(6, 4), normal(6, 4, seed=1)
    assert barlow_loss(a, b).item() == pytest.approx(loop_barlow(a, b), abs=1e-10)
    assert dino_loss(a, b, torch.zeros(4)).item() == pytest.approx(loop_dino(a, b, [0.0] * 4), abs=1e-10)


# Barlow Twins

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


def test_barlow_is_of_torchs_own_correlations():
    latent = normal(4096, 8)
    prediction = latent + 0.3 * normal(4096, 8, seed=1)
    c = torch.corrcoef(torch.cat([prediction, latent], 1).T)[:8, 8:]
    diagonal = (1 - c.diagonal()).square().sum()
    rest = c.square().sum() - c.diagonal().square().sum()
    exact = (diagonal + 0.0051 * rest).item()
    assert barlow_loss(prediction, latent, eps=1e-300).item() == pytest.approx(exact, abs=1e-12)
    assert barlow_loss(prediction, latent).item() == pytest.approx(exact, abs=1e-5)


@given(seeds, st.integers(3, 20), st.integers(2, 40))
@budget(max_examples=25, deadline=None)
def test_barlow_of_a_small_batch_has_a_least_value(seed, n, d):
    z = normal(n, d, seed=seed)
    assert barlow_loss(z, z, 1.0, 1e-12).item() >= d * d / (n - 1) - d - 1e-6


def test_barlow_with_one_view_has_a_diagonal_of_one():
    z, eps = normal(50, 6, scale=3.0), 1e-5
    assert barlow_loss(z, z, 0.0, eps).item() < 6 * eps**2
    corr = torch.corrcoef(z.T)
    rest = (corr.square().sum() - corr.diagonal().square().sum()).item()
    assert barlow_loss(z, z, 1.0, eps).item() == pytest.approx(rest, abs=1e-4)


# DINO

def test_dino_limits():
    sure, nobody = 5.0 * F.one_hot(torch.arange(8), 8).double(), torch.zeros(8)
    same = sure[:1].expand(8, -1)
    assert dino_loss(sure, sure, sure.mean(0)).item() < 1e-9
    assert dino_loss(same, same, nobody).item() < 1e-9
    assert dino_loss(same, same, same.mean(0)).item() == pytest.approx(5 / 0.1 * 7 / 8, abs=1e-6)
    unsure = dino_loss(torch.zeros(8, 8), normal(8, 8).float(), nobody).item()
    assert unsure == pytest.approx(math.log(8), abs=1e-6)


@given(seeds)
@budget(max_examples=20, deadline=None)
def test_dino_is_least_where_the_student_repeats_its_teacher(seed):
    teacher, center = normal(5, 4, seed=seed), normal(4, seed=seed + 1)
    repeated = (teacher - center) / 0.5 * 0.9                      # temperatures .9 and .5
    best = dino_loss(repeated, teacher, center, 0.9, 0.5).item()
    other = repeated + normal(5, 4, seed=seed + 2)
    assert best <= dino_loss(other, teacher, center, 0.9, 0.5).item() + 1e-12


# all three

LOSSES = {
    "barlow": lambda z: barlow_loss(z, z), "dino": lambda z: dino_loss(z, z, z.mean(0)),
}


@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_no_loss_takes_an_exact_collapse_apart(center, loss):
    z = torch.full((64, 4), center, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(loss(z), z)
    assert (slope - slope.mean(0)).abs().max() < 1e-12


def test_gradients_are_right():
    a, b = (normal(2, 5, 3, seed=seed).requires_grad_() for seed in (0, 1))
    check, center = torch.autograd.gradcheck, torch.zeros(3, dtype=torch.float64)
    assert check(invariance_loss, (a, b)) and check(barlow_loss, (a, b))
    for temperatures in ((0.8, 0.4), (0.7, 0.3)):
        assert check(lambda z, t=temperatures: dino_loss(z, b, center, *t), a)
    dino_loss(a, b, center).backward()
    assert b.grad is None


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="train.batch_size"):
        barlow_loss(torch.zeros(3, 1, 4), torch.zeros(3, 1, 4))


@given(seeds, st.integers(1, 4))
@budget(max_examples=15, deadline=None)
def test_a_sheet_per_token_is_the_mean_over_a_loop(seed, tokens):
    a, b = normal(tokens, 6, 3, seed=seed), normal(tokens, 6, 3, seed=seed + 1)
    centers = normal(tokens, 1, 3, seed=seed + 2)
    for loss, inputs in ((barlow_loss, (a, b)), (invariance_loss, (a, b)), (dino_loss, (a, b, centers))):
        looped = mean([loss(*sheets).item() for sheets in zip(*inputs)])
        assert loss(*inputs).item() == pytest.approx(looped, abs=1e-12)


# a term is declared once

@pytest.fixture
def registry():
    "The tables of terms, put back as they were."
    tables = (TERMS, FURTHER_TERMS)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before):
        table.clear()
        table.update(old)


def test_the_terms_of_the_book_in_their_order():
    assert tuple(TERMS) == NAMES and not FURTHER_TERMS


def test_a_further_term_is_added_in_one_place(registry):
    @loss_term("toy", inputs="latents")
    def toy(x, s): return x.abs().mean() + s.std_target

    settings = make_settings({"loss": {"toy": 0.5}})
    assert settings.loss.weight("toy") == 0.5 and settings.flat()["loss.toy"] == 0.5
    module, z = Regularizer((2, 4), JOYSTICK, settings, weight=3.0), normal(4, 3, 2, 4).float()
    terms = module(z, torch.rand(4, 2, 2), None)
    assert module.weights["toy"] == 1.5 and set(terms) == set(module.weights) > {"variance"}
    assert terms["toy"].item() == pytest.approx(z.abs().mean().item() + 1, rel=1e-6)
    assert "toy" not in Regularizer((2, 4), JOYSTICK, Settings(), 1.0).weights   # off if nobody asks


def test_without_its_declaration_the_key_is_unknown():
    with pytest.raises(SettingsError, match="unknown setting 'loss.toy'"):
        make_settings({"loss": {"toy": 0.5}})


def test_a_further_term_has_its_own_default_weight(registry):
    loss_term("toy", inputs="latents", default=0.25)(lambda x, s: x.mean())
    assert only().weights == {"toy": 0.25}
    assert Regularizer((1, 4), JOYSTICK, make_settings({"loss": {"toy": 0.0}}), 1.0).weights.keys() == {
        "variance", "covariance", "smoothness", "inverse"}


def test_a_term_may_be_a_module_with_weights_of_its_own(registry):
    @loss_term("toy", inputs="two_views", statistic=True)
    class Toy(nn.Module):
        def __init__(self, shape, action, s):
            super().__init__()
            self.map = nn.Linear(shape[1], action.n)
        def forward(self, a, b): return F.mse_loss(self.map(a), self.map(b))

    module = only(toy=1.0, projector=[8, 6])
    z, predicted = normal(4, 3, 1, 4).float(), normal(4, 2, 1, 4, seed=1).float()
    assert module.two_views and module.terms["toy"].map.weight.shape == (2, 6)
    module(z, None, predicted)["toy"].backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    with pytest.raises(SettingsError, match="loss.toy needs the model's prediction"): module(z, None, None)
    with pytest.raises(SettingsError, match="train.batch_size"): module(z[:1], None, predicted[:1])


def test_a_further_term_in_time_sees_latents_and_actions(registry):
    loss_term("toy", inputs="time")(lambda z, actions, s: (z[:, 1:].mean(-1) - actions).square().mean())
    z, actions = normal(4, 3, 1, 4).float(), normal(4, 2, 1).float()
    expected = (z[:, 1:].mean(-1) - actions).square().mean()
    assert torch.equal(only(toy=1.0, projector=[8])(z, actions, None)["toy"], expected)


@pytest.mark.parametrize("name", ["eps", "views", "prediction", "jepa", "two words", "loss.toy"])
def test_names_that_mean_something_else_are_refused(name, registry):
    with pytest.raises(ValueError, match="cannot be called"):
        loss_term(name, inputs="latents")(variance_loss)
    assert tuple(TERMS) == NAMES and not FURTHER_TERMS


def test_a_name_is_given_once_and_a_cell_may_be_run_again(registry):
    with pytest.raises(ValueError, match="'variance' is declared already, by .*_variance"):
        loss_term("variance", inputs="latents")(covariance_loss)
    for _ in range(2): loss_term("toy", inputs="latents")(covariance_loss)
    assert tuple(TERMS) == (*NAMES, "toy")


def test_inputs_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="the nearest known one is 'two_views'"):
        loss_term("toy", inputs="two_view")


# what the module computes

def sheets(x): return x.permute(2, 0, 1, 3).flatten(1, 2)


def test_tokens_do_not_share_statistics():
    "Two token positions, each on one point, far from one another: that is a collapse, not spread."
    z = torch.stack([torch.full((4, 3, 5), -1.0), torch.full((4, 3, 5), 1.0)], dim=2)
    terms = only(shape=(2, 5), variance=1.0, barlow=1.0, views="one")(z, None, None)
    assert terms["variance"].item() == pytest.approx(0.99) and terms["barlow"].item() == pytest.approx(5)


def test_module_computes_each_term_on_the_right_samples():
    z, predicted, actions = normal(4, 3, 2, 5), normal(4, 2, 2, 5, seed=1), normal(4, 2, 2, seed=2)
    module = only(shape=(2, 5), **ALL).double()
    state, center = torch.get_rng_state(), module.terms["dino"].center.clone()
    terms = module(z, actions, predicted)
    every, a, b = sheets(z), sheets(predicted), sheets(z[:, 1:])
    torch.set_rng_state(state)
    read = module.terms["inverse"].network(z)
    expected = {
        "variance": variance_loss(every), "covariance": covariance_loss(every),
        "invariance": invariance_loss(a, b), "barlow": barlow_loss(a, b), "dino": dino_loss(a, b, center),
        "sigreg": sigreg_loss(every), "within_variance": within_variance_loss(sheets(time_centred(z))),
        "within_covariance": within_covariance_loss(sheets(time_centred(z))),
        "smoothness": smoothness_loss(z),
        "inverse": inverse_loss(read, actions),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), abs=1e-12), name


CHANGES = [
    {"loss": {"std_target": 3.0}}, {"loss": {"eps": 0.5}}, {"loss": {"within_target": 3.0}},
    {"loss.barlow": {"off_diagonal": 2.0}}, {"loss.barlow": {"eps": 0.5}},
    {"loss.dino": {"student_temperature": 2.0}}, {"loss.dino": {"teacher_temperature": 2.0}},
    {"loss.sigreg": {"directions": 5}}, {"loss.sigreg": {"points": 5}}, {"loss.sigreg": {"largest": 1.0}},
]


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_every_setting_reaches_its_loss_and_no_other(changed):
    (section,), z, predicted = changed, normal(4, 3, 1, 5), normal(4, 2, 1, 5, seed=1)
    def terms(sections):
        torch.manual_seed(0)
        names = [*NAMES[:6], "within_variance"]
        return only(shape=(1, 5), sections=sections, **dict.fromkeys(names, 1.0))(z, None, predicted)
    before, after = terms({}), terms(changed)
    different = [name for name in before if before[name] != after[name]]
    shared = dict(std_target=["variance"], within_target=["within_variance"],
                  eps=["variance"])  # what spreads more than γ_w has no hinge
    (key, _), = changed[section].items()
    assert different == (shared[key] if section == "loss" else [section.removeprefix("loss.")])


def test_one_view_looks_at_latents_alone():
    z = normal(4, 3, 1, 5)
    module = only(shape=(1, 5), barlow=1.0, dino=1.0, views="one").double().eval()
    assert not module.two_views
    terms, samples, center = module(z, None, None), z.flatten(0, 2), module.terms["dino"].center[0]
    assert terms["barlow"].item() == pytest.approx(barlow_loss(samples, samples).item(), abs=1e-12)
    assert terms["dino"].item() == pytest.approx(dino_loss(samples, samples, center).item(), abs=1e-12)
    assert terms == module(z, None, normal(4, 2, 1, 5, seed=1))


@pytest.mark.parametrize("name", NAMES)
def test_two_views_are_asked_for_only_where_they_are_compared(name):
    module, z = only(**{name: 1.0}), normal(4, 3, 1, 4).float()
    assert module.two_views == (name in ("invariance", "barlow", "dino"))
    if not module.two_views: assert module(z, normal(4, 2, 2).float(), None).keys() == {name}
    else:
        with pytest.raises(SettingsError, match=f"^loss.{name} needs .* loss.views"): module(z, None, None)


TWO_VIEWS = [{"variance": 1.0, "covariance": 0.1, "invariance": 1.0}, {"barlow": 1.0}, {"dino": 1.0}]


@pytest.mark.parametrize("terms", TWO_VIEWS, ids=str)
def test_a_term_of_two_views_wants_both(terms):
    module, z, actions = only(shape=(1, 16), **terms), torch.randn(4, 4, 1, 16), torch.rand(4, 3, 2)
    with pytest.raises(SettingsError, match="needs the model's prediction beside its latents"):
        module(z, actions, None)
    assert module(z, actions, z[:, 1:])[list(terms)[-1]].isfinite()


def test_the_recipe_asks_for_no_prediction_and_twins_do():
    recipe = Regularizer((1, 8), JOYSTICK, Settings(), 1.0)
    assert [recipe.two_views, only(barlow=1.0).two_views, only(barlow=1.0, views="one").two_views] == [
        False, True, False]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("views", ["two", "one"])
def test_who_reaches_the_encoder(name, views):
    if (name, views) == ("invariance", "one"): return
    module, z = only(**{name: 1.0}, views=views).double(), normal(4, 3, 1, 4).requires_grad_()
    predicted = normal(4, 2, 1, 4, seed=1).requires_grad_()
    term = module(z, normal(4, 2, 2), predicted if module.two_views else None)[name]
    slope, = torch.autograd.grad(term, z, allow_unused=True)
    assert module.reaches_encoder == (slope is not None) == ((name, views) != ("dino", "two"))


def test_one_term_that_reaches_the_encoder_is_enough():
    assert only(dino=1.0, variance=1.0).reaches_encoder and not only().reaches_encoder
    assert not only(weight=0.0, variance=1.0).reaches_encoder


def test_who_learns_from_two_views():
    z, predicted = normal(4, 3, 1, 4).requires_grad_(), normal(4, 2, 1, 4, seed=1).requires_grad_()
    for name, taught in (("dino", False), ("barlow", True), ("invariance", True)):
        term = only(**{name: 1.0}).double()(z, None, predicted)[name]
        slopes = torch.autograd.grad(term, (z, predicted), allow_unused=True)
        assert (slopes[0] is not None) == taught and slopes[1].abs().max() > 0


def test_invariance_with_one_view_is_refused():
    with pytest.raises(ValueError, match="loss.invariance .* loss.views"): only(invariance=1.0, views="one")


def test_the_module_refuses_one_view_by_itself():
    "Settings say it first; a term declared later is refused here."
    lone = settings_with(views="one")
    lone = lone.model_copy(update={"loss": lone.loss.model_copy(update={"invariance": 1.0})})
    with pytest.raises(SettingsError, match='^loss.invariance compares two views; set loss.views = "two"'):
        Regularizer((1, 4), JOYSTICK, lone, 1.0)


@pytest.mark.parametrize("name", ["variance", "covariance", "barlow", "dino", "sigreg"])
def test_a_batch_of_one_is_refused_in_training_and_measured_in_validation(name):
    module, z = only(**{name: 1.0}), normal(1, 9, 1, 4).float()
    with pytest.raises(ValueError, match="train.batch_size"): module(z, None, z[:, 1:])
    assert module.eval()(z, None, z[:, 1:])[name].isfinite()


@pytest.mark.parametrize("name", ["barlow", "dino", "sigreg", "variance", "smoothness", "inverse"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_one_sample_says_nothing_of_is_left_out_of_a_validation(name, tokens):
    module = only(shape=(tokens, 4), smoothness=1.0, **({name: 1.0} if name != "smoothness" else {})).eval()
    z, actions = normal(1, 2, tokens, 4).float(), torch.zeros(1, 1, 2)           # one window of one step
    terms = module(z, actions, z[:, 1:])
    assert set(terms) == {"smoothness", name} - {"barlow"}
    assert all(term.isfinite() for term in terms.values())
    with pytest.raises(ValueError, match="two samples"): barlow_loss(z[:, 1, :1], z[:, 1, :1])


def test_of_several_samples_no_error_is_forgiven(monkeypatch):
    module, z = only(sigreg=1.0).eval(), normal(1, 2, 1, 4).float()
    def fails(*views): raise ValueError("another reason")
    monkeypatch.setattr(module.terms["sigreg"], "forward", fails)
    with pytest.raises(ValueError, match="another reason"): module(z, None, None)


# weights, and what is off

weights_of_some = st.dictionaries(st.sampled_from(NAMES), st.floats(0, 30), min_size=1)


@given(weights_of_some, st.sampled_from([0.0, 0.25, 1.0]))
@budget(max_examples=30, deadline=None)
def test_weights_are_multiplied_and_zero_costs_nothing(weights, weight):
    module = only(weight=weight, **weights)
    assert module.weights == {name: weight * own for name, own in weights.items() if weight * own > 0}
    z = normal(4, 3, 1, 4).float()
    assert module(z, normal(4, 2, 2).float(), z[:, 1:]).keys() == module.weights.keys()
    assert bool(list(module.parameters())) == ("inverse" in module.weights)


def test_every_term_at_once():
    full = only(shape=(2, 8), weight=0.5, projector=[16, 12], **ALL)
    z, predicted, actions = torch.randn(4, 9, 2, 8), torch.randn(4, 8, 2, 8), torch.rand(4, 8, 2)
    assert full(z, actions, predicted).keys() == ALL.keys() and set(full.weights.values()) == {0.5}
    center = full.terms["dino"].center
    assert full.two_views and center.shape == (2, 1, 12)
    expected = 0.1 * full.projector(z)[:, 1:].mean((0, 1)).detach()[:, None]
    torch.testing.assert_close(center, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("projector", [[], [8]])
def test_a_weight_of_zero_makes_an_empty_module(projector):
    module = only(weight=0.0, projector=projector, **ALL)
    assert module(torch.zeros(1, 2, 1, 4), None, None) == {} == module.weights == module.state_dict()
    assert not module.two_views and not list(module.parameters()) and not list(module.buffers())


def test_terms_that_are_off_are_not_computed(monkeypatch):
    def refuse(*_): raise AssertionError("computed")
    for name in NAMES[1:]: monkeypatch.setattr(regularizer, f"{name}_loss", refuse)
    assert only(variance=1.0)(normal(4, 3, 1, 4), None, None).keys() == {"variance"}
    for name in NAMES[1:]:
        z, actions = normal(4, 3, 1, 4).float(), normal(4, 2, 2).float()
        with pytest.raises(AssertionError, match="computed"): only(**{name: 1.0})(z, actions, z[:, 1:])


def test_discrete_actions_are_read_by_their_logits():
    module, z = only(BUTTONS, inverse=1.0), normal(4, 3, 1, 4).float()
    pressed = torch.tensor([[0, 1], [2, 3], [3, 3], [0, 0]])
    expected = inverse_loss(module.terms["inverse"].network(z), pressed).item()
    assert module(z, pressed, None)["inverse"].item() == pytest.approx(expected)


def test_projector_stands_before_batch_terms_only():
    module = only(shape=(2, 4), projector=[16, 6], variance=1.0, dino=1.0, smoothness=1.0, inverse=1.0)
    z, predicted = normal(4, 3, 2, 4).float(), normal(4, 2, 2, 4, seed=1).float()
    actions = normal(4, 2, 2).float()
    shapes = [layer.weight.shape for layer in module.projector if hasattr(layer, "weight")]
    assert shapes == [(16, 4), (6, 16)] and module.terms["dino"].center.shape == (2, 1, 6)
    terms, samples = module(z, actions, predicted), sheets(module.projector(z))
    read = module.terms["inverse"].network(z)
    assert terms["variance"].item() == pytest.approx(variance_loss(samples).item(), abs=1e-6)
    assert terms["smoothness"].item() == pytest.approx(smoothness_loss(z).item(), abs=1e-6)
    assert terms["inverse"].item() == pytest.approx(inverse_loss(read, actions).item(), abs=1e-6)
    terms["variance"].backward()
    assert all(parameter.grad is not None for parameter in module.projector.parameters())
    assert not list(only(projector=[16, 6], smoothness=1.0).parameters())


# state and precision

def test_dino_center_follows_the_teacher_in_training_only():
    module, z = only(dino=1.0, shape=(2, 4)), normal(3, 3, 2, 4).float()
    predicted, center = normal(3, 2, 2, 4, seed=1).float(), torch.zeros(2, 1, 4)
    for _ in range(3):
        expected = dino_loss(sheets(predicted), sheets(z[:, 1:]), center).item()
        assert module(z, None, predicted)["dino"].item() == pytest.approx(expected, abs=1e-5)
        center = 0.9 * center + 0.1 * z[:, 1:].mean((0, 1))[:, None]
        assert torch.allclose(module.terms["dino"].center, center, atol=1e-6)
    module.eval()(z, None, predicted)
    kept = module.terms["dino"].center
    assert torch.allclose(kept, center, atol=1e-6) and not kept.requires_grad


def test_state_goes_on_bit_by_bit():
    "Two steps in a row, or one step, a checkpoint and one step: the same numbers."
    def make():
        torch.manual_seed(1)
        return only(dino=1.0, sigreg=1.0, inverse=1.0, projector=[8])
    def batch(seed):
        shapes = ((4, 3, 1, 4), seed), ((4, 2, 2), seed), ((4, 2, 1, 4), seed + 9)
        return [normal(*shape, seed=own).float() for shape, own in shapes]
    straight = make()
    straight(*batch(0))
    kept = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    generator = torch.get_rng_state()
    expected, resumed = straight(*batch(1)), make()
    resumed.load_state_dict(kept)
    torch.set_rng_state(generator)
    assert all(torch.equal(value, expected[name]) for name, value in resumed(*batch(1)).items())
    after = straight.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in resumed.state_dict().items())
    assert "terms.dino.center" in kept and not any("sigreg" in name for name in kept)


def test_directions_are_new_each_time_and_follow_the_seed():
    z, module = normal(8, 3, 1, 4).float(), only(sigreg=1.0)
    first, second = module(z, None, None), module(z, None, None)
    again, values = only(sigreg=1.0), []
    for _ in range(2):
        torch.manual_seed(5)
        values.append(again(z, None, None)["sigreg"])
    assert first["sigreg"] != second["sigreg"] and values[0] == values[1]


@pytest.mark.parametrize("latents_in", [torch.float32, torch.bfloat16])
def test_statistics_stay_exact_under_bf16(latents_in):
    module = only(shape=(2, 16), **ALL | {"inverse": 0.0}).eval()
    z = (normal(32, 3, 2, 16) + 0.5).to(latents_in)
    predicted = z[:, 1:] + (0.1 * normal(32, 2, 2, 16, seed=1)).to(latents_in)
    torch.manual_seed(3)
    exact = module(z.float(), None, predicted.float())
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16): terms = module(z, None, predicted)
    for name, value in terms.items():
        assert value.dtype == torch.float32, name
        assert value.item() == pytest.approx(exact[name].item(), rel=1e-5, abs=1e-6), name


def test_bf16_with_networks_inside_is_finite_and_near():
    module = only(shape=(2, 16), projector=[32, 32], **ALL).eval()
    z, actions = normal(32, 3, 2, 16).float().requires_grad_(), normal(32, 2, 2).float()
    predicted = normal(32, 2, 2, 16, seed=1).float()
    torch.manual_seed(3)
    exact = module(z, actions, predicted)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16): terms = module(z, actions, predicted)
    for name, value in terms.items():
        assert value.item() == pytest.approx(exact[name].item(), rel=0.03, abs=3e-3), name
    sum(terms.values()).backward()
    assert z.grad.isfinite().all() and z.grad.abs().max() > 0


def test_collapsed_latents_have_finite_slopes():
    module = only(shape=(1, 8), **ALL)
    z = torch.full((16, 3, 1, 8), 0.3, requires_grad=True)
    sum(module(z, torch.zeros(16, 2, 2), z[:, 1:]).values()).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("low, high", [
    ([-100.0] * 2, [100.0] * 2), ([0.0, -5.0], [.02, 1.0]), ([3.0] * 2, [4.0] * 2)])
def test_the_inverse_term_has_no_units(low, high):
    "The same motions in other units cost the same."
    terms, z, unit = [], normal(4, 3, 1, 4).float(), torch.rand(4, 2, 2, generator=seeded(0)) * 2 - 1
    for bounds in (([-1.0] * 2, [1.0] * 2), (low, high)):
        spec = ActionSpec("continuous", 2, *bounds)
        torch.manual_seed(0)
        module, (least, most) = InverseTerm((1, 4), spec, Settings().loss), torch.tensor(bounds)
        terms.append(module(z, least + (unit + 1) / 2 * (most - least)).item())
    assert terms[0] == pytest.approx(terms[1], rel=1e-3)
