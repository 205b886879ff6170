"Live curves: they follow a training, and draw what they have been given."
import torch

from worldmodels_nb.settings import TrainingSettings
from worldmodels_nb.training.fit import LossTerms, Trainable, fit
from worldmodels_nb.viz import png_bytes
from worldmodels_nb.widgets.training import LiveCurves


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
    assert view.image.value == png_bytes(view.render(view.state))
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
