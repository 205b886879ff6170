"A grid file becomes runs with names of their own, or one error with all that is wrong with it."
import pytest
import yaml
from run_tools import SMALL, refused

from worldmodels_nb.runs.grid import GridError, alike_stages, expand_axes, read_grid, settings_hash
from worldmodels_nb.settings import load_settings

SEEDS = dict(name="g", preset="smoke", fixed={"run.models": ["jepa"]}, axes={"run.seed": [0, 1]})


def faults(given):
    "What is wrong with a grid."
    with pytest.raises(GridError) as caught: read_grid(given)
    assert "\n" not in str(caught.value)
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def only(given, *words):
    "The one fault of a grid, with these words in it."
    (fault,) = faults(given)
    assert all(word in fault for word in words), fault


def test_axes_are_crossed_zipped_ones_go_together_and_some_are_left_out():
    given = dict(axes=dict(a=[1, 2], b=[3]), zipped=[dict(c=[5, 6], d=[7, 8])], exclude=[dict(a=2, d=8)])
    assert [tuple(cell.values()) for cell in expand_axes(given)] == [(1, 3, 5, 7), (1, 3, 6, 8), (2, 3, 5, 7)]
    assert expand_axes({}) == [{}]


def test_a_cell_is_resolved(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(SEEDS))
    grid = read_grid(path)
    assert grid.name == "g" and grid.axes == ["run.seed"] and read_grid(grid) is grid
    assert [cell.settings.run.seed for cell in grid.cells] == [0, 1]
    settings = load_settings(preset="smoke", overrides=grid.cells[1].overrides)
    assert settings == grid.cells[1].settings and grid.cells[1].run == f"g-seed1-{settings_hash(settings)}"


def test_a_preset_may_be_an_axis():
    given = dict(name="g", fixed={"run.models": ["jepa"]}, axes=dict(preset=["smoke", "demo"]))
    cells = read_grid(given).cells
    assert [cell.preset for cell in cells] == ["smoke", "demo"]
    assert cells[1].settings.train.steps == load_settings(preset="demo").train.steps
    assert all("preset" not in cell.overrides for cell in cells)


def test_axes_that_go_together_may_repeat_a_value_but_not_a_run():
    zipped = [{"preset": ["smoke", "smoke", "demo"], "loss.jepa": [1.0, 0.0, 1.0]}]
    given = dict(name="g", fixed={"run.models": ["jepa"]}, zipped=zipped)
    assert [cell.preset for cell in read_grid(given).cells] == ["smoke", "smoke", "demo"]
    with pytest.raises(GridError, match="duplicate run"):
        read_grid(given | dict(zipped=[{"preset": ["smoke", "smoke"], "loss.jepa": [1.0, 1.0]}]))


def test_a_name_is_that_of_the_experiment_and_of_nothing_else():
    names = {cell.run for cell in read_grid(SEEDS).cells}
    more = SEEDS | dict(fixed=SEEDS["fixed"] | {"run.dir": "elsewhere", "data.dir": "there"},
                        axes={"run.seed": [2, 1, 0]})
    assert names < {cell.run for cell in read_grid(more).cells}
    other = SEEDS | dict(fixed=SEEDS["fixed"] | {"train.steps": 7})
    assert not names & {cell.run for cell in read_grid(other).cells}


def test_all_faults_at_once():
    given = dict(name="g", preset="smok", fixed={"train.step": 10, "train.batch_size": 8},
                 axes={"run.seed": [0, "a"], "model.encoder": ["cn", "vit"]})
    found = faults(given)
    assert len(found) == 4
    for words in (("smok", "'smoke'"), ("train.step",), ("run.seed", "'a'"), ("model.encoder", "'cn'")):
        assert any(all(word in fault for word in words) for fault in found), words


def test_what_does_not_fit_together_names_its_cells():
    only(SEEDS | dict(axes={"run.seed": [0, 1], "env.size": [50, 64]}), "env.size = 50 is not divisible",
         "run.seed = 0", "and 1 more")
    only(SEEDS | dict(fixed=SMALL | {"run.models": ["jepa"], "train.window_steps": 99}), "no window fits")
    only(SEEDS | dict(axes={"env.id": ["CartPole-v1", "Foo-v0"]}), "Foo-v0")


@pytest.mark.parametrize("change, words", [
    (dict(axes={"run.seed": []}), ["'run.seed' is empty"]),
    (dict(axes={"run.seed": 3}), ["must be a list"]),
    (dict(axes={"run.seed": [1, 1]}), ["a value twice"]),
    (dict(axes={3: [1]}), ["3 is no setting"]),
    (dict(axis={}), ["unknown key 'axis'", "'axes'"]),
    (dict(fixed=[]), ["fixed must be a dict"]),
    (dict(name="a/b"), ["'a/b' is no name"]),
    (dict(name=7), ["7 is no name"]),
    (dict(name="x" * 99), ["60 letters"]),
    (dict(zipped=[{"env.size": [32], "model.latent_dim": [8, 16]}]), ["equal lengths"]),
    (dict(zipped=[3]), ["mapping"]),
    (dict(fixed={"run.seed": 3}), ["'run.seed' stands in two places"]),
    (dict(axes={"preset": ["demo"]}), ["'preset' stands in two places"]),
    (dict(exclude=[{"env.size": 3}]), ["no axis"]),
    (dict(exclude=[3]), ["exclude takes mappings"]),
    (dict(exclude=[{"run.seed": 7}]), ["fits no run"]),
    (dict(exclude=[{"run.seed": 0}, {"run.seed": 1}]), ["every run is excluded"]),
    (dict(axes={"run.threads": [1, 2]}), ["duplicate run"]),
    (dict(axes={"run.seed": list(range(200)), "train.steps": list(range(1, 200))}), ["10,000 are the most"]),
])
def test_a_fault_is_one_sentence(change, words): only(SEEDS | change, *words)


@pytest.mark.parametrize("text, words", [
    ("name: g\nname: h", ["'name' stands there twice"]),
    ("name: [g", ["no YAML in line"]),
    ("- 1", ["a grid is a mapping"]),
    ("", ["a grid is a mapping"]),
    ("!!python/object/apply:os.system [ls]", ["no YAML"]),
    ("name: g\nfixed: {train.learning_rate: 1e-3}", ["train.learning_rate", "0.001"]),
])
def test_a_file_that_is_no_grid(tmp_path, text, words):
    (tmp_path / "grid.yaml").write_text(text)
    with refused(GridError, "grid.yaml", *words): read_grid(tmp_path / "grid.yaml")


def test_a_file_that_is_not_there(tmp_path):
    with refused(GridError, "nowhere.yaml", "cannot be read"): read_grid(tmp_path / "nowhere.yaml")


def test_the_example_is_a_grid():
    assert len(read_grid("data/grids/first.yaml").cells) == 4


def shared(fixed=None, axes=None):
    "How many runs train the first stage of each run as it does."
    fixed = {"run.models": ["vjepa2"]} | (fixed or {})
    fixed = {key: value for key, value in fixed.items() if key not in axes}
    grid = read_grid(dict(name="g", preset="smoke", fixed=fixed, axes=axes))
    return [len(found.get(("vjepa2", "pretrain"), [])) for found in alike_stages(grid.cells).values()]


@pytest.mark.parametrize("axes, n", [
    ({"vjepa2.action.dim": [24, 48]}, 2), ({"evaluation.n_windows": [8, 9]}, 2),
    ({"train.larp.hidden": [[8], [9]]}, 2), ({"run.models": [["vjepa2"], ["jepa", "vjepa2"]]}, 2),
    ({"vjepa2.pretrain.ratio": [.5, .6]}, 0), ({"run.seed": [0, 1]}, 0), ({"train.batch_size": [7, 8]}, 0),
    ({"env.size": [32, 64]}, 0),
])
def test_a_stage_is_shared_by_runs_that_differ_in_what_comes_later(axes, n):
    assert shared(axes=axes) == [n, n]


def test_seeds_share_with_their_own_and_a_model_of_one_stage_shares_nothing():
    assert shared(axes={"run.seed": [0, 1], "vjepa2.action.dim": [24, 48]}) == [2] * 4
    assert shared({"run.models": ["jepa"]}, {"train.steps": [7, 8]}) == [0, 0]
