"What pixel models promise: a rollout that goes through frames, a regularizer that is free when off."
import pytest
import torch

from worldmodels_nb.data.datasets import Windows
from worldmodels_nb.models.base import fresh_model
from worldmodels_nb.models.encdec import EncoderDecoder
from worldmodels_nb.models.encdec_jepa import EncoderDecoderJEPA
from worldmodels_nb.settings import DecoderSettings, Settings, SettingsError, TrainingSettings
from worldmodels_nb.training.fit import History, count_parameters, fit_windows

STEPS, BATCH = 5, 4
MODELS = [EncoderDecoder.registered, EncoderDecoderJEPA.registered]


@pytest.fixture
def fresh(sample, sample_frames):
    "fresh(loss={…}): an untrained encoder-decoder that knows the sample's mean frame."
    return lambda **sections: fresh_model("encdec", Settings(**sections), sample.spec, sample_frames)


@pytest.fixture(scope="module")
def trained(sample, sample_windows, sample_frames):
    "An encoder-decoder after some steps on the sample, and its losses."
    model, history = fresh_model("encdec", Settings(), sample.spec, sample_frames), History()
    recipe = TrainingSettings(steps=30, batch_size=16, learning_rate=3e-3)
    fit_windows(model, sample_windows, recipe, callbacks=[history])
    return model.eval(), history


def test_it_learns(trained):
    _, history = trained
    assert history["total"][-1] < history["total"][0] and history["total"] == history["pixels"]


def test_a_shorter_rollout_begins_a_longer_one(trained, sample_windows):
    model, batch = trained[0], sample_windows.batch(range(8))
    with torch.no_grad():
        z = model.encode(batch.frames)
        assert z.shape == (8, 5, 1, 128)
        long, short = (model.rollout(z[:, :1], batch.actions[:, :0], batch.actions[:, :k]) for k in (4, 2))
    torch.testing.assert_close(long[:, :2], short, rtol=0, atol=1e-6)


def test_what_is_expected_is_the_one_step_rollout_with_a_gradient(trained, sample_windows):
    model, batch = trained[0], sample_windows.batch(range(8))
    with torch.no_grad():
        z = model.encode(batch.frames)
        rolled = model.rollout(z[:, :1], batch.actions[:, :0], batch.actions)[:, 0]
        conditioning = model.decoder_input(z[:, 0], batch.actions[:, 0])
        assert torch.equal(model.predicted_latent(conditioning, model.decoder(conditioning)), rolled)
    expected = model.predicted_latent(conditioning, model.decoder(conditioning))
    assert torch.autograd.grad(expected.sum(), model.decoder.parameters())
    assert set(model.loss(batch).terms) == {"pixels"}


def test_a_fresh_decoder_gives_the_mean_frame(fresh, trained, sample_windows):
    batch = sample_windows.batch(range(8))
    z = trained[0].encode(batch.frames).detach()
    assert fresh().decode(z[:, 0], batch.actions[:, 0]).abs().max() == 0


@pytest.mark.parametrize("kind", ["transformer", "conv"])
def test_with_a_regularizer_all_its_terms_are_weighed(kind, fresh, sample):
    batch = Windows(sample, range(len(sample.lengths)), steps=4, frame_stack=3).batch(range(4))
    terms = {"pixel": 1.0, "barlow": {"weight": 1.0}}
    stacked = fresh(model={"frame_stack": 3}, decoder={"type": kind}, loss=terms)
    loss = stacked.loss(batch)
    assert set(loss.terms) == {"pixels", "variance", "covariance", "barlow", "smoothness", "inverse"}
    weights = {"pixels": 1.0, **stacked.regularizer.weights}
    by_hand = sum(weights[name] * value.item() for name, value in loss.terms.items())
    assert loss.total.item() == pytest.approx(by_hand, rel=0, abs=1e-3)
    assert stacked.imagine(batch.frames[:, :3], batch.actions).shape == (4, 4, 3, 64, 64)


ENCODED = [
    ({}, [32]),
    ({"pixel": 1.0}, [40]),
    ({"pixel": 1.0, "barlow": {"weight": 1.0}}, [40, 32]),
    ({"pixel": 1.0, "barlow": {"weight": 1.0}, "views": "one"}, [40]),
]


@pytest.mark.parametrize("loss, stacks", ENCODED, ids=["alone", "terms", "two views", "one view"])
def test_nothing_is_encoded_in_vain(loss, stacks, fresh, sample_windows):
    "The last frame only where terms ask for it, what was decoded only for two views."
    counts, model = [], fresh(loss=loss)
    model.encoder.register_forward_hook(lambda _, x, __: counts.append(len(x[0])))
    model.loss(sample_windows.batch(range(8)))
    assert counts == stacks


def test_a_decoder_that_does_not_fit_is_refused(sample):
    settings = Settings.model_construct(**dict(Settings()) | {"decoder": DecoderSettings(patch_size=24)})
    with pytest.raises(SettingsError, match="64 px cannot be cut"): EncoderDecoder(settings, sample.spec)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stack", [1, 3])
def test_what_a_pixel_model_expects(name, stack, tiny, small_model, random_windows, learn):
    "The latent of what it decoded, or what its predictor gave."
    settings = tiny(model={"frame_stack": stack}, loss={"pixel": 1.0, "barlow": {"weight": 1.0}})
    model = small_model(name, settings, "continuous")
    batch, given = random_windows("continuous", stack), []
    learn(model, batch, 2)                          # a fresh decoder gives the mean frame, whatever is done
    model.regularizer.register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.no_grad():
        model.loss(batch)
        (z, actions, expected), = given
        torch.testing.assert_close(z, model.encode(batch.frames))
        for t in range(STEPS):
            here, action = z[:, t:t + 1], actions[:, t:t + 1]
            if name == "encdec": predicted = model.rollout(here, actions[:, :0], action)[:, 0]
            else: predicted = model.predictor(z[:, t], action)[:, 0]
            torch.testing.assert_close(expected[:, t], predicted)


@pytest.mark.parametrize("name", MODELS)
def test_a_regularizer_of_no_weight_costs_nothing(name, tiny, small_model, random_windows):
    model, batch, counts = small_model(name, tiny(), "continuous"), random_windows("continuous"), []
    model.encoder.register_forward_hook(lambda _, args, __: counts.append(len(args[0])))
    assert set(model.loss(batch).terms) == {"pixels"} and counts == [BATCH * STEPS]
    assert count_parameters(model)["regularizer"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_longer_stack_is_shifted_frame_by_frame(name, tiny, small_model, random_windows, learn):
    "A rollout written out by hand: decode, keep the newest frame, push it into the stack, encode."
    model, batch = small_model(name, tiny(model={"frame_stack": 3}), "discrete"), random_windows("discrete")
    first, second = batch.actions[:, 0], batch.actions[:, 1]
    learn(model, batch, 2)
    with torch.no_grad():
        z = model.eval().encode(batch.frames[:, :3])                             # (B, 1, N, D)
        one = model.decode(z[:, 0], first)                                       # (B, 3, h, w)
        newest = model.decode(model.encoder(one), second)[:, -1:]
        two = torch.cat([one[:, 1:], newest], dim=1)
        by_hand = torch.stack([model.encoder(one), model.encoder(two)], dim=1)
        assert torch.equal(model.rollout(z, batch.actions[:, :0], batch.actions[:, :2]), by_hand)
        frames = torch.stack([one[:, -1:], two[:, -1:]], dim=1) * model.frame_scale + model.mean_frame
        assert torch.equal(model.imagine(batch.frames[:, :3], batch.actions[:, :2]), frames.clamp(0, 1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stack, unroll, pixel", [(1, 2, 0.0), (3, 4, 1.0), (2, 5, 0.0), (1, 3, 1.0)])
def test_predictions_are_fed_back(name, stack, unroll, pixel, tiny, small_model, random_windows, learn):
    "For U steps from each U-th true latent, window by window; a window that U does not divide ends earlier."
    settings = tiny(model={"frame_stack": stack}, loss={"pixel": pixel}, train={"window_steps": STEPS})
    model = small_model(name, settings, "continuous")
    batch = random_windows("continuous", stack)
    learn(model, batch, 2)
    model.unroll, decoded = unroll, []
    model.eval()
    with torch.no_grad():
        x = model.preprocess(batch.frames)
        for t in range(STEPS):
            if t % unroll == 0: z, seen = model.encode(batch.frames)[:, t], None
            decoded.append(model.decode(z, batch.actions[:, t]))
            seen = decoded[-1] if seen is None else model.shifted(seen, decoded[-1])
            z = model.encoder(seen)
        by_hand = (torch.stack(decoded, 1) - x[:, 1:]).square().mean()
        torch.testing.assert_close(model.loss(batch).terms["pixels"], by_hand)


@pytest.mark.parametrize("unroll, begin, at", [(4, .67, 67), (2, .5, 50), (None, 0.0, 0), (3, 1.0, None)])
def test_feeding_back_begins_when_it_is_told_to(unroll, begin, at, fresh):
    own = {"unroll": unroll, "unroll_from": begin}
    model, fed_back = fresh(encdec=own, train={"window_steps": 4}).train(), []
    for step in range(100):
        model.before_step(step, 100)
        fed_back.append(model.steps_fed_back)
    wanted = min(unroll or 4, 4)
    assert fed_back == [1 if at is None or step < at else wanted for step in range(100)]
    assert model.eval().steps_fed_back == wanted
