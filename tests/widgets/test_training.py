"Live curves: they follow a training, and draw what they have been given."
import pytest
import torch

from worldmodels_nb.runs.training import initial_model, split_data
from worldmodels_nb.settings import TrainingSettings, load_settings
from worldmodels_nb.training.fit import LossTerms, Trainable, fit, fit_windows
from worldmodels_nb.viz import png_bytes
from worldmodels_nb.widgets.base import picture_bytes
from worldmodels_nb.widgets.training import (
    LiveCurves,
    LiveRun,
    TrainingLog,
    Watcher,
    collapse_sentence,
    training_picture,
)


def make():
    view = LiveCurves("term")
    for step in (1, 2, 3): view.add(step, {"error": 1 / step})
    return view


def test_a_picture_depends_on_its_state_alone(depends_on_its_state_alone):
    depends_on_its_state_alone(make)


def test_what_was_added_is_what_is_drawn():
    view = LiveCurves("term")
    for step in range(1, 7):
        late = dict(late=step / 6) if step > 3 else {}
        view.add(step, dict(error=1 / step) | late)
    assert view.image.value == picture_bytes(view.render(view.state))
    assert len(view.rows) == 6


def test_before_the_first_number_there_is_a_picture_and_nothing_to_say():
    view = LiveCurves("term")
    assert view.image.value and not view.message.value


class Parabola(Trainable):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.ones(1))

    def loss(self, batch):
        height = self.x.square().sum()
        return LossTerms(height, dict(height=height.detach(), other=self.x.detach().sum()))


def test_live_curves_follow_a_training():
    view, pictures = LiveCurves("term", ["height"], every=2), []
    view.image.observe(lambda change: pictures.append(change["new"]), "value")
    fit(Parabola(), lambda step: torch.zeros(1), TrainingSettings(steps=5), [view])
    assert [step for step, _ in view.rows] == [2, 4, 5]
    assert all(list(values) == ["height"] for _, values in view.rows)
    assert len(set(pictures)) == 3 and view.rows[-1][1]["height"] < 1


# ---------------------------------------------------------------- what says whether latents collapse

class Shrinking(torch.nn.Module):
    "Latents that shrink with each step."
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.training_seen = []

    def encode(self, frames):
        self.training_seen.append(self.training)
        noise = torch.randn(len(frames), 1, 1, 1) * 0                            # draws a number
        return self.scale * frames.float().flatten(1)[:, None, None] + noise     # (n, 1, 1, K)


class Falling(Trainable):
    def __init__(self, world):
        super().__init__()
        self.world = world

    def loss(self, batch):
        value = self.world.scale.square().sum() + 0 * torch.rand(())
        return LossTerms(value, dict(value=value.detach()))


def watched(every, steps=6):
    torch.manual_seed(3)
    world = Shrinking()
    frames = torch.randint(0, 255, (8, 1, 1, 2, 2), generator=torch.Generator().manual_seed(0)).byte()
    watcher = Watcher(world, frames, every)
    recipe = TrainingSettings(steps=steps, learning_rate=.1, schedule="constant", warmup=0)
    run = fit(Falling(world), lambda step: torch.zeros(1), recipe, [watcher] if every else [])
    return watcher, run


def test_a_watcher_notes_the_beginning_and_every_so_many_steps():
    watcher, _ = watched(4)
    assert [row["step"] for row in watcher.rows] == [0, 4, 6]
    assert [list(row["terms"]) for row in watcher.rows] == [[], ["value"], ["value"]]
    stds = [row["std"] for row in watcher.rows]
    assert stds[0] > stds[1] > stds[2]
    assert watcher.rows[0]["rank"] == pytest.approx(watcher.rows[2]["rank"], rel=1e-4)
    assert watcher.world.training_seen == [False] * 3 and watcher.world.training


def test_being_watched_changes_no_bit():
    ends = []
    for every in (0, 1):
        _, run = watched(every)
        ends.append((run.model.world.scale.item(), torch.rand(1).item()))
    assert ends[0] == ends[1]


def test_latents_that_are_not_finite_are_said_and_stop_nothing():
    watcher, run = watched(3)
    with torch.no_grad(): watcher.world.scale.fill_(float("nan"))
    watcher.look(run)
    assert collapse_sentence(watcher.rows).startswith("diverged: ")


SAID = {"collapsed": (.05, 5), "collapsed: the": (.9, 1.2), "shrinking": (.4, 5), "not collapsed": (1.3, 5)}


@pytest.mark.parametrize("verdict", SAID)
def test_the_sentence_compares_with_the_beginning(verdict):
    std, rank = SAID[verdict]
    said = collapse_sentence([dict(step=0, std=2., rank=9), dict(step=9, std=2 * std, rank=rank)])
    assert said.startswith(verdict) and f"to {std:.0%} of where it began" in said and "at first 9.0" in said


def test_before_anything_is_trained_there_is_a_picture_and_a_sentence():
    assert collapse_sentence([]) == "nothing is trained yet"
    assert png_bytes(training_picture({})) and png_bytes(training_picture({"jepa": []}))


def test_a_log_follows_a_run_and_its_view_follows_the_log(sample):
    settings = load_settings(preset="smoke")
    data, log = split_data(sample, settings), TrainingLog(every=2)
    view = LiveRun(log)
    empty = view.image.value
    for part in ("encdec", "jepa"):
        world = initial_model(part, settings, data)
        recipe = settings.recipe(part).model_copy(update=dict(steps=2, batch_size=4))
        fit_windows(world, data.windows(2), recipe, callbacks=log.watch(part, world, data))
    assert list(log.history) == ["encdec", "jepa"] and view.image.value != empty
    assert view.image.alt.startswith("training of jepa: not collapsed")
    assert list(view.controls["part"].options) == [("the newest", ""), ("encdec", "encdec"), ("jepa", "jepa")]
    newest = view.image.value
    view.controls["part"].value = "encdec"
    assert view.image.value != newest
