"The rollout stepper and the explorer: one picture a state, models asked once, actions of four kinds."
from dataclasses import replace

import pytest
from rollout_tools import BOTH, untrained_run

from worldmodels_nb.runs import counterfactuals
from worldmodels_nb.widgets import rollouts
from worldmodels_nb.widgets.base import picture_bytes
from worldmodels_nb.widgets.rollouts import RolloutExplorer, RolloutStepper, Several


@pytest.fixture
def make(clip): return lambda: RolloutStepper({"truth": clip, "prediction": clip.flip(0)})


@pytest.fixture(scope="module")
def rooms(tmp_path_factory): return untrained_run(tmp_path_factory.mktemp("rooms"))


@pytest.fixture
def explorer(rooms): return RolloutExplorer(rooms)


@pytest.fixture
def calls(monkeypatch):
    "The models that are asked from here on."
    names, real = [], rollouts.roll_out
    def call(world, *rest):
        names.append(world.registered)
        return real(world, *rest)
    monkeypatch.setattr(rollouts, "roll_out", call)
    return names


def test_a_picture_depends_on_its_state_alone(make, depends_on_its_state_alone):
    depends_on_its_state_alone(make)


def test_a_control_redraws_the_picture_and_back(make, redraws_and_goes_back):
    redraws_and_goes_back(make(), "step", 2)


def test_each_step_is_a_picture_of_its_own(make):
    view, pictures = make(), []
    for step in (1, 2, 4):
        view.controls["step"].value = step
        pictures.append(view.image.value)
    assert len(set(pictures)) == 3 and pictures[-1] == picture_bytes(view.render(dict(step=4)))
    assert view.image.alt == "Step 4 of a rollout, side by side: truth, prediction."


def test_one_row_alone_can_be_stepped_through(clip):
    view = RolloutStepper({"alone": clip})
    assert view.image.value and view.controls["step"].max == len(clip)


def test_rows_of_unequal_length_are_refused(clip):
    with pytest.raises(ValueError, match="one length"):
        RolloutStepper({"truth": clip, "prediction": clip[:2]})


def test_an_explorers_picture_depends_on_its_state_alone(rooms, depends_on_its_state_alone):
    depends_on_its_state_alone(lambda: RolloutExplorer(rooms))


@pytest.mark.parametrize("name, value", [
    ("step", 2), ("models", ("jepa",)), ("episode", 3), ("start", 1), ("horizon", 3),
    ("actions", "shuffled"), ("actions", "still")])
def test_a_control_of_the_explorer_redraws_and_back(explorer, redraws_and_goes_back, name, value):
    explorer.change(step=1, horizon=4)
    redraws_and_goes_back(explorer, name, value)


def test_seed_and_text_count_for_their_own_kind_of_actions(explorer, redraws_and_goes_back):
    off = explorer.controls
    assert off["seed"].disabled and off["yours"].disabled
    explorer.change(actions="yours", yours="1,0")
    assert off["seed"].disabled and not off["yours"].disabled
    redraws_and_goes_back(explorer, "yours", "0,1 -1,0")
    explorer.change(actions="shuffled")
    assert not off["seed"].disabled and off["yours"].disabled
    redraws_and_goes_back(explorer, "seed", 1)


@pytest.mark.parametrize("actions", ["shuffled", "still", "yours"])
def test_other_actions_change_what_follows_and_every_rollout(explorer, actions):
    explorer.change(yours="-1,1")
    true = explorer.sheet(BOTH, *explorer.which(explorer.state))
    explorer.change(actions=actions)
    other = explorer.sheet(BOTH, *explorer.which(explorer.state))
    assert other.title == "truth" and (other.truth[0] == true.truth[0]).all()
    assert (other.truth[-1] != true.truth[-1]).any() and (other.actions != true.actions).any()
    for name in BOTH:
        was, now = true.models[name].frames["rollout"], other.models[name].frames["rollout"]
        assert (was[0] == now[0]).all() and (was[-1] != now[-1]).any(), name


def test_a_scrub_asks_no_model_and_another_model_only_itself(explorer, calls):
    explorer.change(step=1)
    for step in (2, 3, 0): explorer.controls["step"].value = step
    explorer.change(models=("jepa",))
    explorer.change(models=BOTH)
    assert calls == []
    explorer.change(models=("jepa",), episode=2)
    assert calls == ["jepa"]
    explorer.change(models=BOTH)
    assert calls == ["jepa", "encdec"]
    explorer.change(episode=1)
    assert len(calls) == 2


def test_sliders_end_where_the_episode_does(explorer):
    control = explorer.controls
    assert control["episode"].options == (1, 2, 3) and control["start"].max == 5 and control["step"].max == 6
    explorer.change(step=6, start=4)
    assert control["step"].value == control["step"].max == explorer.play.max == 2
    assert explorer.message.value == "The episode ends 2 steps after the start frame."
    explorer.change(start=0, horizon=3)
    assert control["step"].max == 3 and explorer.message.value == ""


def test_actions_that_cannot_be_read_are_said_and_the_picture_stays(explorer):
    explorer.change(actions="yours", yours="1,0", horizon=4)
    before = explorer.image.value
    explorer.change(yours="<b>left</b>")
    assert "cannot be read" in explorer.message.value and "<b>" not in explorer.message.value
    assert explorer.image.value == before
    explorer.change(yours="1,0")
    assert explorer.message.value == ""


def test_a_stroke_on_the_pad_is_yours(explorer):
    left, top, width, height = explorer.sheet(BOTH, *explorer.which(explorer.state)).pad
    before = explorer.image.value
    explorer.pointed("hover", left, top)
    explorer.pointed("release", left, top)
    assert explorer.image.value == before and explorer.state["actions"] == "true"
    explorer.pointed("click", left + .5 * width, top + .5 * height)
    assert explorer.state["actions"] == "yours" and set(explorer.state["yours"].split()) == {"0,0"}
    late = explorer.image.number
    explorer.pointed("drag", left + width, top + .5 * height)
    assert explorer.image.number == late                            # the page has not shown the last one
    explorer.image.shown = late
    explorer.pointed("drag", left + width, top + .6 * height)
    assert explorer.image.number > late
    explorer.pointed("release", left + 2 * width, top + .6 * height)
    assert explorer.state["yours"].startswith("0,0 ") and explorer.state["yours"].split()[-1] == "1,0.2"
    assert explorer.image.value == picture_bytes(explorer.render(explorer.state))


def test_the_film_and_the_arrow_keys_choose_the_step(explorer):
    sheet = explorer.sheet(BOTH, *explorer.which(explorer.state))
    explorer.pointed("click", sheet.x_of(5), 20)
    assert explorer.state["step"] == 5
    explorer.pointed("drag", sheet.x_of(1), sheet.below + 20)
    assert explorer.state["step"] == 1
    for key, step in (("ArrowLeft", 0), ("ArrowLeft", 0), ("ArrowRight", 1)):
        explorer.key_pressed(key)
        explorer.key_pressed(key, False)
        assert explorer.state["step"] == step


def test_it_says_what_it_shows(explorer):
    explorer.change(step=3, horizon=4)
    alt = explorer.image.alt
    assert "episode 1" in alt and "from frame 0 on, true actions, step 3 of 4" in alt
    assert "truth, reconstruction, rollout, own decoder" in alt and "position error" in alt
    assert alt.count(" px") == 2 and "jepa" in alt


def test_discrete_actions_where_nobody_knows_what_would_have_followed(cart, redraws_and_goes_back):
    view = RolloutExplorer(cart)
    redraws_and_goes_back(view, "step", 2)
    view.change(actions="still", horizon=4)
    sheet = view.sheet(BOTH, *view.which(view.state))
    assert sheet.title == "recorded" and sheet.actions.tolist() == [0] * 4
    assert "cannot be put into a recorded state" in view.message.value and "action 0" in view.message.value
    left, top, width, height = sheet.pad
    view.pointed("click", left + .1 * width, top + .9 * height)
    view.pointed("release", left + .1 * width, top + .9 * height)
    assert view.state["yours"] == "1 0 0 0" and view.state["actions"] == "yours"


def test_without_decoders_and_probes_there_is_what_there_is(rooms):
    bare = replace(rooms, decoders={}, probes={}, notes=["jepa has no <state> decoder yet."])
    view = RolloutExplorer(bare)
    sheet = view.sheet(BOTH, *view.which(view.state))
    assert [row for _, row, _ in sheet.rows] == ["truth", "own decoder"] and sheet.metric == "latent"
    assert view.message.value == "jepa has no &lt;state&gt; decoder yet."
    view.change(models=("jepa",))
    assert view.image.value == picture_bytes(view.render(view.state))


@pytest.mark.parametrize("without", [dict(models={}), dict(data=None)])
def test_a_run_with_nothing_to_roll_out_says_why(rooms, without):
    view = RolloutExplorer(replace(rooms, notes=["It is not trained."], **without))
    assert "has nothing to roll out. It is not trained." in view.message.value and view.image.value == b""


def test_no_model_chosen_is_a_sentence(explorer):
    before = explorer.image.value
    explorer.change(models=())
    assert "press the button" in explorer.message.value and explorer.image.value == before


def test_another_run_has_other_models_and_nothing_is_kept(explorer, rooms, calls):
    before = explorer.image.value
    explorer.opened = replace(rooms, models={"jepa": rooms.models["jepa"]})
    with explorer.hold(): explorer.use(explorer.opened)
    assert explorer.state["models"] == ("jepa",) and calls == ["jepa"] and explorer.image.value != before


def test_buttons_choose_several():
    control = Several("models")
    control.offer(("a", "b", "c"))
    assert control.value == ("a", "b", "c")
    control.buttons["b"].value = False
    assert control.value == ("a", "c")
    control.value = ("b",)
    assert [button.value for button in control.buttons.values()] == [False, True, False]
    control.offer(("b", "d"))
    assert control.value == ("b",)
    control.offer(("d",))
    assert control.value == ("d",)


def test_nothing_is_written_where_the_run_is(rooms, explorer):
    before = sorted(path for path in rooms.folder.path.rglob("*"))
    for actions in counterfactuals.ACTIONS: explorer.change(actions=actions, start=1)
    assert sorted(path for path in rooms.folder.path.rglob("*")) == before
