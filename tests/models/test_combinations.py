"""Every encoder in every model with every regularizer term on both kinds of data: it learns, it can be saved and loaded, it rolls out. And what cannot be combined says so."""
import itertools
import pytest
import torch
from worldmodels_nb.nn.regularizer import Regularizer
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.datasets import Batch
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.models import encdec, encdec_jepa, jepa
from worldmodels_nb.models.base import build_model
from worldmodels_nb.settings import SettingsError, make_settings
from worldmodels_nb.training.fit import WeightsError, load_weights, save_weights

SIZE, STEPS, BATCH, HORIZON = 16, 3, 4, 3
ENCODERS, MODELS = ["patch", "cnn", "vit", "mlp"], ["encdec", "encdec_jepa", "jepa-none", "jepa-vjepa2", "jepa-default"]
TERMS = dict(vicreg=dict(variance=1.0, covariance=0.1, invariance=1.0), barlow=dict(barlow=1.0), dino=dict(dino=1.0),
             sigreg=dict(sigreg=1.0), smoothness=dict(smoothness=1.0), inverse=dict(inverse=1.0))
OFF = dict(prediction=1.0, variance=0.0, covariance=0.0, invariance=0.0, barlow=0.0, dino=0.0, sigreg=0.0, smoothness=0.0, inverse=0.0, jepa=1.0, pixel=1.0)
SMALL = {"env": {"size": SIZE}, "patch": {"channels": 8}, "cnn": {"base_filters": 4, "layers": 2}, "vit": {"depth": 1, "heads": 2, "mlp_dim": 16}, "mlp": {"layers": 1, "hidden": 16},
         "dino": {"center_decay": 1.0}, "sigreg": {"directions": 8}}
DATA = {"discrete grey": (ActionSpec("discrete", 3), 1, 3), "continuous rgb": (ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0]), 3, 1)}  # actions, C, F


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(e, m, t, d):
    "One row of the product, with decoder, predictor, tokens and views turned through it."
    encoder, model, term = ENCODERS[e], MODELS[m], list(TERMS)[t]
    views = "two" if term == "vicreg" else ["two", "one"][(e + m + d + t // 2) % 2]      # invariance compares two views
    if (model, term) == ("jepa-default", "dino"): views = "one"                          # refused with two, see below
    return dict(encoder=encoder, model=model, term=term, data=list(DATA)[d], views=views, tokens=encoder != "mlp" and (e + t + d + m // 2) % 2 == 1,
                decoder=["conv", "transformer"][(e // 2 + m + t) % 2] if "enc" in model else None,
                predictor=["gru", "mlp", "transformer"][(e + m + t + 2 * d) % 3] if "jepa" in model else None)


CASES = [case(*row) for row in itertools.product(range(4), range(5), range(6), range(2))]


def tiny(encoder="patch", model="encdec", term="vicreg", data="continuous rgb", views="two", tokens=False, decoder=None, predictor=None, width=16, **sections):
    values = SMALL | {"model": {"encoder": encoder, "latent_dim": width, "patch_size": 4, "action_dim": 4, "tokens": tokens, "frame_stack": DATA[data][2]},
                      "decoder": {"type": decoder or "conv", "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "patch_size": 8, "slots": 2, "channels": 4},
                      "predictor": {"type": predictor or "gru", "hidden": [16], "depth": 1, "heads": 2, "mlp_dim": 16},
                      "loss": OFF | TERMS[term] | {"views": views}, "jepa": {"target": model.partition("-")[2] or "none", "ema_decay": 1.0}}
    return make_settings({s: values.get(s, {}) | sections.get(s, {}) for s in values | sections})


def windows(data, batch=BATCH):
    (action, channels, stack), rng = DATA[data], torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (batch, stack - 1 + STEPS + 1, channels, SIZE, SIZE), dtype=torch.uint8, generator=rng)
    actions = torch.randint(0, 3, (batch, STEPS), generator=rng) if action.kind == "discrete" else torch.rand(batch, STEPS, 2, generator=rng) * 2 - 1
    return Batch(frames, actions, torch.zeros(batch, STEPS), torch.zeros(batch, STEPS, dtype=torch.bool))


def made(seed=0, model="encdec", data="continuous rgb", **kind):
    torch.manual_seed(seed)
    action, channels, _ = DATA[data]
    built = build_model(model.partition("-")[0], tiny(model=model, data=data, **kind), DataSpec((channels, SIZE, SIZE), action, [], []))
    return built.fit_normalization(windows(data).frames.flatten(0, 1))


def told(model, batch):
    torch.manual_seed(1)                                                                 # SIGReg looks along the same directions each time
    return model.loss(batch)


def name(kind): return " ".join(str(v) for v in kind.values() if v is not None)


@pytest.mark.parametrize("kind", CASES, ids=name)
def test_learns_and_comes_back_from_a_file(kind, tmp_path):
    model, batch = made(**kind), windows(kind["data"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    first = told(model, batch)
    first.total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)        # nothing trainable is left out
    assert set(first.terms) == {"prediction" if "jepa-" in kind["model"] else "pixels"} | set(TERMS[kind["term"]])
    for step in range(10):
        loss = told(model, batch)
        optimizer.zero_grad(); loss.total.backward(); optimizer.step(); model.after_step(step + 1, 10)
    last = told(model, batch)
    assert last.total < first.total
    save_weights(model, tmp_path / "w.safetensors")
    again = made(seed=1, **kind)
    load_weights(again, tmp_path / "w.safetensors")
    with torch.no_grad():
        z = model.eval().encode(batch.frames)                                            # (B, T+1, N, D)
        dream = model.rollout(z[:, :1], batch.actions[:, :0], batch.actions[:, :HORIZON])
        assert z.shape == (BATCH, STEPS + 1, *model.latent_shape) and dream.shape == (BATCH, HORIZON, *model.latent_shape)
        assert z.isfinite().all() and dream.isfinite().all()
        assert torch.equal(again.eval().encode(batch.frames), z)
        assert torch.equal(again.rollout(z[:, :1], batch.actions[:, :0], batch.actions[:, :HORIZON]), dream)


def test_every_pair_that_can_be_combined_is():
    values = {factor: {c[factor] for c in CASES} - {None} for factor in CASES[0]}
    cannot = {("mlp", True), ("vicreg", "one")}                                          # no grid to make tokens of; one view agrees with itself
    cannot |= set(itertools.product(["encdec"], values["predictor"])) | set(itertools.product(MODELS[2:], values["decoder"]))
    for a, b in itertools.combinations(values, 2):
        missing = set(itertools.product(values[a], values[b])) - {(c[a], c[b]) for c in CASES} - cannot
        assert not missing, (a, b, missing)
    assert len({name(c) for c in CASES}) == len(CASES) == 240


# what cannot be combined says so

@pytest.mark.parametrize("model", ["encdec", "encdec_jepa", "jepa-none", "jepa-vjepa2", "jepa-default"])
@pytest.mark.parametrize("term", ["vicreg", "barlow", "sigreg"])
def test_a_batch_of_one_is_no_statistic(model, term):
    alone = windows("continuous rgb", batch=1)
    learner = made(model=model, term=term)
    with pytest.raises(SettingsError, match="at least two windows; raise train.batch_size"): learner.loss(alone)
    assert learner.encode(alone.frames).isfinite().all()                                 # looking at one window is no harm
    assert made(model=model, term="smoothness").loss(alone).total.isfinite()             # neither is a term about time


@pytest.mark.parametrize("term", ["vicreg", "barlow", "dino"])
def test_a_term_of_two_views_wants_both(term):
    regularizer = Regularizer((1, 16), DATA["continuous rgb"][0], tiny(term=term), 1.0)
    z, actions = torch.randn(BATCH, STEPS + 1, 1, 16), torch.rand(BATCH, STEPS, 2)
    with pytest.raises(SettingsError, match="needs the model's prediction beside its latents"): regularizer(z, actions, None)
    assert regularizer(z, actions, z[:, 1:])[list(TERMS[term])[-1]].isfinite()


def test_one_view_cannot_agree_with_itself():
    with pytest.raises(SettingsError, match="loss.invariance compares two views"): tiny(term="vicreg", views="one")


@pytest.mark.parametrize("kind", [dict(term="dino"), dict(loss={"jepa": 0.0}), dict(term="vicreg", loss={"variance": 0.0, "covariance": 0.0, "invariance": 0.0})], ids=["dino", "no share", "no weight"])
def test_an_online_encoder_that_nothing_teaches_is_refused(kind):
    with pytest.raises(SettingsError, match="none that is on reaches it"): made(model="jepa-default", **kind)
    made(model="jepa-vjepa2", **kind)                                                    # here the prediction teaches it


OTHERS = [
    (dict(model="jepa-none"), "action.embed.weight is missing"),
    (dict(model="encdec_jepa"), "action.embed.weight is missing"),
    (dict(encoder="vit"), "encoder.convs.0.weight is missing"),
    (dict(encoder="cnn"), r"encoder.convs.0.weight is \(4, 3, 3, 3\) float32, the model's is \(8, 3, 4, 4\) float32"),
    (dict(width=32), r"encoder.readout.linear.2.0.weight is \(32, 32\) float32, the model's is \(16, 32\) float32"),
    (dict(decoder="transformer"), "decoder.map.1.weight is missing"),
    (dict(tokens=True), "encoder.readout.linear.0.weight is"),
    (dict(term="dino"), "the model has no regularizer.center"),
    (dict(data="discrete grey"), r"mean_frame is \(1, 16, 16\) float32, the model's is \(3, 16, 16\) float32"),
]


@pytest.mark.parametrize("kind, said", OTHERS, ids=[name(kind) for kind, _ in OTHERS])
def test_weights_of_another_architecture_are_refused_by_name(kind, said, tmp_path):
    model = made()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    save_weights(made(seed=1, **kind), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=said): load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())         # changed whole, or not at all


@pytest.mark.parametrize("mode, other", list(itertools.permutations(["jepa-none", "jepa-vjepa2"])))
def test_a_copy_too_many_or_too_few_is_refused(mode, other, tmp_path):
    save_weights(made(model=other), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="target.convs.0.weight is missing" if other == "jepa-none" else "the model has no target."): load_weights(made(model=mode), tmp_path / "w.safetensors")
