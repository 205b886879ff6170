"What the tests of all widgets share: a clip, and two claims that every view has to meet."
import random

import pytest
import torch
from rollout_tools import untrained_run

from worldmodels_nb.widgets.base import picture_bytes


@pytest.fixture(scope="session")
def clip(sample):
    "Four frames of the sample, uint8 (4, C, h, w)."
    return torch.from_numpy(sample.frames[:4].copy())


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    "A run of three untrained models, which is looked at and never changed."
    return untrained_run(tmp_path_factory.mktemp("rooms"), models=("encdec", "jepa", "vjepa2"))


@pytest.fixture(scope="session")
def cart(tmp_path_factory):
    "A run with actions that are counted, and stacked frames; looked at and never changed."
    changes = {"env.id": "CartPole-v1", "collect.policy": "random", "model.frame_stack": 2}
    return untrained_run(tmp_path_factory.mktemp("cart"), changes)


@pytest.fixture
def depends_on_its_state_alone():
    "A check of what makes a view: the same state gives the same bytes, and nothing global is drawn from."
    def check(make):
        view, other = make(), make()
        torch.manual_seed(5)
        random.seed(5)
        again = picture_bytes(view.render(view.state))
        assert view.image.value == again == picture_bytes(other.render(dict(view.state)))
        generator = torch.get_rng_state()
        view.render(view.state)
        assert torch.equal(generator, torch.get_rng_state())
    return check


@pytest.fixture
def redraws_and_goes_back():
    "A check of one control of a view: another value is another picture, and the old value the old picture."
    def check(view, name, value):
        before, old = view.image.value, view.controls[name].value
        view.controls[name].value = value
        assert view.image.value != before and view.image.value == picture_bytes(view.render(view.state))
        assert view.message.value == ""
        view.controls[name].value = old
        assert view.image.value == before
    return check
