"Energies of actions: equal to rollouts one by one, lowest where the truth is, drawn for any actions."
from dataclasses import replace

import numpy as np
import pytest
import torch
from rollout_tools import untrained_run

from worldmodels_nb.data.tworooms import ActionSpec
from worldmodels_nb.widgets import energy
from worldmodels_nb.widgets.base import picture_bytes
from worldmodels_nb.widgets.energy import (
    EnergyExplorer,
    action_bounds,
    action_grid,
    hold_actions,
    lowest_actions,
    relative_distance,
)

PLANE = ActionSpec("continuous", 2, [-1, -1], [1, 1])
LEFT, TOP, SIDE, PITCH = 158, 42, 164, 178  # px, of a map


class Perfect(torch.nn.Module):
    "A world whose latent is a place, and whose actions are steps."
    def rollout(self, z, past_actions, actions):
        return z[:, -1:] + actions.cumsum(1)[:, :, None]


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    changes = {"env.id": "Pendulum-v1", "collect.policy": "random"}
    return untrained_run(tmp_path_factory.mktemp("pendulum"), changes, ["jepa"])


@pytest.fixture
def explorer(rooms): return EnergyExplorer(rooms)


@pytest.fixture
def rolled(monkeypatch):
    "The models that roll out from here on, and how far."
    calls, real = [], energy.hold_actions
    def call(model, z, candidates, steps):
        calls.append((model.registered, steps))
        return real(model, z, candidates, steps)
    monkeypatch.setattr(energy, "hold_actions", call)
    return calls


@pytest.mark.parametrize("name", ["encdec", "jepa", "vjepa2"])
def test_energies_are_those_of_rollouts_one_by_one(explorer, rooms, name):
    explorer.change(ahead=3, resolution=5)
    case, model = explorer.case(explorer.state), rooms.models[name]
    z = energy.encode_rows(model, rooms.data.dataset, np.array([case.now, case.now + 3]))
    found = explorer.energies(name, explorer.state)
    for i in (0, 7, 24):
        actions = case.candidates[i].expand(1, 3, -1)
        with torch.no_grad(): end = model.rollout(z[None, :1], actions[:, :0], actions)[0, -1]
        assert np.isclose(found[i], (end - z[1]).norm() / (z[0] - z[1]).norm(), rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_perfect_model_has_its_lowest_point_at_the_true_action(steps):
    grid = action_grid(PLANE, np.array([[-1., -1], [1, 1]]), 5, np.zeros(2))
    z = torch.randn(3, 1, 2, generator=torch.Generator().manual_seed(0))
    for i in (0, 7, 24):
        goals = z + steps * grid[i]
        energies = relative_distance(hold_actions(Perfect(), z[0], grid, steps)[:, -1], goals[0], z[0])
        assert energies.argmin() == i and energies[i] < 1e-5
        assert lowest_actions(Perfect(), z, goals, grid, steps).tolist() == [i] * 3
    assert relative_distance(z[0], goals[0], z[0]) == 1


def test_where_nothing_moves_the_energy_is_not_a_number():
    z = torch.ones(4, 2, 3)
    assert relative_distance(z, z[0], z[0]).isnan().all() and relative_distance(z, z[0], z[0]).shape == (4,)


def test_a_grid_has_what_actions_there_are():
    bounds = np.array([[-1., -2, 0], [1, 2, 5]])
    wide = ActionSpec("continuous", 3, *bounds.tolist())
    grid = action_grid(wide, bounds, 3, np.array([9., 9, 4]))
    assert grid.shape == (9, 3) and grid[:, 2].eq(4).all()
    assert grid[:, :2].tolist() == [[x, y] for x in (-1, 0, 1) for y in (-2, 0, 2)]
    one = action_grid(replace(wide, n=1), bounds[:, :1], 5, np.zeros(1))
    assert one.tolist() == [[-1], [-.5], [0], [.5], [1]]
    assert action_grid(ActionSpec("discrete", 3), None, 9, np.array(0)).tolist() == [0, 1, 2]


def test_endless_bounds_are_those_of_the_data(rooms):
    data = rooms.data.dataset
    assert action_bounds(data).tolist() == [[-1, -1], [1, 1]]
    spec = replace(data.spec, action=ActionSpec("continuous", 2, [-1, -3e38], [1, 3e38]))
    kept, data.spec = data.spec, spec
    low, high = data.actions.min(0)[1], data.actions.max(0)[1]
    try: assert np.allclose(action_bounds(data), [[-1, low], [1, high]])
    finally: data.spec = kept


def test_a_picture_depends_on_its_state_alone(rooms, depends_on_its_state_alone):
    depends_on_its_state_alone(lambda: EnergyExplorer(rooms))


@pytest.mark.parametrize("name, value", [
    ("models", ("jepa",)), ("episode", 2), ("step", 2), ("ahead", 3), ("resolution", 5),
    ("cost", "probed position"), ("tried", 4)])
def test_a_control_redraws_the_picture_and_back(explorer, redraws_and_goes_back, name, value):
    redraws_and_goes_back(explorer, name, value)


def test_rollouts_are_remembered(rooms, rolled):
    view = EnergyExplorer(rooms)
    view.change(ahead=3)
    assert rolled == [(name, steps) for steps in (1, 3) for name in rooms.models]
    view.change(ahead=1)
    view.change(ahead=3, tried=5)
    view.change(cost="probed position")
    view.change(models=("jepa",))
    assert len(rolled) == 6
    view.change(step=1)
    assert rolled[6:] == [("jepa", 3)]


def test_what_is_remembered_has_an_end(rooms):
    view = EnergyExplorer(replace(rooms, models={"jepa": rooms.models["jepa"]}))
    for i in range(500): view._cache["other", i] = None
    view.change(step=2)
    assert len(view._cache) <= 403 and view.message.value == ""


def test_near_the_end_the_goal_is_the_last_frame(explorer, rooms):
    length = int(rooms.data.dataset.lengths[rooms.data.validation[0]])
    explorer.change(step=length - 1, ahead=8)
    case = explorer.case(explorer.state)
    assert case.steps == 1 and case.now + 1 == rooms.data.dataset.starts[explorer.state["episode"]] + length
    assert explorer.message.value == ""


def test_the_pointer_tries_the_action_it_is_on(explorer):
    candidates = explorer.case(explorer.state).candidates
    explorer.pointed("hover", LEFT + 2, TOP + SIDE - 2)
    assert candidates[explorer.state["tried"]].tolist() == [-1, 1]
    explorer.pointed("click", LEFT + PITCH + SIDE - 2, TOP + SIDE / 2)
    assert np.allclose(candidates[explorer.state["tried"]], [1, 0], atol=1e-6)
    assert explorer.image.value == picture_bytes(explorer.render(explorer.state))
    before = explorer.image.number
    for x, y in ((10, 80), (LEFT + SIDE + 5, 80), (LEFT + 4 * PITCH, 80), (LEFT, 20), (LEFT, 300)):
        explorer.pointed("hover", x, y)
    assert explorer.image.number == before
    explorer.key_pressed("Escape")
    assert explorer.state["tried"] == -1
    explorer.change(models=("jepa",), resolution=21)
    explorer.pointed("hover", LEFT + SIDE - 2, TOP + SIDE - 2)
    assert explorer.state["tried"] == 440


def test_keys_go_along_the_episode(explorer):
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"): explorer.key_pressed(key)
    explorer.key_pressed("ArrowRight", down=False)
    assert explorer.state["step"] == 1
    explorer.change(step=0)
    explorer.key_pressed("ArrowLeft")
    assert explorer.state["step"] == 0


def test_the_sentence_says_how_far_the_lowest_point_is_from_the_true_action(explorer):
    case, values = explorer.case(explorer.state), explorer.energies("jepa", explorer.state)
    lowest = case.candidates[values.argmin()].numpy()
    said = explorer.sentence("jepa", explorer.state)
    assert f"{np.linalg.norm(lowest - case.true):.2f} from the true action" in said
    assert f"{np.linalg.norm(case.true):.2f} from it" in said and said in explorer.image.alt


def test_actions_that_can_be_counted_are_bars(cart, redraws_and_goes_back):
    view = EnergyExplorer(cart)
    view.change(ahead=6)
    assert view.message.value == "" and view.controls["resolution"].disabled
    assert "lowest for action" in view.sentence("jepa", view.state)
    view.pointed("hover", LEFT + SIDE - 5, TOP + 50)
    assert view.state["tried"] == 1
    redraws_and_goes_back(view, "ahead", 2)


def test_an_action_of_one_number_is_a_curve(pendulum, redraws_and_goes_back):
    view = EnergyExplorer(pendulum)
    assert view.message.value == "" and view.case(view.state).candidates.shape == (7, 1)
    view.pointed("hover", LEFT + 1, TOP + 50)
    assert view.state["tried"] == 0
    redraws_and_goes_back(view, "resolution", 15)


def test_without_probes_decoders_or_models_there_is_a_sentence(rooms):
    bare = EnergyExplorer(replace(rooms, probes={}, decoders={}))
    assert bare.message.value == "" and bare.controls["cost"].options == ("latent",)
    assert bare.controls["cost"].disabled
    one = EnergyExplorer(replace(rooms, probes={"jepa": rooms.probes["jepa"]}))
    one.change(cost="probed position")
    assert one.message.value == "" and "no probe" in one.sentence("encdec", one.state)
    one.change(models=())
    assert "no model is chosen" in one.message.value
    assert "no model" in EnergyExplorer(replace(rooms, models={})).message.value
    gone = EnergyExplorer(replace(rooms, data=None, notes=["The data are gone."]))
    assert gone.message.value == "The data are gone."
    gone.pointed("hover", LEFT + 5, TOP + 5)


def test_a_collapsed_model_sees_no_difference(explorer, monkeypatch):
    def same(name, row): return torch.ones(explorer.opened.models[name].latent_shape)
    monkeypatch.setattr(explorer, "_latent", same)
    assert "no difference" in explorer.sentence("jepa", explorer.state)
    explorer.show()
    assert explorer.message.value == ""
