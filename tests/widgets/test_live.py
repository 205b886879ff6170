"A training held in the hand: stepped, paused, stopped, its terms switched; the same bits as one left alone."
import asyncio

import pytest
import torch

from worldmodels_nb.data.datasets import SAMPLE
from worldmodels_nb.runs.reopen import OpenRun
from worldmodels_nb.runs.training import initial_model, split_data
from worldmodels_nb.settings import load_settings, shipped
from worldmodels_nb.training.fit import LossTerms, Trainable, fit_windows, weighted, weights_hash
from worldmodels_nb.widgets.live import Checks, LiveTraining, SteppedTraining, Switched, trainable_parts

SMALL = {
    "run.models": ["encdec", "jepa", "vjepa2"],
    "train.steps": 6, "train.batch_size": 4, "train.window_steps": 2,
    "model.latent_dim": 8, "encoder.patch.channels": 8, "predictor.hidden": [8], "decoder.dim": 16,
    "decoder.depth": 1, "decoder.mlp_dim": 16, "data.path": str(shipped(SAMPLE)),
}


@pytest.fixture(scope="module")
def opened(sample):
    "A run of which nothing is trained yet, on the sample's episodes."
    settings = load_settings(preset="smoke", overrides=SMALL)
    folder = type("Folder", (), dict(name="tiny"))()
    class Tiny(OpenRun): name = "tiny"
    return Tiny(folder, settings, {}, split_data(sample, settings), {}, {}, {}, {}, [], [])


@pytest.fixture
def view(opened):
    yield (view := LiveTraining(opened, "jepa", every=2))
    view.stop()


class Two(Trainable):
    "Two numbers, each with a term of its own."
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    def loss(self, batch):
        return weighted(dict(a=self.a.square().sum(), b=self.b.square().sum()), dict(b=3.0))


def test_what_is_off_has_no_gradient_and_the_rest_is_as_it_was():
    model = Switched(Two())
    assert model.names(None) == ["a", "b"]
    for off, wanted in (((), (2., 6.)), (("b",), (2., 0.)), (("a", "b"), (0., 0.))):
        model.off = frozenset(off)
        model.zero_grad()
        losses = model.loss(None)
        losses.total.backward()
        assert (model.model.a.grad.item(), model.model.b.grad.item()) == wanted
        assert losses.total.item() == sum(2 * w / 4 for w in wanted) and set(losses.terms) == {"a", "b"}


def test_a_loss_of_one_piece_has_no_switches():
    class One(Two):
        def loss(self, batch): return LossTerms(self.a.sum(), {"a": self.a.detach().sum()})
    assert Switched(One()).names(None) == []


def test_watched_and_decoded_along_it_ends_with_the_bits_of_a_training_left_alone(opened):
    stepped = SteppedTraining(opened, "jepa", every=2)
    while stepped.step(): stepped.along.strip()
    alone = initial_model("jepa", opened.settings, opened.data)
    recipe = opened.settings.recipe("jepa")
    fit_windows(alone, opened.data.windows(alone.window), recipe, opened.settings.run.seed)
    assert weights_hash(stepped.world) == weights_hash(alone)


def test_every_part_of_every_model_can_be_trained_or_says_what_it_needs(opened):
    assert trainable_parts(opened) == ["encdec", "jepa", "vjepa2/pretrain", "vjepa2/action"]
    for part in trainable_parts(opened)[:3]:
        stepped = SteppedTraining(opened, part)
        assert stepped.step() and stepped.run.step == 1
        strip = stepped.along.strip()
        assert list(strip) == ["truth", "decoded", "rollout"]
        assert {len(frames) for frames in strip.values()} == {9}
    with pytest.raises(ValueError, match="vjepa2/action needs a trained pretrain, and run tiny has none"):
        SteppedTraining(opened, "vjepa2/action")


def test_a_later_stage_stands_on_the_runs_own_earlier_one(opened):
    trained = initial_model("vjepa2", opened.settings, opened.data)
    with torch.no_grad(): trained.masked.target.patch_embed.proj.weight.add_(1)
    with_it = OpenRun(**{**vars(opened), "models": {"vjepa2": trained}})
    stepped = SteppedTraining(with_it, "vjepa2/action")
    before = weights_hash(stepped.world.masked)
    assert before == weights_hash(trained.masked) and stepped.step()
    assert weights_hash(stepped.world.masked) == before and "rollout" in stepped.run.losses.terms


def test_steps_are_made_and_drawn_and_the_end_is_said(view):
    assert view.words().startswith("step 0 of 6, waiting; not collapsed: ")
    before = view.image.value
    view.advance(3)
    assert [row["step"] for row in view.state["rows"]] == [0, 2, 3] and view.image.value != before
    assert view.image.alt.startswith("training of jepa at step 3: ") and "step 3 of 6" in view.message.value
    view.advance(99)
    assert view.words().startswith("step 6 of 6, ended; ") and view.state["rows"][-1]["step"] == 6
    view.advance(1)
    assert view.words().startswith("step 1 of 6, waiting; ")  # anew


def test_a_switch_acts_at_the_next_step(view):
    view.advance(1)
    view.change(terms=("prediction",))
    assert view.controls["terms"].value == ("prediction",)
    assert view.training.model.off == {"variance", "covariance", "smoothness", "inverse"}
    assert "waiting, without covariance, inverse, smoothness, variance; " in view.words()
    view.advance(1)
    losses = view.training.run.losses
    assert losses.total.item() == pytest.approx(losses.parts["prediction"].item(), rel=1e-4)


def test_another_model_begins_anew_with_its_own_terms(view):
    view.advance(2)
    view.controls["model"].value = "encdec"
    assert view.controls["terms"].value == view.controls["terms"].options == ("pixels",)
    assert view.words().startswith("step 0 of 6, ") and view.training.part == "encdec"
    view.controls["model"].value = "vjepa2/action"
    assert view.training is None and "needs a trained pretrain" in view.message.value
    view.advance(1)
    view.start()
    view.controls["model"].value = "jepa"
    assert view.words().startswith("step 0 of 6, ")


def test_it_runs_between_the_cells_and_can_be_held(view):
    async def cells():
        view.start()
        while view.training.run.step < 2: await asyncio.sleep(.01)
        view.pause()
        held = view.training.run.step
        await asyncio.sleep(.05)
        assert view.training.run.step == held and view.task.done() and "waiting" in view.words()
        view.buttons["start"].click()
        await view.task
        assert view.words().startswith("step 6 of 6, ended; ")
    asyncio.run(cells())


def test_a_second_one_stops_the_first(opened):
    async def twice():
        first = LiveTraining(opened, "jepa")
        first.start()
        await asyncio.sleep(.01)
        second = LiveTraining(opened, "jepa")
        second.start()
        await first.task
        assert first.training.ended and not first.playing and second.playing
        second.buttons["stop"].click()
        await second.task
        assert second.training.ended
    asyncio.run(twice())


def test_whatever_goes_wrong_is_said_and_ends_it(view):
    def broken(batch): raise RuntimeError("a <b>line</b>\nand another")
    view.training._with_latents = broken
    view.advance(2)
    assert view.message.value == "RuntimeError: a &lt;b&gt;line&lt;/b&gt; and another" and view.training.ended
    view.advance(1)
    assert view.words().startswith("step 1 of 6, ")


def test_without_a_loop_it_says_what_to_call_instead(view):
    view.start()
    assert "call advance(steps)" in view.message.value and not view.playing


def test_without_data_it_says_so(opened):
    bare = OpenRun(**{**vars(opened), "data": None, "folder": opened.folder})
    with pytest.raises(ValueError, match="has no data here; choose another run"):
        SteppedTraining(type(opened)(**vars(bare)), "jepa")


def test_boxes_to_tick_are_one_control():
    checks, seen = Checks("terms"), []
    checks.options = ("a", "b", "c")
    checks.observe(lambda change: seen.append(change["new"]), "value")
    assert checks.value == ("a", "b", "c")
    checks.children[2].value = False
    checks.value = ("b",)
    assert seen == [("a", "c"), ("b",)] and [box.value for box in checks.children[1:]] == [False, True, False]
