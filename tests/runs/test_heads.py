"Heads of a run: left out where there is nothing to predict, switched off, learnt from predictions."
import re
import warnings

import numpy as np
from run_tools import TWO, Page, counted_fits, dataset_of, go, results, run_in, small, weights_of
from safetensors.numpy import load

from worldmodels_nb.runs.report import write_report
from worldmodels_nb.runs.training import ensure_data
from worldmodels_nb.training.parts import read_result


def test_a_constant_reward_is_said_and_left_out(tmp_path):
    changes = {"env.id": "CartPole-v1", "collect.episodes": 8, "evaluation.horizons": [1, 2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = run_in(tmp_path, changes)
    assert not [row for row in results(folder)["jepa"] if row["protocol"] == "reward"]
    assert not (folder / "oracles").exists()
    text = Page(write_report(folder).read_text()).text
    assert re.search(r"No reward heads: all \d+ training steps of dataset .* earn 1 ", text)


def test_switched_off_heads_are_not_trained(tmp_path, monkeypatch):
    fits = counted_fits(monkeypatch)
    folder = run_in(tmp_path, {"train.larp.enabled": False})
    assert sorted(fits) == ["JEPA", "RewardMLP", "RewardMLP", "RewardMLP", "StateDecoder"]
    paid = [row for row in results(folder)["jepa"] if row["protocol"] == "reward"]
    assert {(row["kind"], row["model"], row["head"]) for row in paid} == {
        ("model", "jepa", "reward_mlp"), ("model", "jepa", "reward_mlp_no_action"),
        ("reference", "", "oracle"), ("baseline", "", "mean_reward"), ("baseline", "", "last_reward")}


def test_the_state_decoder_can_learn_from_predictions(tmp_path):
    predicted = go("mine", small(tmp_path, {"train.state_decoder.latents": "predicted"}))
    plain = go("plain", small(tmp_path))
    a, b = (load(weights_of(session, "jepa", "decoder")) for session in (predicted, plain))
    assert any(not np.array_equal(a[name], b[name]) for name in a)
    assert weights_of(predicted, "jepa") == weights_of(plain, "jepa")


def test_oracles_have_a_recipe_of_their_own_and_learn_from_all_training_episodes(tmp_path):
    session = go("mine", small(tmp_path, {"train.oracle.steps": 6, "train.reward_mlp.episodes": 2}))
    training = ensure_data(session).training
    steps = int(dataset_of(session).lengths[training].sum())
    for name in ("oracle", "oracle_ahead"):
        result = read_result(session.folder.path / "oracles" / name)
        assert (result["steps"], result["recipe"]["training windows"]) == (6, steps)
    few = int(dataset_of(session).lengths[training[:2]].sum())
    for name in ("reward_mlp", "larp"):
        result = read_result(session.folder.part("jepa", name))
        assert (result["steps"], result["recipe"]["training windows"]) == (4, 2 * few - 2)  # at both places


def test_heads_are_of_one_size_behind_latents_of_all_widths_and_oracles_see_states_as_they_are(tmp_path):
    session = go("mine", small(tmp_path, {**TWO, "model.latent_dim": 8}, models=["jepa", "vjepa2"]))
    for name in ("reward_mlp", "reward_mlp_no_action", "larp"):
        sizes = [read_result(session.folder.part(model, name))["trainable_parameters"]
                 for model in ("jepa", "vjepa2")]
        assert sizes[0] == sizes[1]
    axes = load((session.folder.path / "oracles" / "oracle" / "weights.safetensors").read_bytes())["axes"]
    assert axes.shape == (1, 4, 4) and np.count_nonzero(axes[0] - np.diag(np.diag(axes[0]))) == 0
