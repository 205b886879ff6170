"The contract every registered model keeps, on random data of every kind the settings allow."
import importlib, itertools, pkgutil
import pytest
import torch
import worldmodels_nb.models
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.datasets import Batch
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.models.base import MODELS, build_model, model_class
from worldmodels_nb.training.fit import count_parameters, freeze
from worldmodels_nb.settings import SettingsError, _read_ini, load_settings, make_settings, repo_root

for module in pkgutil.iter_modules(worldmodels_nb.models.__path__): importlib.import_module(f"worldmodels_nb.models.{module.name}")  # whoever signs in is tested

DISCRETE, CONTINUOUS = ActionSpec("discrete", 3, None, None), ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])
STEPS, BATCH = 5, 4


def tiny(**sections):
    base = {"env": {"size": 16}, "model": {"latent_dim": 16, "patch_size": 4, "action_dim": 4}, "patch": {"channels": 8}, "cnn": {"base_filters": 4, "layers": 2},
            "vit": {"depth": 1, "heads": 2, "mlp_dim": 16}, "mlp": {"layers": 1, "hidden": 16}, "predictor": {"hidden": [16], "depth": 1, "heads": 2, "mlp_dim": 16},
            "decoder": {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "patch_size": 4, "channels": 4}, "masked": {"patch_size": 8}}
    return make_settings({s: base.get(s, {}) | sections.get(s, {}) for s in base | sections})


def windows(action, channels, stack, seed=0):
    rng = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (BATCH, stack - 1 + STEPS + 1, channels, 16, 16), dtype=torch.uint8, generator=rng)
    actions = torch.randint(0, 3, (BATCH, STEPS), generator=rng) if action is DISCRETE else torch.rand(BATCH, STEPS, 2, generator=rng) * 2 - 1
    return Batch(frames, actions, torch.zeros(BATCH, STEPS), torch.zeros(BATCH, STEPS, dtype=torch.bool))


def made(name, settings, action, channels, seed=0):
    torch.manual_seed(seed)
    name, _, target = name.partition(":")                                        # jepa:vjepa2 is a JEPA with that target
    if target: settings = settings.model_copy(update={"jepa": settings.jepa.model_copy(update={"target": target})})
    model = build_model(name, settings, DataSpec((channels, 16, 16), action, [], []))
    return model.fit_normalization(windows(action, channels, 1).frames.flatten(0, 1))


def step(model, batch, times):
    optimizer, totals = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3), []
    for _ in range(times):
        loss = model.loss(batch)
        optimizer.zero_grad(); loss.total.backward(); optimizer.step()
        totals.append(loss.total.item())
    return totals


NAMES = [*sorted(MODELS), "jepa:vjepa2", "jepa:default"]
KINDS = list(itertools.product(NAMES, ["patch", "cnn", "vit", "mlp"], [(DISCRETE, 1, 3), (CONTINUOUS, 3, 1)], [False, True]))
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


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("mode", ["vjepa2", "default"])
def test_target_encoder_gets_no_gradient_and_follows_slowly(mode):
    settings = tiny(jepa={"target": mode, "ema_decay": 0.9})
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


def graded(model, loss):
    "Which parts a loss moves."
    model.zero_grad(); loss.backward()
    return {name for name, part in model.named_children() if any(p.grad is not None and p.grad.any() for p in part.parameters())}


@pytest.mark.parametrize("mode, prediction, terms", [("none", {"encoder", "predictor"}, {"encoder", "regularizer"}), ("vjepa2", {"encoder", "predictor"}, {"encoder", "regularizer"}),
                                                     ("default", {"predictor"}, {"encoder", "regularizer"})])
def test_who_learns_from_what(mode, prediction, terms):
    batch = windows(CONTINUOUS, 3, 1)
    for loss, wanted in ((dict(jepa=1e-30), prediction), (dict(prediction=0.0), terms), (dict(prediction=0.0, barlow=1.0), terms | {"predictor"})):
        model = made("jepa", tiny(jepa={"target": mode}, loss=loss), CONTINUOUS, 3)
        found = graded(model, model.loss(batch).total)
        if loss.get("jepa"): found = {name for name, part in model.named_children() if max((p.grad.abs().max().item() for p in part.parameters() if p.grad is not None), default=0) > 1e-20}
        assert found == wanted, loss


@pytest.mark.parametrize("mode, eye", [("none", "encoder"), ("vjepa2", "encoder"), ("default", "target")])
def test_a_model_sees_through_its_eye_alone(mode, eye):
    model, frames = made(f"jepa:{mode}", tiny(), CONTINUOUS, 3).eval(), windows(CONTINUOUS, 3, 1).frames
    assert model.eye == eye and {name.split(".")[0] for name in model.encoder_state()} == {eye, "mean_frame", "frame_scale"}
    with torch.no_grad():
        z = model.encode(frames)
        for name, t in model.state_dict().items():
            if name not in model.encoder_state(): t.add_(1)
        assert torch.equal(model.encode(frames), z)                              # what it does not see with may change
        for t in model.encoder_state().values(): t.mul_(1.1)
        assert not torch.allclose(model.encode(frames), z)


def test_stop_gradient_keeps_the_target_still():
    grads = []
    for stop in (False, True):
        settings = tiny(jepa={"stop_gradient": stop}, loss={"variance": 0.0, "covariance": 0.0, "smoothness": 0.0, "inverse": 0.0})
        model = made("jepa", settings, CONTINUOUS, 3)
        batch = windows(CONTINUOUS, 3, 1)
        model.loss(batch).total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters()]))
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("name", NAMES)
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


PRESETS = [None, *sorted({section.partition("/")[0] for section in _read_ini(repo_root() / "settings.ini") if "/" in section})]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("action", [ActionSpec("discrete", 7), CONTINUOUS], ids=["discrete", "continuous"])
def test_what_a_model_thinks_with_is_of_one_size(preset, action):
    settings = load_settings(repo_root() / "settings.ini", preset)
    spec = DataSpec((3 if settings.env.color == "rgb" else 1, settings.env.size, settings.env.size), action, [], [])
    sizes = {name: count_parameters(build_model(name, settings, spec)) for name in ("encdec", "encdec_jepa", "jepa")}
    assert len({size["encoder"] for size in sizes.values()}) == 1 and sizes["jepa"]["encoder"] > 0, sizes
    assert sizes["encdec_jepa"]["predictor"] == sizes["jepa"]["predictor"] > 0 and "predictor" not in sizes["encdec"], sizes
    assert list(sizes["encdec_jepa"])[:3] == ["encoder", "predictor", "decoder"]
    assert sizes["jepa"]["frozen"] == (0 if settings.jepa.target == "none" else sizes["jepa"]["encoder"])   # the copy is stated apart


def test_presets_are_those_that_exist():
    assert {None, "smoke", "demo", "study", "atari", "seed"} <= set(PRESETS)


@pytest.mark.parametrize("name", ["encdec", "encdec_jepa"])
@pytest.mark.parametrize("stack", [1, 3])
def test_a_pixel_models_expectation_is_what_its_part_says(name, stack):
    model = made(name, tiny(model={"frame_stack": stack, "latent_dim": 16, "patch_size": 4, "action_dim": 4}, loss={"pixel": 1.0, "barlow": 1.0}), CONTINUOUS, 3)
    batch, given = windows(CONTINUOUS, 3, stack), []
    step(model, batch, 2)                                                        # a fresh decoder paints the mean frame, whatever is done
    model.regularizer.register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.no_grad():
        model.loss(batch)
        (z, actions, expected), = given
        torch.testing.assert_close(z, model.encode(batch.frames))
        for t in range(STEPS):
            rolled = model.rollout(z[:, t:t + 1], actions[:, :0], actions[:, t:t + 1])[:, 0]
            said = rolled if name == "encdec" else model.predictor(z[:, t], actions[:, t:t + 1])[:, 0]
            torch.testing.assert_close(expected[:, t], said)


@pytest.mark.parametrize("name", ["encdec", "encdec_jepa"])
def test_auxiliary_terms_of_no_share_cost_nothing(name):
    model, batch = made(name, tiny(), CONTINUOUS, 3), windows(CONTINUOUS, 3, 1)
    seen = []
    model.encoder.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    assert set(model.loss(batch).terms) == {"pixels"} and seen == [BATCH * STEPS] and count_parameters(model)["regularizer"] == 0


def test_a_longer_stack_is_shifted_frame_by_frame():
    "A dream written out by hand: decode, keep the newest frame, push it into the stack, encode."
    settings = tiny(model={"frame_stack": 3, "latent_dim": 16, "patch_size": 4, "action_dim": 4})
    for name in ("encdec", "encdec_jepa"):
        model, batch = made(name, settings, DISCRETE, 1), windows(DISCRETE, 1, 3)
        step(model, batch, 2)
        with torch.no_grad():
            z = model.eval().encode(batch.frames[:, :3])                         # (B, 1, N, D)
            one = model.decode(z[:, 0], batch.actions[:, 0])                      # (B, 3, h, w)
            two = torch.cat([one[:, 1:], model.decode(model.encoder(one), batch.actions[:, 1])[:, -1:]], dim=1)
            by_hand = torch.stack([model.encoder(one), model.encoder(two)], dim=1)
            assert torch.equal(model.rollout(z, batch.actions[:, :0], batch.actions[:, :2]), by_hand)
            newest = torch.stack([one[:, -1:], two[:, -1:]], dim=1) * model.frame_scale + model.mean_frame
            assert torch.equal(model.imagine(batch.frames[:, :3], batch.actions[:, :2]), newest.clamp(0, 1))


def test_a_model_that_does_not_exist_is_refused():
    with pytest.raises(SettingsError, match="nearest known one is 'jepa'"): model_class("jeppa")
