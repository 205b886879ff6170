"JEPA's three targets: who sees the present, who the future, and who learns from what."
import pytest
import torch

from worldmodels_nb.models.base import fresh_model
from worldmodels_nb.models.jepa import JEPA
from worldmodels_nb.settings import Settings, SettingsError, TrainingSettings
from worldmodels_nb.training.fit import fit_windows

TARGETS = ["shared", "ema_target", "ema_both"]
NO_TERMS = {"covariance": 0.0, "smoothness": 0.0, "inverse": 0.0}


@pytest.fixture(scope="module")
def fresh(sample, sample_frames):
    "fresh(jepa={…}): an untrained JEPA that knows the sample's mean frame."
    return lambda **sections: fresh_model(JEPA.registered, Settings(**sections), sample.spec, sample_frames)


@pytest.fixture(scope="module")
def trained(fresh, sample_windows):
    "A JEPA of each target after some seconds on the sample, and one whose regularizer is off."
    recipe = TrainingSettings(steps=120, batch_size=24, learning_rate=2e-3)
    models = {target: fresh(jepa={"target": target}) for target in TARGETS}
    models["cheat"] = fresh(loss={"jepa": 0.0})
    return {name: fit_windows(model, sample_windows, recipe).model.eval() for name, model in models.items()}


@pytest.fixture(scope="module")
def everything(sample_windows):
    "All windows of the sample."
    return sample_windows.batch(range(len(sample_windows)))


def test_a_shorter_rollout_begins_a_longer_one(trained, everything):
    model = trained["shared"]
    with torch.no_grad():
        z = model.encode(everything.frames)
        long, short = (model.rollout(z[:, :1], None, everything.actions[:, :k]) for k in (4, 2))
    torch.testing.assert_close(long[:, :2], short, rtol=0, atol=1e-6)


def test_without_a_regularizer_it_collapses(trained, sample_frames):
    with torch.no_grad():
        spread = {name: model.encode(sample_frames[:, None]).std(0).mean() for name, model in trained.items()}
    assert spread["cheat"] < spread["shared"] / 2


def test_every_target_beats_the_untrained_model(trained, fresh, everything):
    "One-step errors, as a share of the distance that the truth moves."
    errors = {}
    with torch.no_grad():
        for name, model in {"untrained": fresh().eval(), **trained}.items():
            truth, action = model.encode(everything.frames), everything.actions[:, :1]
            guess = model.rollout(truth[:, :1], action[:, :0], action)
            moved = (truth[:, 1] - truth[:, 0]).square().mean()
            errors[name] = (guess[:, 0] - truth[:, 1]).square().mean() / moved
    assert all(errors[target] < errors["untrained"] for target in TARGETS)


MOVED = {"shared": [10, 8], "ema_target": [10, 0, 8], "ema_both": [0, 0, 8]}    # online, copy, predictor


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_prediction_error_alone_moves(target, fresh, sample_windows):
    model = fresh(jepa={"target": target}, loss=NO_TERMS | {"variance": 1e-30})
    model.loss(sample_windows.sample(8, seed=0, step=0)).total.backward()
    parts = [part for part in (model.encoder, model.target, model.predictor) if part is not None]
    grads = [[p.grad for p in part.parameters() if p.grad is not None] for part in parts]
    assert [sum(g.abs().max().item() > 1e-20 for g in own) for own in grads] == MOVED[target]


def test_the_copy_follows_by_its_decay(fresh):
    model = fresh(jepa={"target": "ema_target"})
    before, online = next(model.target.parameters()).clone(), next(model.encoder.parameters())
    online.data += 1
    model.after_step(1, 10)
    wanted = 0.99 * before + 0.01 * online
    torch.testing.assert_close(next(model.target.parameters()), wanted, rtol=0, atol=1e-5, check_stride=False)


def test_with_ema_both_the_copy_encodes(trained, everything):
    for target in ("shared", "ema_target"):
        assert trained[target].inference_encoder is trained[target].encoder
    copied = trained["ema_both"]
    assert copied.inference_encoder is copied.target
    with torch.no_grad():
        x, z = copied.preprocess(everything.frames), copied.encode(everything.frames)
        assert torch.equal(z, copied.embed(copied.target, x))
        assert not torch.allclose(z, copied.embed(copied.encoder, x))
    assert {n.split(".")[0] for n in copied.encoder_state()} == {"target", "mean_frame", "frame_scale"}


NOTHING_LEFT = [
    {"jepa": 0.0},
    NO_TERMS | {"variance": 0.0, "dino": {"weight": 1.0}},
]


@pytest.mark.parametrize("loss", NOTHING_LEFT, ids=["no weight", "dino alone"])
def test_an_online_encoder_that_learns_nothing_is_refused(loss, fresh):
    with pytest.raises(SettingsError, match="none that is on reaches it"):
        fresh(jepa={"target": "ema_both"}, loss=loss)


BARLOW = {"barlow": {"weight": 1.0}}
VIEWS = [(BARLOW, True), ({}, False), (BARLOW | {"views": "one"}, False)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss, two", VIEWS, ids=["two views", "no such term", "one view"])
def test_terms_see_the_prediction_beside_the_online_latents(target, loss, two, fresh, everything):
    model, given = fresh(jepa={"target": target}, loss=loss), []
    model.regularizer.register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.no_grad():
        model.loss(everything)
        (online, _, predicted), = given
        wanted = model.embed(model.encoder, model.preprocess(everything.frames))
        assert torch.equal(online, wanted) and model.regularizer.two_views == two
        start = model.encode(everything.frames)[:, :1]
        assert torch.equal(predicted, model.rollout(start, None, everything.actions))


@pytest.mark.parametrize("target", ["ema_target", "ema_both"])
def test_target_encoder_gets_no_gradient_and_follows_slowly(target, tiny, small_model, random_windows):
    model = small_model(JEPA.registered, tiny(jepa={"target": target, "ema_decay": 0.9}), "continuous")
    before = [p.clone() for p in model.target.parameters()]
    model.loss(random_windows("continuous")).total.backward()
    assert all(p.grad is None for p in model.target.parameters())
    assert all(p.grad is not None for p in model.encoder.parameters())
    for p in model.encoder.parameters(): p.data.add_(1.0)
    model.after_step(1, 10)
    for slow, old, fast in zip(model.target.parameters(), before, model.encoder.parameters()):
        torch.testing.assert_close(slow.data, 0.9 * old + 0.1 * fast)


def graded(model, loss, least=0.0):
    "Which parts a loss moves."
    model.zero_grad()
    loss.backward()
    grads = {name: [p.grad for p in part.parameters() if p.grad is not None]
             for name, part in model.named_children()}
    return {name for name, own in grads.items() if any(g.abs().max() > least for g in own)}


LEARNS = [("shared", {"encoder", "predictor"}), ("ema_target", {"encoder", "predictor"}),
          ("ema_both", {"predictor"})]


@pytest.mark.parametrize("target, by_prediction", LEARNS)
def test_who_learns_from_what(target, by_prediction, tiny, small_model, random_windows):
    batch, by_terms = random_windows("continuous"), {"encoder", "regularizer"}
    cases = [({"jepa": 1e-30}, by_prediction, 1e-20),
             ({"prediction": 0.0}, by_terms, 0.0),
             ({"prediction": 0.0, "barlow": {"weight": 1.0}}, by_terms | {"predictor"}, 0.0)]
    for loss, wanted, least in cases:
        model = small_model(JEPA.registered, tiny(jepa={"target": target}, loss=loss), "continuous")
        assert graded(model, model.loss(batch).total, least) == wanted, loss


ENCODES = [("shared", "encoder"), ("ema_target", "encoder"), ("ema_both", "target")]


@pytest.mark.parametrize("target, part", ENCODES)
def test_the_inference_encoder_of_each_target(target, part, tiny, small_model):
    model = small_model(f"jepa:{target}", tiny(), "continuous").eval()
    assert model.inference_encoder is getattr(model, part)
    assert {name.split(".")[0] for name in model.encoder_state()} == {part, "mean_frame", "frame_scale"}


def test_stop_gradient_keeps_the_target_still(tiny, small_model, random_windows):
    grads = []
    for stop in (False, True):
        settings = tiny(jepa={"stop_gradient": stop}, loss=NO_TERMS | {"variance": 0.0})
        model = small_model(JEPA.registered, settings, "continuous")
        model.loss(random_windows("continuous")).total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters()]))
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("unroll", [1, 2, 3, None])
def test_predictions_are_fed_back(unroll, target, fresh, everything):
    "For U steps from each U-th latent of the present's side; a window that U does not divide ends earlier."
    steps = everything.actions.shape[1]
    model = fresh(jepa={"target": target, "unroll": unroll}, train={"window_steps": steps}).train()
    U, a = unroll or steps, everything.actions
    x = model.preprocess(everything.frames)
    online = model.embed(model.encoder, x)
    future = online if target == "shared" else model.embed(model.target, x)
    present = future if target == "ema_both" else online
    starts = [present[:, t - t % U] for t in range(steps)]
    paths = [model.predictor(start, a[:, t - t % U:t + 1])[:, -1] for t, start in enumerate(starts)]
    by_hand = (torch.stack(paths, 1) - future[:, 1:]).square().mean()
    torch.testing.assert_close(model.loss(everything).terms["prediction"], by_hand.detach())
