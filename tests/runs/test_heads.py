"Heads of a run: left out where there is nothing to predict, switched off, learnt from predictions."
import re
import warnings

import numpy as np
from run_tools import Page, counted_fits, go, results, run_in, small, weights_of
from safetensors.numpy import load

from worldmodels_nb.runs.report import write_report


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
