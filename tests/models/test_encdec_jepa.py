"The fair baseline: JEPA's parts to the last weight, and a predictor that speaks to the decoder alone."
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from worldmodels_nb.data.datasets import Windows
from worldmodels_nb.models.base import fresh_model
from worldmodels_nb.models.encdec import EncoderDecoder
from worldmodels_nb.models.encdec_jepa import EncoderDecoderJEPA
from worldmodels_nb.nn.encoders import build_encoder
from worldmodels_nb.nn.predictors import build_predictor
from worldmodels_nb.settings import Settings, TrainingSettings
from worldmodels_nb.training.fit import History, count_parameters, fit_windows

SETTINGS = Settings(decoder={"type": "conv"})


@pytest.fixture(scope="module")
def pair(sample, sample_windows, sample_frames):
    "The encoder-decoder and the fair baseline after some seconds on the sample, and their histories."
    models, histories = {}, {}
    recipe = TrainingSettings(steps=70, batch_size=16, learning_rate=2e-3)
    for name in (EncoderDecoder.registered, EncoderDecoderJEPA.registered):
        models[name], histories[name] = fresh_model(name, SETTINGS, sample.spec, sample_frames), History()
        fit_windows(models[name], sample_windows, recipe, callbacks=[histories[name]])
        models[name].eval()
    return models, histories


@pytest.fixture(scope="module")
def everything(pair, sample_windows):
    "All windows of the sample, and the fair baseline's latents of them (n, 5, 1, 128)."
    batch = sample_windows.batch(range(len(sample_windows)))
    with torch.no_grad(): return batch, pair[0]["encdec_jepa"].encode(batch.frames)


def test_both_learn(pair):
    ends = [history["pixels"][-1] for history in pair[1].values()]
    assert max(ends) < 0.5 < pair[1]["encdec"]["pixels"][0]


def test_it_has_the_parts_of_a_jepa(pair, sample):
    models, _ = pair
    encoder = build_encoder(SETTINGS, sample.spec.frame_shape)
    action_dim = SETTINGS.model.action_dim
    predictor = build_predictor(128, sample.spec.action, action_dim, SETTINGS.predictor)
    parts = nn.ModuleDict({"encoder": encoder, "predictor": predictor})
    counted, known = count_parameters(models["encdec_jepa"]), count_parameters(parts)
    assert [counted[part] for part in parts] == [known[part] for part in parts]
    assert list(counted)[:3] == ["encoder", "predictor", "decoder"]
    assert count_parameters(models["encdec"])["encoder"] == counted["encoder"]


def test_the_decoder_is_conditioned_on_the_predictor_alone(pair, everything):
    fair, (batch, z) = pair[0]["encdec_jepa"], everything
    with torch.no_grad():
        conditioning = fair.decoder_input(z[:, 0], batch.actions[:, 0])
        assert fair.predicted_latent(conditioning, None) is conditioning
        predicted = fair.predictor(z[:, 0], batch.actions[:, :1])[:, 0]
    torch.testing.assert_close(conditioning, predicted, rtol=0, atol=1e-6)


def test_the_prediction_is_no_latent_to_start_from(pair, everything):
    fair, (batch, z) = pair[0]["encdec_jepa"], everything
    action = batch.actions[:, :1]
    with torch.no_grad():
        predicted = fair.decoder_input(z[:, 0], action[:, 0])
        rolled = fair.rollout(z[:, :1], action[:, :0], action)[:, 0]
    guesses = {"persistence": z[:, 0], "predicted": predicted, "decoded and encoded": rolled}
    apart = {name: F.mse_loss(guess, z[:, 1]).item() for name, guess in guesses.items()}
    assert apart["decoded and encoded"] < apart["persistence"] / 2
    assert apart["predicted"] > apart["persistence"] * 0.9


def test_the_short_way_gets_lost(pair, everything):
    fair, (batch, z) = pair[0]["encdec_jepa"], everything
    with torch.no_grad():
        x, chained = fair.preprocess(batch.frames), fair.predictor(z[:, 0], batch.actions)
        long = (fair.imagine(batch.frames[:, :1], batch.actions) - fair.mean_frame) / fair.frame_scale
        short = fair.decoder(chained.flatten(0, 1)).unflatten(0, chained.shape[:2])
    long, short = ((way - x[:, 1:]).square().mean((0, 2, 3, 4)).tolist() for way in (long, short))
    assert abs(long[0] - short[0]) < 0.05 and long[3] < 1 < short[3]


@pytest.mark.parametrize("kind", ["gru", "mlp", "transformer"])
def test_every_predictor_learns_from_pixels_and_terms(kind, sample, sample_frames):
    settings = Settings(
        model={"encoder": "cnn", "tokens": True, "frame_stack": 2},
        encoder={"cnn": {"layers": 4, "base_filters": 4}},
        predictor={"type": kind},
        loss={"pixel": 0.1, "invariance": 1.0, "barlow": {"weight": 1.0}})
    model = fresh_model(EncoderDecoderJEPA.registered, settings, sample.spec, sample_frames)
    batch = Windows(sample, range(len(sample.lengths)), steps=4, frame_stack=2).batch(range(3))
    loss = model.loss(batch)
    loss.total.backward()
    assert {"pixels", "invariance", "barlow"} <= set(loss.terms)
    assert all(p.grad is not None for p in model.parameters())
    assert model.imagine(batch.frames[:, :2], batch.actions).shape == (3, 4, 3, 64, 64)
    assert model.latent_shape == (16, 128)
