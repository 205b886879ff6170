"Rows say what they belong to; intervals cover what they should; windows come from many episodes."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldmodels_nb.data.datasets import Windows
from worldmodels_nb.eval.results import (
    COLUMNS,
    MODEL,
    EvaluationError,
    Source,
    as_float64,
    best_baseline,
    bootstrap_difference,
    bootstrap_interval,
    bootstrap_ratio,
    data_rows,
    independent_windows,
    label,
    result_row,
    stamp,
)


def test_intervals_cover_the_known_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    samples = rng.exponential(2., size=(60, 300))                 # 300 experiments of 60 windows each
    mean, low, high = bootstrap_interval(samples, seed=1, resamples=500)
    assert np.allclose(mean, samples.mean(0)) and (low < mean).all() and (mean < high).all()
    assert .88 < ((low < 2) & (2 < high)).mean() < .98


def test_the_bootstrap_equals_drawing_one_by_one():
    values = np.random.default_rng(0).exponential(size=40)
    rng = np.random.default_rng(1)
    means = [values[rng.integers(40, size=40)].mean() for _ in range(4000)]
    _, low, high = bootstrap_interval(values, resamples=4000)
    assert np.allclose([low, high], np.quantile(means, [.025, .975]), atol=.03)


def test_bootstrap_shapes_seeds_and_levels():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 3)))
    whole = bootstrap_interval(values, seed=3)
    assert all(part.shape == (3,) for part in whole) and np.shape(bootstrap_interval(values[:, 0])[1]) == ()
    for k in range(3):
        assert np.allclose([part[k] for part in whole], bootstrap_interval(values[:, k], seed=3))
    assert np.array_equal(whole[1], bootstrap_interval(values, seed=3)[1])
    assert not np.array_equal(whole[1], bootstrap_interval(values, seed=4)[1])
    narrow = bootstrap_interval(values, seed=3, level=.5)
    assert (narrow[1] > whole[1]).all() and (narrow[2] < whole[2]).all()


def test_groups_of_one_are_no_groups_and_copies_add_no_certainty():
    values = np.random.default_rng(0).normal(size=30)
    alone = bootstrap_interval(values, seed=2)
    assert np.allclose(alone, bootstrap_interval(values, seed=2, groups=np.arange(30)))
    copies = bootstrap_interval(np.repeat(values, 7), seed=2, groups=np.repeat(np.arange(30), 7))
    assert np.allclose(alone, copies)
    fooled = bootstrap_interval(np.repeat(values, 7), seed=2)
    assert fooled[2] - fooled[1] < .6 * (alone[2] - alone[1])


def test_clustered_intervals_cover_where_plain_ones_do_not():
    rng = np.random.default_rng(0)
    episode = np.repeat(np.arange(25), 8)
    hits = {True: 0, False: 0}
    for trial in range(100):
        values = rng.normal(size=25)[episode] + .3 * rng.normal(size=200)
        for grouped in hits:
            _, low, high = bootstrap_interval(values, trial, 200, groups=episode if grouped else None)
            hits[grouped] += low < 0 < high
    assert hits[True] >= 85 and hits[False] <= 70


def test_ratios_are_paired():
    bottom = np.random.default_rng(0).exponential(size=(80, 2))
    ratio, low, high = bootstrap_ratio(.25 * bottom, bottom)
    assert np.allclose([ratio, low, high], .25)
    assert np.isnan(bootstrap_ratio(bottom, 0 * bottom)).all()
    noisy = bottom + .1 * np.random.default_rng(1).normal(size=bottom.shape)
    paired = bootstrap_ratio(noisy, bottom)
    torn = bootstrap_ratio(noisy, np.random.default_rng(2).permutation(bottom))
    assert (paired[2] - paired[1] < .5 * (torn[2] - torn[1])).all() and np.allclose(paired[0], torn[0])


def test_too_few_windows_are_refused():
    with pytest.raises(EvaluationError, match="evaluation.n_windows"): bootstrap_interval(np.ones(1))
    for groups, match in ((np.zeros(5), "independent"), (np.zeros(4), "labels")):
        with pytest.raises(EvaluationError, match=match): bootstrap_interval(np.ones(5), groups=groups)


class Cut(Windows):
    "Windows of episodes that need no dataset."
    def __init__(self, counts): self.first = self.begin = np.repeat(np.arange(len(counts)) * 100, counts)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 60), st.integers(0, 3))
def test_windows_come_from_as_many_episodes_as_there_are(counts, n, seed):
    chosen, episodes = independent_windows(Cut(counts), n, seed)
    total = min(n, sum(counts))
    assert len(chosen) == len(set(chosen.tolist())) == total
    assert np.array_equal(Cut(counts).first[chosen], episodes)
    assert len(set(episodes[:len(counts)].tolist())) == min(total, len(counts))
    taken = {e: (episodes == e).sum() for e in np.arange(len(counts)) * 100}
    full = {e: counts[e // 100] for e in taken}
    most = max(taken.values())
    assert all(t >= min(most - 1, full[e]) for e, t in taken.items())
    assert np.array_equal(chosen, independent_windows(Cut(counts), n, seed)[0])


def test_a_row_without_an_interval_says_so():
    row = result_row("planning", "success", .5, source=Source("baseline", "random", False))
    assert math.isnan(row["low"]) and math.isnan(row["high"]) and row["n"] == 1


def test_stamped_rows_have_all_columns_in_order_and_plain_numbers():
    interval = np.float32(2), np.float64(1), torch.tensor(3.)
    row = result_row("rollout", "position", *interval, np.int64(9), np.int64(4), "jepa", unit="px")
    stamped, = stamp([row], "demo", "Toy-v0", np.int64(5))
    assert tuple(stamped) == COLUMNS and "run" not in row
    assert list(stamped.values()) == ["demo", "Toy-v0", "jepa", "", "model", "rollout", "position", "px",
                                      4, 5, 2., 1., 3., 9]
    assert {type(stamped[name]) for name in ("horizon", "seed", "n")} == {int}
    assert {type(stamped[name]) for name in ("value", "low", "high")} == {float}


@pytest.mark.parametrize("source, model, name", [
    (MODEL, "jepa", "jepa"),
    (Source("model", "larp"), "jepa", "jepa larp"),
    (Source("baseline", "shuffled_actions"), "jepa", "shuffled actions (jepa)"),
    (Source("baseline", "persistence", False), "", "persistence"),
    (Source("reference", "oracle_ahead", False), "", "oracle ahead")])
def test_what_has_no_model_in_it_names_none(source, model, name):
    row = result_row("rollout", "position", 1., model="jepa", source=source)
    assert (row["model"], row["head"], row["kind"]) == (model, source.name, source.kind)
    assert label(row) == name


NUMBERS = {
    "a float": 0.1, "half": torch.tensor([0.5, 2.]).half(), "bytes": torch.tensor([3], dtype=torch.uint8),
    "bfloat": torch.ones(2, dtype=torch.bfloat16), "learnt": torch.ones(2, requires_grad=True) * 3,
}


@pytest.mark.parametrize("values", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_any_kind_are_added_up_in_float64(values):
    found = as_float64(values)
    assert found.dtype == torch.float64 and found.device.type == "cpu" and not found.requires_grad
    assert torch.equal(found, torch.as_tensor(values, dtype=torch.float64).detach())
    if found.numel() < 2: return
    for call in (bootstrap_interval, lambda x: bootstrap_ratio(x, x)): assert np.isfinite(call(values)).all()


# ---------------------------------------------------------------- differences

@pytest.mark.parametrize("shape", [(40,), (40, 3)])
def test_a_difference_is_that_of_the_means_and_tighter_than_either(shape):
    rng = np.random.default_rng(0)
    hard = 3 * rng.exponential(size=shape)                      # what both models share
    one, other = hard + rng.normal(size=shape) * .1 + .2, hard + rng.normal(size=shape) * .1
    found, low, high = bootstrap_difference(torch.from_numpy(one), other)
    assert np.allclose(found, one.mean(0) - other.mean(0)) and np.shape(found) == shape[1:]
    assert (low > .1).all() and (high < .3).all()
    _, alone_low, alone_high = bootstrap_interval(one)
    assert (high - low < (alone_high - alone_low) / 4).all()
    back = bootstrap_difference(other, one)
    assert np.allclose(back[0], -found) and np.allclose(back[1], -high) and np.allclose(back[2], -low)


@pytest.mark.parametrize("each", [1, 8])
def test_differences_know_that_windows_of_one_episode_are_alike(each):
    rng, episode = np.random.default_rng(1), np.repeat(np.arange(12), each)
    one = rng.normal(size=12)[episode] + .01 * rng.normal(size=12 * each)
    other = np.zeros_like(one)
    widths = []
    for groups in (None, episode):
        _, low, high = bootstrap_difference(one, other, groups=groups)
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0]) if each == 1 else widths[1] > 2 * widths[0]


@pytest.mark.parametrize("one, other, words", [
    (np.zeros(4), np.zeros(5), "evaluation.n_windows"),
    (np.zeros((4, 2)), np.zeros(4), "not of the same windows"),
    (np.zeros(1), np.zeros(1), "at least two independent windows")])
def test_what_cannot_be_subtracted_is_refused(one, other, words):
    with pytest.raises(EvaluationError, match=words) as said: bootstrap_difference(one, other)
    assert "\n" not in str(said.value)


STILL, MEAN = (Source("baseline", name, False) for name in ("persistence", "mean_position"))
THROUGH, REFERENCE = Source("baseline", "persistence"), Source("reference", "probe", False)


@pytest.mark.parametrize("means, best", [
    ({STILL: 2., MEAN: 3.}, STILL), ({STILL: 3., MEAN: 2.}, MEAN), ({MODEL: .1, STILL: 2.}, STILL),
    ({THROUGH: .1, STILL: 2., MEAN: 3.}, STILL), ({REFERENCE: .1, MEAN: 3.}, MEAN),
    ({STILL: math.nan, MEAN: 3.}, MEAN), ({STILL: math.nan}, None), ({}, None),
    ({MODEL: 1., THROUGH: 1.}, None)])
def test_the_best_baseline_has_no_model_in_it(means, best):
    assert best_baseline({source: np.full(5, mean) for source, mean in means.items()}) == best
    assert best_baseline({source: torch.full((5, 2), mean) for source, mean in means.items()}) == best


class Falling:
    "A dataset of lengths only; every second episode is ended by the environment."
    def __init__(self, lengths):
        self.lengths = np.array(lengths)
        self.starts = np.cumsum(self.lengths + 1) - (self.lengths + 1)
        self.terminated = np.zeros((self.lengths + 1).sum(), bool)
        self.terminated[(self.starts + self.lengths - 1)[::2]] = True


@pytest.mark.parametrize("steps, windows, ended", [(1, 18, 3), (2, 13, 3), (4, 5, 1), (6, 1, 0)])
def test_rows_say_how_much_of_the_data_was_seen(steps, windows, ended):
    data = Falling([3, 2, 5, 6, 2, 4])
    cut = Windows(data, np.array([0, 1, 2, 3, 4]), steps)
    seen, ends = data_rows(cut, np.arange(len(cut)), horizon=steps, protocol="reward")
    assert len(cut) == windows == seen["n"] == ends["n"]
    assert seen["value"] == windows / 18 and ends["value"] == ended
    assert (seen["metric"], ends["metric"]) == ("windows", "ended") and ends["unit"] == "windows"
    for row in (seen, ends):
        assert (row["kind"], row["head"], row["protocol"]) == ("reference", "data", "reward")
        assert row["model"] == "" and math.isnan(row["low"]) and row["horizon"] == steps
