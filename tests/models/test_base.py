"The contract every registered model keeps, on random data of every kind the settings allow."
import importlib
import itertools
import pkgutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import worldmodels_nb.models
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.models import base
from worldmodels_nb.models.base import (
    MODELS,
    WorldModel,
    build_model,
    fresh_model,
    known_stages,
    model_class,
    register,
)
from worldmodels_nb.nn.encoders import build_encoder
from worldmodels_nb.nn.layers import frames_to_float
from worldmodels_nb.settings import Settings, SettingsError, load_settings, read_presets, repo_root
from worldmodels_nb.training.fit import count_parameters, freeze, load_weights, save_weights
from worldmodels_nb.viz import MODEL_COLORS, model_color

for module in pkgutil.iter_modules(worldmodels_nb.models.__path__):              # whoever signs in is tested
    importlib.import_module(f"worldmodels_nb.models.{module.name}")

STEPS, BATCH = 5, 4
NAMES = [*sorted(MODELS), "jepa:ema_target", "jepa:ema_both"]
CHANNELS = {"discrete": 1, "continuous": 3}
STACK = {"discrete": 3, "continuous": 1}
KINDS = [kind for kind in itertools.product(NAMES, ["patch", "cnn", "vit", "mlp"], STACK, [False, True])
         if not (kind[1] == "mlp" and kind[3])]


@pytest.mark.parametrize("name, encoder, data, tokens", KINDS)
def test_contract(name, encoder, data, tokens, tiny, small_model, random_windows, learn):
    stack, channels = STACK[data], CHANNELS[data]
    settings = tiny(model={"encoder": encoder, "frame_stack": stack, "tokens": tokens})
    model, batch = small_model(name, settings, data), random_windows(data)
    learn(model, batch, 2)                          # a fresh decoder gives the mean frame, whatever is done
    model.eval()
    with torch.no_grad():
        z = model.encode(batch.frames)
        assert z.shape == (BATCH, STEPS + 1, *model.latent_shape)
        start, none = z[:, :1], batch.actions[:, :0]
        long = model.rollout(start, none, batch.actions)
        assert long.shape == (BATCH, STEPS, *model.latent_shape) and long.isfinite().all()
        for k in range(1, STEPS):                                                # a prefix of the longer one
            shorter = model.rollout(start, none, batch.actions[:, :k])
            torch.testing.assert_close(shorter, long[:, :k])
        one = model.rollout(start, none, batch.actions[:, :1])                   # or taken up half-way
        history = model.rollout(z[:, :3], batch.actions[:, :2], batch.actions[:, 2:])
        assert one.shape[1] == 1 and history.shape[1] == STEPS - 2
        changed = batch.frames.clone()
        changed[:, -1] = 255 - changed[:, -1]                                    # the past knows no future
        later = model.encode(changed)
        torch.testing.assert_close(later[:, :-1], z[:, :-1])
        assert not torch.allclose(later[:, -1], z[:, -1])
        flipped = batch.actions.flip(0)                                          # actions matter
        assert not torch.allclose(model.rollout(start, none, flipped), long)
        if not model.decodes: return
        imagined = model.imagine(batch.frames[:, :stack], batch.actions)
        assert imagined.shape == (BATCH, STEPS, channels, 16, 16)
        assert 0 <= imagined.min() <= imagined.max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_who_has_no_decoder_says_where_to_get_one(name, tiny, small_model, random_windows):
    model, batch = small_model(name, tiny(), "continuous"), random_windows("continuous")
    assert model.decodes == (name in ("encdec", "encdec_jepa"))
    if model.decodes: return
    with pytest.raises(NotImplementedError, match="StateDecoder"): model.imagine(batch.frames, batch.actions)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", ["discrete", "continuous"])
def test_ten_steps_lower_the_loss(name, data, tiny, small_model, random_windows, learn, tmp_path):
    settings, batch = tiny(model={"frame_stack": STACK[data]}), random_windows(data)
    model = small_model(name, settings, data)
    totals = learn(model, batch, 10)
    assert totals[-1] < totals[0]
    save_weights(model, tmp_path / "w.safetensors")
    again = small_model(name, settings, data, seed=1)
    load_weights(again, tmp_path / "w.safetensors")
    found, wanted = (made.eval().encode(batch.frames) for made in (again, model))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_encodes_with_its_inference_encoder_alone(name, tiny, small_model, random_windows):
    model, frames = small_model(name, tiny(), "continuous").eval(), random_windows("continuous").frames
    seen = {id(t) for t in model.inference_encoder.state_dict(keep_vars=True).values()}
    kept = model.state_dict(keep_vars=True)
    assert seen <= {id(kept[found]) for found in model.encoder_state()}
    with torch.no_grad():
        z = model.encode(frames)
        for found, t in model.state_dict().items():
            if found not in model.encoder_state(): t.add_(1)
        assert torch.equal(model.encode(frames), z)                              # the rest may change
        for t in model.encoder_state().values(): t.mul_(1.1)
        assert not torch.allclose(model.encode(frames), z)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_model_gets_no_gradient(name, tiny, small_model, random_windows, learn):
    model, batch = small_model(name, tiny(), "continuous"), random_windows("continuous")
    learn(model, batch, 1)
    for p in model.parameters(): p.grad = None
    freeze(model)
    z = model.encode(batch.frames)
    assert not z.requires_grad and not model.training
    actions = batch.actions.requires_grad_(True)                                 # as planners do
    model.rollout(z[:, :1], actions[:, :0], actions).sum().backward()
    assert actions.grad is not None and all(p.grad is None for p in model.parameters())


PRESETS = [None, *sorted(read_presets(repo_root() / "settings.ini"))]
ACTIONS = [ActionSpec("discrete", 7), ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("action", ACTIONS, ids=["discrete", "continuous"])
def test_what_a_model_thinks_with_is_of_one_size(preset, action):
    settings = load_settings(repo_root() / "settings.ini", preset)
    channels, size = 3 if settings.env.color == "rgb" else 1, settings.env.size
    spec = DataSpec((channels, size, size), action, [], [])
    models = {name: build_model(name, settings, spec) for name in ("encdec", "encdec_jepa", "jepa")}
    sizes = {name: count_parameters(model) for name, model in models.items()}
    assert len({size["encoder"] for size in sizes.values()}) == 1 and sizes["jepa"]["encoder"] > 0, sizes
    assert sizes["encdec_jepa"]["predictor"] == sizes["jepa"]["predictor"] > 0, sizes
    assert "predictor" not in sizes["encdec"], sizes
    assert list(sizes["encdec_jepa"])[:3] == ["encoder", "predictor", "decoder"]
    copied = 0 if settings.jepa.target == "shared" else sizes["jepa"]["encoder"]
    assert sizes["jepa"]["frozen"] == copied                                     # the copy is stated apart


def test_presets_are_those_that_exist():
    assert {None, "smoke", "demo", "study", "atari", "seed"} <= set(PRESETS)


class Stillness(WorldModel):
    "Persistence: the brightness of each quadrant, and nothing ever changes."
    latent_shape = (1, 12)

    def encode(self, frames):
        x = self.preprocess(frames).flatten(0, 1)
        return nn.functional.adaptive_avg_pool2d(x, 2).view(*frames.shape[:2], 1, 12)

    def rollout(self, z, past_actions, actions):
        return z[:, -1:].expand(-1, actions.shape[1], -1, -1)


class Untrained(WorldModel):
    "Nothing but an encoder."
    def __init__(self, settings, spec):
        super().__init__(settings, spec)
        self.encoder = build_encoder(settings, spec.frame_shape)


@pytest.fixture
def registry(monkeypatch):
    "The registry, as it was before the test when the test is over."
    monkeypatch.setattr(base, "MODELS", dict(MODELS))
    colors = dict(MODEL_COLORS)
    yield base.MODELS
    MODEL_COLORS.clear()
    MODEL_COLORS.update(colors)


def test_the_smallest_model_keeps_the_contract(sample, sample_windows):
    still, batch = Stillness(Settings(), sample.spec), sample_windows.batch([0, 5])
    z = still.encode(batch.frames)
    assert z.shape == (2, 5, 1, 12)
    long, short = (still.rollout(z[:, :1], None, batch.actions[:, :k]) for k in (4, 2))
    assert torch.equal(long[:, :2], short)
    with pytest.raises(NotImplementedError, match="StateDecoder"): still.imagine(batch.frames, batch.actions)
    changed = batch.frames.clone()
    changed[:, -1] = 0
    moved = (still.encode(changed) - z).abs().amax((0, 2, 3))
    assert moved[:-1].max() == 0 and moved[-1] > 0
    stage, = still.stages()
    assert (stage.name, stage.part, stage.window) == ("world", still, 8)
    assert (stage.cached, stage.released) == (False, "")


def test_frames_are_centred_and_scaled(sample, sample_windows, sample_frames):
    torch.manual_seed(0)
    model, batch = Untrained(Settings(), sample.spec), sample_windows.batch([0, 5])
    before = model.encode(sample_frames[:, None]).std(0).mean()
    model.fit_normalization(sample_frames)
    assert before < 0.1 and model.encode(sample_frames[:, None]).std(0).mean() > 0.9
    by_hand = (frames_to_float(batch.frames) - model.mean_frame) / model.frame_scale
    torch.testing.assert_close(model.preprocess(batch.frames), by_hand, rtol=0, atol=1e-5)
    assert {name.split(".")[0] for name in model.encoder_state()} == {"encoder", "mean_frame", "frame_scale"}


def test_fresh_models_of_one_seed_are_equal(sample, sample_frames, registry):
    register("untrained")(Untrained)
    kind = "untrained", Settings(), sample.spec, sample_frames
    one, same, other = (fresh_model(*kind, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert torch.equal(one.mean_frame, frames_to_float(sample_frames).mean(0))


def test_a_registered_model_brings_colour_and_stages(registry):
    before = known_stages()

    @register("toy", color="#117733", stages=("look", "world", "act"))
    class Toy(Stillness): pass

    assert registry["toy"] is Toy is model_class("toy")
    assert (Toy.registered, Toy.color, Toy.stage_names) == ("toy", "#117733", ("look", "world", "act"))
    assert model_color("toy") == "#117733" and known_stages() == (*before, "look", "act")
    register("other")(Toy)                                                       # a colour is no duty
    assert "other" not in MODEL_COLORS and Toy.stage_names == ("world",)
    with pytest.raises(ValueError, match="no-colour"): register("bad", color="no-colour")(Stillness)
    assert "bad" not in registry


def test_registered_models_have_colours_of_their_own_and_the_stages_they_say(tiny, small_model):
    colors = {name: model.color for name, model in MODELS.items()}
    assert len(set(colors.values())) == len(colors)
    assert all(MODEL_COLORS[name] == color for name, color in colors.items())
    for name, model in MODELS.items():
        stages = small_model(name, tiny(), "continuous").stages()
        assert tuple(stage.name for stage in stages) == model.stage_names
    assert "world" not in known_stages()
    assert set(known_stages()) == {n for model in MODELS.values() for n in model.stage_names} - {"world"}


def test_a_model_that_does_not_exist_is_refused():
    with pytest.raises(SettingsError, match="nearest known one is 'jepa'"): model_class("jeppa")


ASKED = {
    "a model": ("[base.fresh_model('encdec', Settings(), data.spec, frames).registered, base.known_stages()]",
                "['encdec', ('pretrain', 'action')]"),
    "the stages": ("base.known_stages(), [*base.MODELS]",
                   "('pretrain', 'action') ['encdec', 'encdec_jepa', 'jepa', 'vjepa2', 'vjepa2_untrained']"),
    "what there is": ("refusal(lambda: base.model_class('jeepa')).partition('; ')[2], base.build_model("
                      "'jepa', Settings(), data.spec).registered, base.model_class('vjepa2').color",
                      "there are encdec, encdec_jepa, jepa, vjepa2, vjepa2_untrained; "
                      "the nearest known one is 'jepa' jepa #7B1E5B"),
}


@pytest.mark.parametrize("code, answer", ASKED.values(), ids=ASKED)
def test_whoever_asks_by_name_need_not_import_the_chapter(code, answer):
    asks = ("import torch\nfrom worldmodels_nb.models import base\n"
            "from worldmodels_nb.data.datasets import sample_dataset\n"
            "from worldmodels_nb.settings import Settings, refusal\n"
            f"data = sample_dataset()\nframes = torch.from_numpy(data.frames[:9].copy())\nprint({code})")
    done = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (answer, "")
