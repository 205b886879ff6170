"Costs: parameters, steps, frames, seconds, operations of all stages; models that are not matched."
import json
import math

import pytest
import torch
from torch import nn

from worldmodels_nb.data.datasets import sample_dataset
from worldmodels_nb.eval.costs import (
    cost_results,
    count_flops,
    count_parts,
    frames_a_step,
    matched,
    rollout_costs,
    stage_result,
    step_flops,
    timed_encoding,
)
from worldmodels_nb.models.base import MODELS, WorldModel, build_model, known_stages
from worldmodels_nb.settings import load_settings, write_json
from worldmodels_nb.training.fit import freeze
from worldmodels_nb.training.parts import record_loaded

known_stages()  # imports every chapter of a model
NAMES = ("encdec", "encdec_jepa", "jepa", "vjepa2")
TINY = {"encoder.patch.channels": 4, "model.latent_dim": 8, "model.action_dim": 4, "decoder.type": "conv",
        "decoder.channels": 4,
        "vjepa2.pretrain.dim": 12, "vjepa2.pretrain.heads": 1, "vjepa2.pretrain.depth": 1,
        "vjepa2.pretrain.predictor_dim": 12, "vjepa2.pretrain.predictor_heads": 1,
        "vjepa2.action.dim": 12, "vjepa2.action.heads": 1, "vjepa2.action.depth": 1}


def built(name, changes=(), device="meta"):
    settings = load_settings(overrides=TINY | dict(changes))
    with torch.device(device): return build_model(name, settings, sample_dataset().spec).to(device), settings


def result(steps, seconds): return dict(steps=steps, seconds=seconds, best_step=steps - 1, weights="…")


def figures(name, results, changes=()):
    world, settings = built(name, changes)
    rows = cost_results(freeze(world), results, settings)
    assert {(row["protocol"], row["model"], row["kind"], row["horizon"]) for row in rows} == {
        ("cost", name, "model", 0)}
    return world, settings, {row["metric"]: (row["value"], row["unit"]) for row in rows}


def test_one_stage_has_a_best_step_and_the_parts_are_counted():
    world, settings, found = figures("jepa", [result(10, 2.5)])
    for name, part in world.parts().items():
        assert found[f"parameters {name}"] == (sum(p.numel() for p in part.parameters()), "parameters")
    own = found["parameters encoder"][0] + found["parameters predictor"][0]
    assert found["parameters trainable"] == (own, "parameters")
    assert found["steps"] == (10, "steps") and found["best_step"] == (9, "steps")
    frames = 10 * settings.train.batch_size * (settings.train.window_steps + 1)
    assert found["frames_seen"] == (frames, "frames") and found["seconds"] == (2.5, "s")


def test_stages_are_added_up_with_the_encoding_between_them():
    stages = [result(10, 2.5), result(4, .25) | dict(encoding=3.)]
    world, settings, found = figures("vjepa2", stages)
    assert found["seconds"][0] == pytest.approx(5.75) and found["steps"][0] == 14
    assert "best_step" not in found
    first, second = (frames_a_step(stage, settings) for stage in world.stages())
    assert found["frames_seen"][0] == 10 * first + 4 * second
    flops = [step_flops(built("vjepa2")[0], stage, settings) for stage in built("vjepa2")[0].stages()]
    assert found["flops_training"][0] == 10 * flops[0] + 4 * flops[1]
    assert found["flops_step"][0] == pytest.approx(found["flops_training"][0] / 14)


@pytest.mark.parametrize("name", NAMES)
def test_weights_from_elsewhere_were_paid_for_elsewhere(name):
    stages = [result(0, 0.)] * len(MODELS[name].stage_names)
    _, _, found = figures(name, stages)
    assert found["flops_step"][0] == found["flops_training"][0] == found["frames_seen"][0] == 0
    assert found["flops_rollout"][0] > 0


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 7, 2)])
def test_operations_of_a_product_are_counted_by_hand_forward_and_backward(shape):
    n, m, k = shape
    x = torch.zeros(n, m, device="meta")
    layer = nn.Linear(m, k, bias=False, device="meta")
    assert count_flops(lambda: layer(x)) == 2 * n * m * k
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * 2 * n * m * k      # no gradient for x itself


@pytest.mark.parametrize("name", ["jepa", "encdec", "encdec_jepa"])
def test_operations_grow_with_the_batch_and_are_those_of_numbers(name):
    few, settings = built(name, {"train.batch_size": 4})
    many, double = built(name, {"train.batch_size": 8})
    stage, twice = few.stages()[-1], many.stages()[-1]
    assert step_flops(many, twice, double) == 2 * step_flops(few, stage, settings) > 0
    there, _ = built(name, device="cpu")
    z, actions = (torch.zeros(1, 1, *there.latent_shape), torch.zeros(1, 1, 2))
    here, gone = z.to("meta"), actions.to("meta")
    assert count_flops(lambda: there.rollout(z, actions[:, :0], actions)) == count_flops(
        lambda: few.rollout(here, gone[:, :0], gone))


def test_a_rollout_of_a_pixel_model_runs_through_its_decoder():
    sizes, flops = {}, {}
    for name in NAMES:
        world, _ = built(name)
        flops[name], sizes[name] = rollout_costs(world)
        parts = {part: count_parts({part: child}) for part, child in world.parts().items()}
        through = dict(encdec=("encoder", "action", "decoder"))
        through["encdec_jepa"] = "encoder", "predictor", "decoder"
        assert sizes[name] == sum(parts[part] for part in through.get(name, ("predictor",)))
    assert min(flops["encdec"], flops["encdec_jepa"]) > flops["jepa"]


class Peeking(WorldModel):
    "Looks at its numbers, which a model without numbers has not."
    def __init__(self, loses=True):
        nn.Module.__init__(self)
        self.encoder, self.frame_stack, self.latent_shape, self.window = nn.Linear(2, 2), 1, (1, 2), 3
        self.spec, self.registered = sample_dataset().spec, "peeking"
        self.to("meta")

    def loss(self, batch): raise AssertionError if self.encoder.weight.sum().item() else None
    def rollout(self, z, past_actions, actions): return self.encoder(z) * self.encoder.bias.sum().item()


def test_what_looks_at_numbers_has_no_figure():
    world, settings = Peeking(), load_settings()
    assert math.isnan(step_flops(world, world.stages()[0], settings))
    assert all(math.isnan(value) for value in rollout_costs(world))


class Sized(nn.Module):
    "Parts of given sizes."
    def __init__(self, **sizes):
        super().__init__()
        self.sizes = {name: nn.Linear(size, 1, bias=False) for name, size in sizes.items()}

    def parts(self): return self.sizes
    compared_parts = WorldModel.compared_parts


@pytest.mark.parametrize(("sizes", "named"), [
    ([100, 100, 110], []), ([100, 100, 111], [2]), ([100, 89, 100], [1]), ([100], []), ([], []),
    ([100, 300], [1]), ([1, 100, 101, 102], [0]), ([100, 200, 400], [0, 2])])
def test_models_are_matched_within_five_per_cent_of_the_middle_one(sizes, named):
    worlds = {f"m{i}": Sized(encoder=size, predictor=100, decoder=999) for i, size in enumerate(sizes)}
    said = matched(worlds)
    assert [sentence.split()[0] for sentence in said] == [f"m{i}" for i in named]
    assert all("\n" not in sentence and "encoder + predictor" in sentence for sentence in said)
    assert not matched(worlds, tolerance=9999)


def test_only_what_learns_to_see_and_predict_is_compared():
    worlds = dict(a=Sized(encoder=50, predictor=50))
    worlds["b"] = Sized(encoder=50, predictor=50, target=50, decoder=900)
    assert not matched(worlds)
    lone, = matched(worlds | dict(c=Sized(encoder=50, decoder=900)))
    assert lone.startswith("c is not matched: encoder + decoder (it has no predictor) have 950 parameters")


@pytest.mark.parametrize("preset", ["demo", "study"])
def test_a_doctored_model_is_named(preset):
    def worlds_of(**doctored):
        found = {}
        for name in ("encdec_jepa", "jepa"):
            settings = load_settings(preset=preset, overrides=doctored.get(name, {}))
            with torch.device("meta"):
                found[name] = build_model(name, settings, sample_dataset().spec).to("meta")
        return found
    assert not matched(worlds_of())
    assert not matched(worlds_of(jepa={"jepa.target": "ema_target"}))             # a copy that does not learn
    wrong, = matched(worlds_of(jepa={"model.latent_dim": 144}))
    assert wrong.startswith("jepa is not matched")


def test_the_plain_encoder_decoder_predicts_with_its_decoder():
    assert list(built("encdec")[0].compared_parts()) == ["encoder", "action", "decoder"]
    for name in NAMES[1:]: assert list(built(name)[0].compared_parts()) == ["encoder", "predictor"]


def test_encoding_is_noted_once_and_never_for_a_finished_stage(tmp_path):
    folder = tmp_path / "models" / "vjepa2" / "action"
    with timed_encoding(folder): pass
    first = json.loads((folder / "encoding.json").read_text())
    assert first["seconds"] >= 0
    write_json(folder / "encoding.json", dict(seconds=7.5))
    with timed_encoding(folder): pass
    world, _ = built("jepa", device="cpu")
    record_loaded(world, "elsewhere", folder)
    assert stage_result(folder)["encoding"] == 7.5 and stage_result(folder)["steps"] == 0
    (folder / "encoding.json").unlink()
    with timed_encoding(folder): pass
    assert not (folder / "encoding.json").exists() and stage_result(folder)["encoding"] == 0


def test_encoding_that_breaks_off_is_not_noted(tmp_path):
    with pytest.raises(KeyboardInterrupt), timed_encoding(tmp_path): raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
