"What is measured of a run: tidy rows, models beside baselines and references, horizons that can be reached."
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from run_tools import SMALL, Page, counted_fits, dataset_of, go, inside, refused, results, run_in, small

from worldmodels_nb.eval.results import COLUMNS
from worldmodels_nb.runs.evaluation import untrained_part
from worldmodels_nb.runs.facts import IDENTITY
from worldmodels_nb.runs.report import write_report
from worldmodels_nb.runs.training import ensure_data

HORIZONS = {1, 2, 4, 8, 16}
MEASURED = ("probe", "rollout", "reward")  # protocols whose figures have intervals


# ---------------------------------------------------------------- the table

def test_the_comparison_is_tidy(smoke, comparison):
    written = "run,env,model,head,kind,protocol,metric,unit,horizon,seed,value,low,high,n"
    first = (smoke.folder.path / "comparison.csv").read_text().splitlines()[0]
    assert first == written == ",".join(COLUMNS)
    keys = [tuple(row[column] for column in ("env", *IDENTITY, "seed")) for row in comparison]
    assert len(set(keys)) == len(keys) > 50
    assert {row["run"] for row in comparison} == {"first"}
    assert {row["env"] for row in comparison} == {"worldmodels_nb/TwoRooms-v0"}
    assert {row["seed"] for row in comparison} == {"0"}
    assert {row["kind"] for row in comparison} == {"model", "baseline", "reference"}
    assert {row["protocol"] for row in comparison} == {"probe", "rollout", "reward", "collapse", "cost"}
    assert all(int(row["n"]) >= 1 and math.isfinite(float(row["value"])) for row in comparison)
    metrics = {row["metric"] for rows in results(smoke.folder.path).values() for row in rows}
    assert {row["metric"] for row in comparison} == metrics | {"seconds"}


def whose(rows):
    return {(row["kind"], row["model"], row["head"]) for row in rows}


@pytest.mark.parametrize("model", ["encdec", "encdec_jepa", "jepa"])
def test_a_model_has_its_baselines_references_and_horizons(model, comparison):
    beside = {(kind, model, head) for kind, head in (
        ("model", ""), ("baseline", "persistence"), ("baseline", "shuffled_actions"),
        ("baseline", "untrained"), ("reference", "probe"), ("reference", "decoder"))}
    assert beside <= whose(comparison)
    own = [row for row in comparison if (row["model"], row["kind"], row["head"]) == (model, "model", "")]
    rolled = [row for row in own if row["protocol"] == "rollout"]
    metrics = {"latent"} | {f"{kind}{ratio}" for kind in ("position", "mlp_position", "pixel")
                            for ratio in ("", "_ratio")}
    assert {row["metric"] for row in rolled} == metrics
    for metric in metrics:
        assert {int(row["horizon"]) for row in rolled if row["metric"] == metric} == HORIZONS
    assert {row["metric"] for row in own if row["protocol"] == "probe"} == {
        f"{kind}r2 {what}" for kind in ("", "mlp ") for what in ("agent x", "agent y", "position")}


@pytest.mark.parametrize("metric", ["position", "mlp_position", "pixel"])
def test_a_ratio_is_over_the_best_baseline_that_all_models_share(metric, comparison):
    rolled = [row for row in comparison if row["protocol"] == "rollout"]
    for ratio in [row for row in rolled if row["metric"] == f"{metric}_ratio"]:
        here = [row for row in rolled if (row["metric"], row["horizon"]) == (metric, ratio["horizon"])]
        free = [float(row["value"]) for row in here if row["kind"] == "baseline" and not row["model"]]
        own, = [float(row["value"]) for row in here if (row["model"], row["head"]) == (ratio["model"], "")]
        assert len(free) == 2 and float(ratio["value"]) == pytest.approx(own / min(free))


def test_every_horizon_says_what_it_has_seen(smoke, comparison):
    seen, s = [row for row in comparison if row["head"] == "data"], smoke.settings
    data, h = ensure_data(smoke), s.evaluation.history
    lengths = data.dataset.lengths[data.validation]
    for row in [row for row in seen if (row["protocol"], row["metric"]) == ("rollout", "windows")]:
        fit = np.maximum(lengths - (h - 1 + int(row["horizon"])) + 1, 0)
        assert float(row["value"]) == pytest.approx(fit.sum() / lengths.sum())
        assert int(row["n"]) == min(fit.sum(), s.evaluation.n_windows)
    ended = [row for row in seen if (row["protocol"], row["metric"]) == ("rollout", "ended")]
    assert {int(row["horizon"]) for row in ended} == HORIZONS
    assert {float(row["value"]) for row in ended} == {0}, "Two Rooms never ends"


def test_errors_are_kept_window_by_window_and_windows_are_the_same_for_all(smoke, comparison):
    kept = {model: np.load(smoke.folder.part(model, "evaluation.npz")) for model in smoke.settings.run.models}
    for row in comparison:
        if (row["protocol"], row["kind"], row["head"]) != ("rollout", "model", ""): continue
        if row["metric"].endswith("_ratio"): continue
        errors = kept[row["model"]][f"error_{row['metric']}_{row['horizon']}"]
        assert errors.dtype == np.float32 and len(errors) == int(row["n"])
        assert errors.mean() == pytest.approx(float(row["value"]), rel=1e-4)
    for name in [f"{what}_{h}" for what in ("window", "episode") for h in HORIZONS]:
        first, *others = (arrays[name] for arrays in kept.values())
        assert first.dtype == np.int64 and all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("model", ["encdec", "encdec_jepa", "jepa"])
@pytest.mark.parametrize("head", ["reward_mlp", "reward_mlp_no_action", "larp"])
def test_a_reward_head_has_its_errors_at_every_horizon(model, head, comparison):
    paid = [row for row in comparison if (row["model"], row["head"]) == (model, head)]
    more = {"mse_vs_mlp"} if head != "reward_mlp" else set()
    assert {row["metric"] for row in paid} == {"mse", "mse_ratio"} | more
    assert {row["kind"] for row in paid} == {"model"} and {row["protocol"] for row in paid} == {"reward"}
    assert {int(row["horizon"]) for row in paid} == HORIZONS


def test_what_all_models_share_stands_once_and_costs_nothing(comparison):
    shared = {(kind, "", head) for kind, head in (
        ("baseline", "persistence"), ("baseline", "mean_position"), ("baseline", "mean_frame"),
        ("baseline", "raw_pixels"), ("baseline", "mean_reward"), ("baseline", "last_reward"),
        ("reference", "data"), ("reference", "oracle"), ("reference", "oracle_ahead"))}
    assert shared <= whose(comparison)
    assert {row["kind"] for row in comparison if not row["model"]} == {"baseline", "reference"}
    assert not [row for row in comparison if row["kind"] != "model" and row["protocol"] == "cost"]


def test_figures_say_their_units(comparison):
    units = {(row["protocol"], row["metric"]): row["unit"] for row in comparison}
    assert units["rollout", "position"] == "px" and units["reward", "mse"] == "reward²"
    assert units["rollout", "latent"] == units["rollout", "pixel"] == units["reward", "mse_ratio"] == ""
    assert units["cost", "steps"] == "steps" and units["cost", "frames_seen"] == "frames"
    assert units["cost", "seconds"] == "s"
    assert units["cost", "parameters regularizer"] == units["cost", "parameters encoder"] == "parameters"


def test_intervals_hold_their_values(comparison):
    given = [row for row in comparison if row["low"] or row["high"]]
    assert {row["protocol"] for row in given} == set(MEASURED) and len(given) > 40
    outside = [row for row in given if not float(row["low"]) <= float(row["value"]) <= float(row["high"])]
    assert outside == []
    measured = [row for row in comparison if row["protocol"] in MEASURED and row["head"] != "data"]
    assert [row for row in measured if not (row["low"] and row["high"])] == []


def untrained_rows(folder):
    rows = results(folder)["jepa"]
    return [row for row in rows if (row["head"], row["metric"]) == ("untrained", "r2 position")]


def test_loaded_weights_are_compared_with_an_encoder_that_has_none(trained, tmp_path):
    changes = {"jepa.load": str(trained.folder.path), "jepa.train_loaded": False}
    own, loaded = (untrained_rows(run_in(tmp_path, more, run=run))
                   for run, more in (("own", {}), ("loaded", changes)))
    assert len(own) == 1 and own == loaded


@pytest.mark.parametrize("released", [["theirs.pt", ""], ["", "theirs.pt"]])
def test_released_weights_leave_no_untrained_encoder_and_a_note_says_so(released):
    stages = [SimpleNamespace(released=source) for source in released]
    rows, notes = untrained_part(None, None, SimpleNamespace(registered="vjepa2", stages=lambda: stages))
    assert rows == []
    assert notes == ["No untrained encoder of vjepa2 to compare with: it began as theirs.pt."]


# ---------------------------------------------------------------- what can be evaluated

@pytest.mark.parametrize("changes, words", [
    ({"evaluation.horizons": [8, 16]}, ["evaluation.horizons", "[8, 16]", "6 steps", "collect.steps"]),
    ({"evaluation.history": 7}, ["evaluation.horizons", "[1, 2]", "evaluation.history = 7", "collect.steps"]),
    ({"evaluation.horizons": [0, 2]}, ["evaluation.horizons"]),
    ({"collect.episodes": 2}, ["collect.episodes"])])
def test_what_cannot_be_evaluated_is_refused_before_it_is_trained(changes, words, tmp_path, monkeypatch):
    fits = counted_fits(monkeypatch)
    with refused(ValueError, *words): run_in(tmp_path, changes)
    assert fits == [], "an hour of training for a run that could not be evaluated"


def rolled_horizons(folder):
    return {row["horizon"] for row in results(folder)["jepa"] if row["protocol"] == "rollout"}


def test_horizons_beyond_every_episode_are_left_out_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="evaluation.horizons"):
        folder = run_in(tmp_path, {"evaluation.horizons": [1, 4, 5], "evaluation.history": 3})
    assert rolled_horizons(folder) == {1, 4}


class Lengths(gym.Env):
    "Episodes of given lengths, one after the other, in which a grey picture brightens."
    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)

    def __init__(self, lengths, render_mode=None):
        self.lengths, self.episode, self.render_mode = lengths, -1, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t, self.shade = self.episode + 1, 0, self.np_random.integers(100)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        ended = self.t == self.lengths[self.episode % len(self.lengths)]
        return np.zeros(1, np.float32), 1., ended, False, {}

    def render(self): return np.full((32, 32, 3), self.shade + 10 * self.t, np.uint8)


@pytest.fixture
def lengths_env():
    gym.register("Lengths-v0", Lengths, disable_env_checker=True)
    yield "Lengths-v0"
    gym.registry.pop("Lengths-v0")


@pytest.mark.filterwarnings("ignore:no reward heads")  # each step earns the same
def test_a_horizon_that_only_one_validation_episode_reaches_is_left_out(lengths_env, tmp_path):
    "An interval over episodes needs two of them."
    order = np.random.default_rng(0).permutation(8)  # as `Dataset.split` draws them: validation comes first
    lengths = [6 if i == order[0] else 3 for i in range(8)]
    changes = {"env.id": lengths_env, "env.kwargs": {"lengths": lengths}, "evaluation.horizons": [1, 5],
               "evaluation.history": 2}
    with pytest.warns(UserWarning, match="evaluation.horizons"):
        session = go("mine", small(tmp_path, changes))
    data = ensure_data(session)
    assert sorted(data.dataset.lengths[data.validation]) == [3, 3, 6]
    assert rolled_horizons(session.folder.path) == {1}


@pytest.mark.filterwarnings("ignore:no reward heads")  # each step earns the same
def test_positions_of_different_units_are_never_mixed(tmp_path):
    "Metres and radians have no common distance: each counts in standard deviations, and the metric says so."
    rows = results(run_in(tmp_path, {"env.id": "CartPole-v1"}))["jepa"]
    metrics = {row["metric"] for row in rows}
    assert {"position_std", "position_std_ratio"} <= metrics and "position" not in metrics
    assert {row["unit"] for row in rows if row["metric"] == "position_std"} == {"std"}


# ---------------------------------------------------------------- other environments

CARTPOLE = {"cart position", "cart velocity", "pole angle", "pole velocity"}
PENDULUM = {"cos θ", "sin θ", "angular velocity"}
SHORT = {key: value for key, value in SMALL.items() if key.startswith(("train.", "evaluation.probe", "env."))}


@pytest.mark.filterwarnings("ignore:no reward heads")  # each step earns the same
@pytest.mark.parametrize("id, kind, names", [
    ("CartPole-v1", "discrete", CARTPOLE), ("Pendulum-v1", "continuous", PENDULUM)])
def test_another_environment(id, kind, names, tmp_path):
    changes = {"env.id": id, "collect.episodes": 12, "model.frame_stack": 2, "evaluation.horizons": [1, 4]}
    session = go("mine", inside(tmp_path, SHORT | changes))
    spec, found = dataset_of(session).spec, results(session.folder.path)
    assert spec.action.kind == kind and set(spec.state_names) == names
    for model in ("encdec", "jepa"): check_rows(found[model], kind, names)
    text = Page(write_report(session.folder.path).read_text()).text
    assert id in text and not [name for name in names if name not in text]


def check_rows(rows, kind, names):
    "Probes of every number of the state, both horizons, and the instruments that suit the actions."
    probed = [row["metric"] for row in rows if row["protocol"] == "probe"]
    assert {metric.removeprefix("mlp ").removeprefix("r2 ") for metric in probed} == names | {"position"}
    assert {row["horizon"] for row in rows if row["protocol"] == "rollout"} == {1, 4}
    assert all(math.isfinite(row["value"]) for row in rows)
    score = "inverse_accuracy" if kind == "discrete" else "inverse_r2"
    assert {score, "inverse_baseline"} <= {row["metric"] for row in rows}
