"The contract every registered model keeps, on random data of every kind the settings allow."
import itertools
import pytest
import torch
from worldmodels_nb.envs import ActionSpec
from worldmodels_nb.episodes import Batch, DataSpec
from worldmodels_nb.models import encdec, jepa
from worldmodels_nb.models.base import MODELS, build_model, count_parameters, freeze, model_class
from worldmodels_nb.settings import SettingsError, load_settings, make_settings, repo_root

DISCRETE, CONTINUOUS = ActionSpec("discrete", 3, None, None), ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])
STEPS, BATCH = 5, 4


def tiny(**sections):
    base = {"env": {"size": 16}, "model": {"latent_dim": 16, "patch_size": 4, "action_dim": 4}, "patch": {"channels": 8}, "cnn": {"base_filters": 4, "layers": 2},
            "vit": {"depth": 1, "heads": 2, "mlp_dim": 16}, "mlp": {"layers": 1, "hidden": 16}, "predictor": {"hidden": [16]},
            "decoder": {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "patch_size": 4}}
    return make_settings({s: base.get(s, {}) | sections.get(s, {}) for s in base | sections})


def windows(action, channels, stack, seed=0):
    rng = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (BATCH, stack - 1 + STEPS + 1, channels, 16, 16), dtype=torch.uint8, generator=rng)
    actions = torch.randint(0, 3, (BATCH, STEPS), generator=rng) if action is DISCRETE else torch.rand(BATCH, STEPS, 2, generator=rng) * 2 - 1
    return Batch(frames, actions, torch.zeros(BATCH, STEPS), torch.zeros(BATCH, STEPS, dtype=torch.bool))


def made(name, settings, action, channels, seed=0):
    torch.manual_seed(seed)
    model = build_model(name, settings, DataSpec((channels, 16, 16), action, [], []))
    return model.calibrate(windows(action, channels, 1).frames.flatten(0, 1))


def step(model, batch, times):
    optimizer, totals = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(times):
        loss = model.loss(batch)
        optimizer.zero_grad(); loss.total.backward(); optimizer.step()
        totals.append(loss.total.item())
    return totals


KINDS = list(itertools.product(sorted(MODELS), ["patch", "cnn", "vit", "mlp"], [(DISCRETE, 1, 3), (CONTINUOUS, 3, 1)], [False, True]))
KINDS = [k for k in KINDS if not (k[1] == "mlp" and k[3])]


@pytest.mark.parametrize("name, encoder, data, tokens", KINDS, ids=lambda v: str(v[1:]) if isinstance(v, tuple) else str(v))
def test_contract(name, encoder, data, tokens):
    action, channels, stack = data
    model = made(name, tiny(model={"encoder": encoder, "frame_stack": stack, "tokens": tokens, "latent_dim": 16, "patch_size": 4, "action_dim": 4}), action, channels)
    batch = windows(action, channels, stack)
    step(model, batch, 2)                                                        # a fresh decoder paints the mean frame, whatever is done
    model.eval()
    with torch.no_grad():
        z = model.encode(batch.frames)
        assert z.shape == (BATCH, STEPS + 1, *model.latent_shape)
        long = model.rollout(z[:, :1], batch.actions[:, :0], batch.actions)
        assert long.shape == (BATCH, STEPS, *model.latent_shape) and long.isfinite().all()
        for k in range(1, STEPS):                                                # a prefix of the longer one
            torch.testing.assert_close(model.rollout(z[:, :1], batch.actions[:, :0], batch.actions[:, :k]), long[:, :k])
        one = model.rollout(z[:, :1], batch.actions[:, :0], batch.actions[:, :1])  # and it can be taken up half-way with history
        history = model.rollout(z[:, :3], batch.actions[:, :2], batch.actions[:, 2:])
        assert one.shape[1] == 1 and history.shape[1] == STEPS - 2
        changed = batch.frames.clone()
        changed[:, -1] = 255 - changed[:, -1]                                    # the future does not leak into the past
        later = model.encode(changed)
        torch.testing.assert_close(later[:, :-1], z[:, :-1])
        assert not torch.allclose(later[:, -1], z[:, -1])
        flipped = batch.actions.flip(0)                                          # actions matter
        assert not torch.allclose(model.rollout(z[:, :1], batch.actions[:, :0], flipped), long)
        try: imagined = model.imagine(batch.frames[:, :stack], batch.actions)
        except NotImplementedError: return
        assert imagined.shape == (BATCH, STEPS, channels, 16, 16) and 0 <= imagined.min() <= imagined.max() <= 1


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("data", [(DISCRETE, 1, 3), (CONTINUOUS, 3, 1)], ids=["discrete", "continuous"])
def test_ten_steps_on_one_batch_lower_the_loss(name, data, tmp_path):
    from worldmodels_nb.training.fit import load_weights, save_weights
    action, channels, stack = data
    settings = tiny(model={"frame_stack": stack, "latent_dim": 16, "patch_size": 4, "action_dim": 4})
    model, batch = made(name, settings, action, channels), windows(action, channels, stack)
    totals = step(model, batch, 10)
    assert totals[-1] < totals[0]
    save_weights(model, tmp_path / "w.safetensors")
    again = made(name, settings, action, channels, seed=1)
    load_weights(again, tmp_path / "w.safetensors")
    torch.testing.assert_close(again.eval().encode(batch.frames), model.eval().encode(batch.frames), rtol=0, atol=0)


def test_target_encoder_gets_no_gradient_and_follows_slowly():
    settings = tiny(jepa={"target": "ema", "ema_decay": 0.9})
    model = made("jepa", settings, CONTINUOUS, 3)
    batch = windows(CONTINUOUS, 3, 1)
    before = [p.clone() for p in model.target.parameters()]
    model.loss(batch).total.backward()
    assert all(p.grad is None for p in model.target.parameters())
    assert all(p.grad is not None for p in model.encoder.parameters())
    for p in model.encoder.parameters(): p.data.add_(1.0)
    model.after_step(1, 10)
    for slow, old, fast in zip(model.target.parameters(), before, model.encoder.parameters()):
        torch.testing.assert_close(slow.data, 0.9 * old + 0.1 * fast)


def test_stop_gradient_keeps_the_target_still():
    grads = []
    for stop in (False, True):
        settings = tiny(jepa={"stop_gradient": stop}, loss={"variance": 0.0, "covariance": 0.0, "smoothness": 0.0, "inverse": 0.0})
        model = made("jepa", settings, CONTINUOUS, 3)
        batch = windows(CONTINUOUS, 3, 1)
        model.loss(batch).total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters()]))
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_frozen_model_gets_no_gradient(name):
    model, batch = made(name, tiny(), CONTINUOUS, 3), windows(CONTINUOUS, 3, 1)
    step(model, batch, 1)
    for p in model.parameters(): p.grad = None
    freeze(model)
    z = model.encode(batch.frames)
    assert not z.requires_grad and not model.training
    actions = batch.actions.requires_grad_(True)                                 # planners differentiate by actions
    model.rollout(z[:, :1], actions[:, :0], actions).sum().backward()
    assert actions.grad is not None and all(p.grad is None for p in model.parameters())


def test_models_of_one_run_see_with_equal_encoders():
    settings = load_settings(repo_root() / "settings.ini", "demo")
    spec = DataSpec((3, 64, 64), CONTINUOUS, [], [])
    sizes = {name: count_parameters(build_model(name, settings, spec))["encoder"] for name in MODELS}
    assert len(set(sizes.values())) == 1, sizes


def test_a_model_that_does_not_exist_is_refused():
    with pytest.raises(SettingsError, match="nearest known one is 'jepa'"): model_class("jeppa")
