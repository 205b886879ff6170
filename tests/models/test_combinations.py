"""Every encoder in every model with every regularizer term on both kinds of data: it learns, it can be saved
and loaded, it rolls out. And what cannot be combined says so."""
import itertools

import pytest
import torch

from worldmodels_nb.data.datasets import Batch
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.models import encdec, encdec_jepa, jepa  # noqa: F401  (they sign themselves in)
from worldmodels_nb.models.base import fresh_model
from worldmodels_nb.settings import SettingsError, make_settings
from worldmodels_nb.training.fit import WeightsError, load_weights, save_weights

SIZE, STEPS, BATCH, HORIZON = 16, 3, 4, 3
ENCODERS = ["patch", "cnn", "vit", "mlp"]
MODELS = ["encdec", "encdec_jepa", "jepa-shared", "jepa-ema_target", "jepa-ema_both"]
TERMS = {
    "vicreg": {"variance": 1.0, "covariance": 0.1, "invariance": 1.0},
    "barlow": {"barlow": {"weight": 1.0}},
    "dino": {"dino": {"weight": 1.0, "center_decay": 1.0}},
    "sigreg": {"sigreg": {"weight": 1.0, "directions": 8}},
    "smoothness": {"smoothness": 1.0},
    "inverse": {"inverse": 1.0},
    "within": {"within_variance": 1.0, "within_covariance": 1.0},
}
OFF = {name: 0.0 for name in ("variance", "covariance", "invariance", "smoothness", "inverse")}
OFF |= {name: {"weight": 0.0} for name in ("barlow", "dino", "sigreg")}
OFF |= {name: 1.0 for name in ("prediction", "jepa", "pixel")}
SMALL = {
    "env": {"size": SIZE},
    "encoder.patch": {"channels": 8},
    "encoder.cnn": {"base_filters": 4, "layers": 2},
    "encoder.vit": {"depth": 1, "heads": 2, "mlp_dim": 16},
    "encoder.mlp": {"layers": 1, "hidden": 16},
}
CONTINUOUS = ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])
DATA = {                                                                     # actions, C, F
    "discrete grey": (ActionSpec("discrete", 3), 1, 3),
    "continuous rgb": (CONTINUOUS, 3, 1),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(e, m, t, d):
    "One row of the product, with decoder, predictor, tokens and views turned through it."
    encoder, model, term = ENCODERS[e], MODELS[m], list(TERMS)[t]
    views = ["two", "one"][(e + m + d + t // 2) % 2]
    if term == "vicreg": views = "two"                                       # invariance compares two views
    if (model, term) == ("jepa-ema_both", "dino"): views = "one"             # refused with two, see below
    tokens = encoder != "mlp" and (e + t + d + m // 2) % 2 == 1
    decoder = ["conv", "transformer"][(e // 2 + m + t) % 2] if "enc" in model else None
    predictor = ["gru", "mlp", "transformer"][(e + m + t + 2 * d) % 3] if "jepa" in model else None
    return {"encoder": encoder, "model": model, "term": term, "data": list(DATA)[d], "views": views,
            "tokens": tokens, "decoder": decoder, "predictor": predictor}


CASES = [case(*row) for row in itertools.product(range(4), range(5), range(6), range(2))]


def tiny(encoder="patch", model="encdec", term="vicreg", data="continuous rgb", views="two", tokens=False,
         decoder=None, predictor=None, width=16, **sections):
    own = {"encoder": encoder, "latent_dim": width, "patch_size": 4, "action_dim": 4, "tokens": tokens}
    attention = {"depth": 1, "heads": 2, "mlp_dim": 16}
    decoder = {"type": decoder or "conv", "dim": 16, "patch_size": 8, "slots": 2, "channels": 4}
    values = SMALL | {
        "model": own | {"frame_stack": DATA[data][2]},
        "decoder": decoder | attention,
        "predictor": {"type": predictor or "gru", "hidden": [16]} | attention,
        "loss": OFF | TERMS[term] | {"views": views},
        "jepa": {"target": model.partition("-")[2] or "shared", "ema_decay": 1.0},
    }
    return make_settings({s: values.get(s, {}) | sections.get(s, {}) for s in values | sections})


def windows(data, batch=BATCH):
    (action, channels, stack), rng = DATA[data], torch.Generator().manual_seed(0)
    shape = (batch, stack - 1 + STEPS + 1, channels, SIZE, SIZE)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    if action.kind == "discrete": actions = torch.randint(0, 3, (batch, STEPS), generator=rng)
    else: actions = torch.rand(batch, STEPS, 2, generator=rng) * 2 - 1
    return Batch(frames, actions, torch.zeros(batch, STEPS), torch.zeros(batch, STEPS, dtype=torch.bool))


def made(seed=0, model="encdec", data="continuous rgb", **kind):
    action, channels, _ = DATA[data]
    settings, spec = tiny(model=model, data=data, **kind), DataSpec((channels, SIZE, SIZE), action, [], [])
    return fresh_model(model.partition("-")[0], settings, spec, windows(data).frames.flatten(0, 1), seed)


def loss_of(model, batch):
    torch.manual_seed(1)                                                     # the same directions for SIGReg
    return model.loss(batch)


def name(kind):
    return " ".join(str(v) for v in kind.values() if v is not None)


def learn(model, batch, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    for step in range(steps):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        model.after_step(step + 1, steps)


@pytest.mark.parametrize("kind", CASES, ids=name)
def test_learns_and_comes_back_from_a_file(kind, tmp_path):
    model, batch = made(**kind), windows(kind["data"])
    first = loss_of(model, batch)
    first.total.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trainable)                        # nothing trainable is left out
    objective = "prediction" if "jepa-" in kind["model"] else "pixels"
    assert set(first.terms) == {objective} | set(TERMS[kind["term"]])
    learn(model, batch, 10)
    last = loss_of(model, batch)
    assert last.total < first.total
    save_weights(model, tmp_path / "w.safetensors")
    again = made(seed=1, **kind)
    load_weights(again, tmp_path / "w.safetensors")
    actions = batch.actions[:, :HORIZON]
    with torch.no_grad():
        z = model.eval().encode(batch.frames)                                # (B, T+1, N, D)
        rolled = model.rollout(z[:, :1], actions[:, :0], actions)            # (B, H, N, D)
        assert z.shape == (BATCH, STEPS + 1, *model.latent_shape)
        assert rolled.shape == (BATCH, HORIZON, *model.latent_shape)
        assert z.isfinite().all() and rolled.isfinite().all()
        assert torch.equal(again.eval().encode(batch.frames), z)
        assert torch.equal(again.rollout(z[:, :1], actions[:, :0], actions), rolled)


def test_every_pair_that_can_be_combined_is():
    values = {factor: {c[factor] for c in CASES} - {None} for factor in CASES[0]}
    cannot = {("mlp", True), ("vicreg", "one")}                              # no grid; one view alone
    cannot |= set(itertools.product(["encdec"], values["predictor"]))
    cannot |= set(itertools.product(MODELS[2:], values["decoder"]))
    for a, b in itertools.combinations(values, 2):
        found = {(c[a], c[b]) for c in CASES}
        missing = set(itertools.product(values[a], values[b])) - found - cannot
        assert not missing, (a, b, missing)
    assert len({name(c) for c in CASES}) == len(CASES) == 240


# what cannot be combined says so

@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("term", ["vicreg", "barlow", "sigreg"])
def test_a_batch_of_one_is_no_statistic(model, term):
    alone = windows("continuous rgb", batch=1)
    learner = made(model=model, term=term)
    with pytest.raises(SettingsError, match="at least two windows; raise train.batch_size"):
        learner.loss(alone)
    assert learner.encode(alone.frames).isfinite().all()                     # one window may be looked at
    timely = made(model=model, term="smoothness")
    assert timely.loss(alone).total.isfinite()                               # neither is a term about time


def test_one_view_cannot_agree_with_itself():
    with pytest.raises(SettingsError, match="loss.invariance compares two views"):
        tiny(term="vicreg", views="one")


NOTHING_LEFT = {
    "dino": {"term": "dino"},
    "no share": {"loss": {"jepa": 0.0}},
    "no weight": {"term": "vicreg", "loss": {"variance": 0.0, "covariance": 0.0, "invariance": 0.0}},
}


@pytest.mark.parametrize("kind", NOTHING_LEFT.values(), ids=NOTHING_LEFT)
def test_an_online_encoder_that_nothing_teaches_is_refused(kind):
    with pytest.raises(SettingsError, match="none that is on reaches it"): made(model="jepa-ema_both", **kind)
    made(model="jepa-ema_target", **kind)                                    # here the prediction teaches it


CONV, LINEAR = "encoder.convs.0.weight", "encoder.readout.linear"
OTHERS = [
    ({"model": "jepa-shared"}, "action.embed.weight is missing"),
    ({"model": "encdec_jepa"}, "action.embed.weight is missing"),
    ({"encoder": "vit"}, f"{CONV} is missing"),
    ({"encoder": "cnn"}, rf"{CONV} is \(4, 3, 3, 3\) float32, the model's is \(8, 3, 4, 4\) float32"),
    ({"width": 32}, rf"{LINEAR}.2.0.weight is \(32, 32\) float32, the model's is \(16, 32\) float32"),
    ({"decoder": "transformer"}, "decoder.map.1.weight is missing"),
    ({"tokens": True}, f"{LINEAR}.0.weight is"),
    ({"term": "dino"}, "the model has no regularizer.*center"),
    ({"data": "discrete grey"}, r"mean_frame is \(1, 16, 16\) float32, the model's is \(3, 16, 16\) float32"),
]


@pytest.mark.parametrize("kind, message", OTHERS, ids=[name(kind) for kind, _ in OTHERS])
def test_weights_of_another_architecture_are_refused_by_name(kind, message, tmp_path):
    model = made()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    save_weights(made(seed=1, **kind), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=message): load_weights(model, tmp_path / "w.safetensors")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())     # whole, or not at all


@pytest.mark.parametrize("mode, other", list(itertools.permutations(["jepa-shared", "jepa-ema_target"])))
def test_a_copy_too_many_or_too_few_is_refused(mode, other, tmp_path):
    save_weights(made(model=other), tmp_path / "w.safetensors")
    short = other == "jepa-shared"
    message = "target.convs.0.weight is missing" if short else "the model has no target."
    model = made(model=mode)
    with pytest.raises(WeightsError, match=message): load_weights(model, tmp_path / "w.safetensors")
