"Steering: models follow a real environment under the same actions; keys, real time, recording."
import asyncio
import math
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image
from run_tools import SMALL, go, inside, one_thread, refused

from worldmodels_nb.data.datasets import Windows
from worldmodels_nb.data.envs import FrameEnv
from worldmodels_nb.data.tworooms import ActionSpec
from worldmodels_nb.runs.reopen import open_run
from worldmodels_nb.widgets import drive as drives
from worldmodels_nb.widgets import steer as steering
from worldmodels_nb.widgets.drive import Drive, SteerError, draw_scene, gif_bytes, mp4_bytes
from worldmodels_nb.widgets.steer import Steer, _Keys

RIGHT = np.array([1, 0], np.float32)


@pytest.fixture(scope="module", autouse=True)
def single():
    with one_thread(): yield


@pytest.fixture(scope="module")
def opened():
    "The sample's run: continuous actions, an episode that never ends."
    return open_run("sample")


@pytest.fixture(scope="module")
def pole(tmp_path_factory):
    "A run of CartPole, discrete and soon over; two frames in a stack."
    changes = SMALL | {"env.id": "CartPole-v1", "collect.policy": "random", "model.frame_stack": 2,
                       "collect.steps": 12}
    settings = inside(tmp_path_factory.mktemp("pole"), changes, models=["jepa", "encdec"])
    with warnings.catch_warnings(action="ignore"):  # every step earns 1: no reward heads
        return open_run(go("pole", settings, ("data", "train", "heads")).folder.path)


@pytest.fixture
def drive(opened):
    drive = Drive(opened)
    drive.reset(3)
    yield drive
    drive.close()


@pytest.fixture
def steer(opened):
    view = Steer(opened, seed=3)
    yield view
    view.close()


def some_actions(n): return np.random.default_rng(0).uniform(-1, 1, (n, 2)).astype(np.float32)


def step_by_step(world, z, actions):
    "Latents (1, 1 + H, N, D): each from those before it, as many as the model looks at."
    L = world.context_length
    for k in range(actions.shape[1]):
        seen = z[:, -L:]
        past = actions[:, k - seen.shape[1] + 1:k]
        z = torch.cat([z, world.rollout(seen, past, actions[:, k:k + 1])], 1)
    return z


@torch.no_grad()
def test_every_model_rolls_out_from_the_first_frame_under_the_actions_of_the_environment(opened, drive):
    actions, env = some_actions(7), FrameEnv(opened.settings.env)
    frames = [env.reset(3)[0]]
    scenes = [drive.act(action) for action in actions]
    for action, scene in zip(actions, scenes):
        frames.append(env.step(action)[0])
        assert np.array_equal(scene.frame, frames[-1])
    true = torch.from_numpy(np.stack(frames))[None]
    for name, world in opened.models.items():
        rolled = step_by_step(world, world.encode(true[:, :1]), torch.from_numpy(actions)[None])
        assert torch.allclose(drive.models[name].z[:, -1], rolled[:, -1], atol=1e-4), name
        decoded = (255 * opened.decoders[name](rolled)[0, -1]).round().byte().numpy()
        assert np.abs(scenes[-1].imagined[name].astype(int) - decoded).max() <= 1
        off = (rolled[0, -1] - world.encode(true[:, -1:])[0, -1]).norm().item()
        divergence = scenes[-1].divergence[name][-1]
        assert math.isclose(divergence * drive.models[name].spread.item(), off, rel_tol=1e-3)


@torch.no_grad()
def test_the_expected_reward_is_that_of_the_head_which_looks_ahead(opened, drive):
    before = {name: model.z[:, -1:] for name, model in drive.models.items()}
    scene = drive.act(RIGHT)
    action = torch.from_numpy(RIGHT)[None, None]
    for name, model in drive.models.items():
        path = torch.cat([before[name], model.z[:, -1:]], 1)
        assert math.isclose(scene.predicted[name][-1], opened.heads[name]["larp"](path, action).item(),
                            rel_tol=1e-4)
    assert math.isnan(scene.predicted[name][0]) and len(scene.reward) == len(scene.predicted[name]) == 2


def test_synchronised_the_models_are_where_the_world_is(drive):
    for action in some_actions(9): scene = drive.act(action)
    assert all(past[-1] > 0 for past in scene.divergence.values())
    synced = drive.resync()
    assert all(past[-1] < 1e-3 for past in synced.divergence.values())
    assert all(past[:-1] == scene.divergence[name][:-1] for name, past in synced.divergence.items())
    assert synced.synced == (0, 9) and synced.step == 9 and synced.reward == scene.reward


def test_latents_are_encoded_with_as_much_history_as_each_model_looks_at(drive):
    for steps in range(1, 7):
        drive.act(RIGHT)
        drive.resync()
        for model in drive.models.values():
            known = min(model.world.context_length, steps + 1)
            assert model.z.shape[1] == known and model.past.shape[1] == known - 1
            assert (model.past == torch.from_numpy(RIGHT)).all()


def test_stacks_are_those_of_the_dataset(pole):
    drive, data = Drive(pole), pole.data.dataset
    episode = int(np.argmax(data.lengths))
    window = Windows(data, [episode], 3, frame_stack=2).batch(np.array([0]))
    drive.reset(0)
    first = data.starts[episode]
    drive.frames.clear()
    for row in range(4):
        drive.frames.append(data.frames[first + row])
        if row == 1: assert torch.equal(drive._frames(2), window.frames[:, :3])
    assert torch.equal(drive._frames(2), window.frames[:, -3:])
    drive.close()


def test_curves_look_back_so_many_steps_and_no_further(drive, monkeypatch):
    monkeypatch.setattr(drives, "LOOK_BACK", 5)
    for _ in range(8): scene = drive.act(RIGHT)
    lengths = {len(past) for past in (scene.reward, *scene.divergence.values(), *scene.predicted.values())}
    assert lengths == {5} and draw_scene(scene).dtype == np.uint8


@pytest.mark.parametrize("action", [1, [1.0], [1.0, math.nan], [[1.0, 0.0]], "left"])
def test_a_wrong_action_is_refused_and_changes_nothing(drive, action):
    before = drive.scene
    with refused(ValueError, "is no action of" if action != "left" else "left"): drive.act(action)
    assert drive.scene is before


def test_a_scene_is_drawn_whatever_has_become_of_the_models(drive):
    scene = drive.act(RIGHT)
    shape = draw_scene(scene).shape
    lost = dict.fromkeys(scene.divergence, (0.0, math.inf))
    unknown = dict.fromkeys(lost, (math.nan, math.nan))
    assert draw_scene(replace(scene, divergence=lost, predicted=unknown)).shape == shape
    for n in (1, 2, 3):
        some = {name: scene.imagined[name] for name in list(scene.imagined)[:n]}
        assert draw_scene(replace(scene, imagined=some)).shape[0] > 384


def test_a_run_without_decoders_is_refused(opened):
    with refused(SteerError, "no model with a decoder", "choose another run"):
        Drive(replace(opened, decoders={}))


def test_a_model_without_reward_heads_expects_nothing(opened):
    drive = Drive(replace(opened, heads={}))
    drive.reset(0)
    assert all(math.isnan(past[-1]) for past in drive.act(RIGHT).predicted.values())
    drive.close()


# -- keys


def test_a_picture_depends_on_its_state_alone(opened, depends_on_its_state_alone):
    depends_on_its_state_alone(lambda: Steer(opened, seed=3))


@pytest.mark.parametrize("key, number, value", [
    ("ArrowLeft", 0, -1), ("ArrowRight", 0, 1), ("ArrowUp", 1, -1), ("ArrowDown", 1, 1)])
def test_an_arrow_is_a_unit_vector_of_the_real_action(opened, steer, key, number, value):
    assert key in steer.image.hotkeys
    picture = steer.image.value
    with_key = FrameEnv(opened.settings.env)
    with_key.reset(3)
    action = np.zeros(2, np.float32)
    action[number] = value
    steer.key_pressed(key)
    steer.key_pressed(key, down=False)
    assert np.array_equal(steer.scene.frame, with_key.step(action)[0])
    assert steer.scene.step == 1 and steer.image.value != picture and "step 1" in steer.image.alt


def test_two_arrows_are_one_vector_and_other_keys_are_nothing(steer):
    keys = steer.keys
    assert np.allclose(keys.action(["ArrowLeft", "ArrowUp"], (0, 1)), -math.sqrt(.5))
    assert np.allclose(keys.action(["ArrowLeft", "ArrowRight"], (0, 1)), 0)
    assert np.allclose(keys.action(["ArrowRight"], (1, 0)), [0, 1])
    steer.key_pressed("x")
    assert steer.scene.step == 0


def environment(kind, n, meanings=None, **bounds):
    names = {"get_action_meanings": lambda: meanings} if meanings else {}
    inner = SimpleNamespace(unwrapped=SimpleNamespace(**names))
    return SimpleNamespace(env=inner, action=ActionSpec(kind, n, **bounds), _ask=lambda call: call())


def test_arrows_are_the_actions_that_an_environment_calls_so():
    keys = _Keys(environment("discrete", 5, ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE"]))
    assert keys.arrows == dict(ArrowLeft=3, ArrowRight=2) and keys.action([], ()) == 0
    assert keys.action(["ArrowLeft", "4"], ()) == 4 and keys.known() == ["ArrowLeft", "ArrowRight", *"01234"]
    assert "← is LEFT" in keys.rule(()) and "it is NOOP" in keys.rule(())
    assert [label for label, _, _ in keys.choices(())][1] == "FIRE"


@pytest.mark.parametrize("n, arrows, still", [
    (2, dict(ArrowLeft=0, ArrowRight=1), None), (3, dict(ArrowLeft=0, ArrowRight=2), 1),
    (18, dict(ArrowLeft=0, ArrowRight=1, ArrowUp=2, ArrowDown=3), None)])
def test_arrows_without_names_follow_the_rule(n, arrows, still):
    keys = _Keys(environment("discrete", n))
    assert keys.arrows == arrows and keys.action([], ()) == still
    assert len(keys.choices(())) == n and len(keys.known()) == len(arrows) + min(n, 10)


def test_one_number_has_two_arrows_and_bounds_are_kept():
    keys = _Keys(environment("continuous", 1, low=[-2.0], high=[4.0]))
    assert keys.known() == ["ArrowLeft", "ArrowRight"] and keys.pairs() == [("the one number", (0,))]
    pressed = ["ArrowLeft"], [], ["ArrowRight"]
    assert [keys.action(each, (0,)).item() for each in pressed] == [-2, 0, 4]
    assert keys.rule((0,)).count("more") == 1


def test_of_many_numbers_a_list_chooses_two():
    keys = _Keys(environment("continuous", 3, low=[-1.0, 0.0, -1.0], high=[1.0, 1.0, 1.0]))
    assert len(keys.pairs()) == 6 and ("2 (← →) and 0 (↑ ↓)", (2, 0)) in keys.pairs()
    assert keys.action(["ArrowDown"], (2, 0)).tolist() == [1, 0, 0]
    assert keys.action(["ArrowUp"], (0, 1)).tolist() == [0, 0, 0]         # there is nothing below 0


def test_buttons_act_and_are_named_for_those_who_cannot_see(steer):
    button = steer.pad.children[3]
    assert [child.description for child in steer.pad.children] == ["←", "→", "↑", "↓", "still"]
    button.click()
    assert steer.scene.step == 1 and button.tooltip == "as the key ArrowDown"
    small = ipywidgets.Button, ipywidgets.ToggleButton
    assert all(child.tooltip for child in steer.bar.children if isinstance(child, small))
    assert steer.bar.children[0] is steer.pad and not steer.pad.tooltip     # a box with one has no view


def test_what_is_moved_cannot_be_chosen_where_there_is_no_choice(pole, steer):
    assert not steer.controls["axes"].disabled
    view = Steer(pole)
    assert view.controls["axes"].disabled and len(view.pad.children) == 2
    view.close()


# -- episodes and runs


def test_an_episode_that_is_over_is_followed_by_the_next_and_that_is_said(pole):
    view = Steer(pole, seed=5)
    while not view.scene.ended: view.act(1)
    last = view.scene
    assert last.seed == 5 and 5 < last.step < 30 and "the end" in view.image.alt
    after = view.act(0)
    assert (after.seed, after.step) == (6, 1) and view.controls["seed"].value == 6
    said = f"The episode with seed 5 was over after {last.step} steps; this one has seed 6."
    assert said in view.message.value
    with refused(SteerError, "give a whole number from 0 to 1"): view.act(2)
    view.close()


def test_reset_begins_the_same_episode_again(steer):
    first = steer.scene.frame
    steer.act(RIGHT)
    assert np.array_equal(steer.reset().frame, first)
    steer.controls["seed"].value = 4
    assert (steer.scene.seed, steer.scene.step) == (4, 0) and not np.array_equal(steer.scene.frame, first)
    assert np.array_equal(steer.reset(3).frame, first) and steer.controls["seed"].value == 3
    assert steer.reset(1234).seed == steer.controls["seed"].value == 1234


def test_resync_is_said(steer):
    steer.act(RIGHT)
    steer.resync()
    assert "Latents were made from real frames at step 1." in steer.message.value
    assert steer.scene.synced == (0, 1)


def test_only_one_steers_at_a_time_and_the_other_can_be_taken_up_again(opened, steer):
    later = Steer(opened)
    with refused(SteerError, "reset"): steer.act(RIGHT)
    assert steer.drive.env is None and later.drive.env is not None
    steer.reset()
    assert steer.act(RIGHT).step == 1
    later.close()


def test_another_run_has_other_keys(pole, steer):
    with steer.hold(): steer.use(pole)
    assert steer.image.hotkeys == ["ArrowLeft", "ArrowRight", "0", "1"] and steer.scene.step == 0
    steer.key_pressed("1")
    steer.key_pressed("1", down=False)
    assert steer.scene.step == 1 and list(steer.scene.imagined) == ["jepa", "encdec"]


def test_a_run_that_cannot_be_steered_changes_nothing(opened, steer):
    before = steer.drive, steer.scene
    with refused(SteerError, "decoder"): steer.use(replace(opened, decoders={}))
    assert (steer.drive, steer.scene) == before and steer.act(RIGHT).step == 1


# -- real time


def page(view, slow=0):
    "A page that shows each picture at once, or after so many turns of the loop."
    def show(change):
        asyncio.get_running_loop().call_later(slow, setattr, view.image, "shown", change["new"])
    view.image.observe(show, "number")
    return lambda: view.image.unobserve(show, "number")


def in_loop(view, script, slow=0):
    "Run a script beside the view's task, and let the task end."
    async def both():
        close = page(view, slow)
        try:
            await script()
            if view.task is not None: await asyncio.wait_for(view.task, 10)
        finally: close()
    asyncio.run(both())


async def until(claim):
    for _ in range(2000):
        if claim(): return
        await asyncio.sleep(.005)
    raise AssertionError("it never came about")


def test_in_real_time_the_world_goes_on_until_it_is_stopped(steer):
    steer.change(rate=30)
    async def script():
        steer.controls["play"].value = True
        assert steer.controls["play"].description == "stop"
        await until(lambda: steer.scene.step >= 3)
        steer.controls["play"].value = False
    in_loop(steer, script)
    steps = steer.scene.step
    assert steer.task.done() and steps >= 3 and steer.controls["play"].description == "play"


def test_no_step_is_taken_before_the_page_has_shown_the_last(steer):
    steer.change(rate=30)
    ahead = []
    steer.image.observe(lambda change: ahead.append(change["new"] - steer.image.shown), "number")
    async def script():
        steer.image.shown = steer.image.number
        steer.controls["play"].value = True
        await until(lambda: steer.scene.step >= 4)
        steer.controls["play"].value = False
    in_loop(steer, script, slow=.05)
    assert max(ahead[1:-1]) <= 2                                          # the step, and the button itself


def test_a_page_that_shows_nothing_ends_it(steer, monkeypatch):
    monkeypatch.setattr(steering, "_PATIENCE", .05)
    async def script():
        steer.controls["play"].value = True
        await steer.task
    asyncio.run(script())
    assert steer.scene.step == 1 and not steer.controls["play"].value
    assert "no page has shown a picture" in steer.message.value


def test_a_key_that_is_held_goes_on_until_it_is_let_go(steer, monkeypatch):
    monkeypatch.setattr(steering, "_REPEAT", .01)
    async def script():
        steer.key_pressed("ArrowDown")
        assert steer.scene.step == 1
        await until(lambda: steer.scene.step >= 4)
        steer.key_pressed("ArrowDown", down=False)
    in_loop(steer, script)
    assert np.array_equal(steer.last, [0, 1])


def test_in_real_time_buttons_go_on_and_short_keys_count(steer):
    taken = []
    real = steer.drive.act
    steer.drive.act = lambda action: taken.append(tuple(map(float, action))) or real(action)
    async def script():
        steer.controls["play"].value = True
        steer.pad.children[1].click()
        await until(lambda: len(taken) >= 2)
        steer.key_pressed("ArrowUp")
        steer.key_pressed("ArrowUp", down=False)                          # shorter than a step
        n = len(taken)
        await until(lambda: len(taken) >= n + 2)
        steer.controls["play"].value = False
    in_loop(steer, script)
    assert taken[:2] == [(1, 0)] * 2 and (0, -1) in taken and taken[-1] == (0, 0)


def test_another_steer_ends_the_task_of_the_one_before(opened, steer):
    async def script():
        steer.controls["play"].value = True
        await until(lambda: steer.scene.step >= 1)
        Steer(opened).close()
    in_loop(steer, script)
    assert steer.task.done() and steer.drive.env is None


def test_without_an_event_loop_real_time_is_a_sentence(steer):
    steer.controls["play"].value = True
    assert "needs an event loop" in steer.message.value and not steer.controls["play"].value


# -- films


def test_a_recorded_gif_opens_and_has_every_picture(steer, tmp_path):
    steer.act(RIGHT)
    steer.change(record=True)
    for action in some_actions(4): steer.act(action)
    path = steer.record(tmp_path / "deep" / "drive.gif")
    with Image.open(path) as film:
        assert film.n_frames == 5 and film.info["loop"] == 0 and film.info["duration"] == 70
        sizes = {draw_scene(steer.scene).shape[1::-1], film.size}
    assert len(sizes) == 1 and "5 pictures are in" in steer.message.value


def test_the_button_saves_under_the_name_of_the_run(opened, tmp_path):
    view = Steer(opened, record_to=tmp_path)
    button = next(child for child in view.bar.children if "wm-gif" in child._dom_classes)
    button.click()
    assert "nothing is recorded yet" in view.message.value and list(tmp_path.iterdir()) == []
    view.change(record=True)
    button.click()
    (film,) = tmp_path.iterdir()
    assert film.name.startswith(f"{view.name}-") and film.suffix == ".gif"
    view.close()


def test_a_recording_has_an_end(steer, monkeypatch):
    monkeypatch.setattr(steering, "_LONGEST", 3)
    steer.change(record=True)
    for action in some_actions(5): steer.act(action)
    assert len(steer.reel) == 3 and not steer.controls["record"].value


def test_films_that_cannot_be_made_are_refused(steer, tmp_path, monkeypatch):
    monkeypatch.setattr(drives.shutil, "which", lambda name: None)
    with refused(SteerError, "nothing is recorded"): gif_bytes([], 10)
    with refused(SteerError, "needs ffmpeg", "save a GIF"): mp4_bytes([steer.image.value], 10)
    with refused(SteerError, "as .gif or .mp4"): steer.record(tmp_path / "drive.avi")
    assert list(tmp_path.iterdir()) == []


def program(folder, *lines):
    "A program in place of ffmpeg, and its path."
    path = folder / "ffmpeg"
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(0o755)
    return str(path)


def test_an_mp4_is_what_ffmpeg_makes_of_the_pictures(steer, tmp_path, monkeypatch):
    copies = program(tmp_path, 'for last; do :; done', 'cat > "$last"')   # writes what it is given
    monkeypatch.setattr(drives.shutil, "which", lambda name: copies)
    assert mp4_bytes([b"one", b"two"], 10) == b"onetwo"
    broken = program(tmp_path, "cat > /dev/null", "echo no such codec >&2", "exit 1")
    monkeypatch.setattr(drives.shutil, "which", lambda name: broken)
    with refused(SteerError, "ffmpeg cannot make the MP4 (no such codec)"): mp4_bytes([b"one"], 10)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
def test_a_real_mp4(steer, tmp_path):
    steer.change(record=True)
    for action in some_actions(4): steer.act(action)
    assert steer.record(tmp_path / "drive.mp4").read_bytes()[4:8] == b"ftyp"
