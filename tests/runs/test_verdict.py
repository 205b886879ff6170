"The verdict: each rule has rows that make it speak and rows that leave it silent; none knows a model's name."
import ast

import numpy as np
import pytest
from run_tools import ROOT

from worldmodels_nb.eval.results import MODEL, Source, result_row, stamp
from worldmodels_nb.runs import verdict as rules
from worldmodels_nb.runs.facts import Facts, last_skill, paired_difference, read_facts
from worldmodels_nb.runs.folder import RunFolder

UNTRAINED = Source("baseline", "untrained")
N = 60  # windows, two of each episode


def rows_of(protocol, metric, horizon=0, n=N, spread=.1, source=MODEL, **values):
    "A row a model: its value, and an interval so wide to each side."
    rows = [result_row(protocol, metric, value, value - spread, value + spread, n, horizon, name, source)
            for name, value in values.items()]
    return stamp(rows, "toy", "Toy-v0", 0)


def errors_of(metric, horizon, noise=.05, seed=0, **means):
    "Window-by-window errors: what is hard is hard for all, and each model is off by its own mean."
    draw, windows = np.random.default_rng(seed), np.arange(N)
    hard = draw.gamma(1, 1, N)
    return {name: {f"error_{metric}_{horizon}": hard + mean + draw.normal(0, noise, N),
                   f"window_{horizon}": windows, f"episode_{horizon}": windows // 2}
            for name, mean in means.items()}


def joined(*errors):
    "Errors at several horizons, of the same models."
    return {name: {key: array for of in errors for key, array in of[name].items()} for name in errors[0]}


def said(rule, *rows, **facts):
    return " ".join(rule(Facts([row for some in rows for row in some], **facts)))


def trained(**stages):
    "What stages ended with, by name."
    usual = dict(steps=600, best_step=500, validations=6, skill=None, recipe={})
    return {name.replace("__", "/"): usual | about for name, about in stages.items()}


# ---------------------------------------------------------------- who predicts best

RATIOS = rows_of("rollout", "position_ratio", 4, one=.3, two=.5, three=.9)


def test_the_best_is_named_and_the_paired_interval_allows_it():
    text = said(rules.best_model, RATIOS, errors=errors_of("position", 4, one=0, two=.3, three=.9))
    assert "one at 4 steps (0.30 of the best baseline's error)" in text and "allows to say so" in text
    assert "linear probe" in text and "cannot" not in text


def test_it_is_not_claimed_where_the_interval_includes_zero():
    text = said(rules.best_model, RATIOS, errors=errors_of("position", 4, noise=.5, one=0, two=.02, three=.9))
    assert "one at 4 steps" in text and "but two cannot be told from it" in text and "three" not in text


def test_intervals_of_single_models_decide_nothing():
    "Each model's own interval is as wide as the difference: only pairs can tell."
    wide = rows_of("rollout", "position_ratio", 4, spread=.5, one=.3, two=.5)
    assert "allows to say so" in said(rules.best_model, wide, errors=errors_of("position", 4, one=0, two=.2))


@pytest.mark.parametrize("errors", [{}, errors_of("position", 8, one=0, two=.3, three=.9),
                                    errors_of("pixel", 4, one=0, two=.3, three=.9)])
def test_without_errors_on_the_same_windows_nothing_is_claimed(errors):
    text = said(rules.best_model, RATIOS, errors=errors)
    assert "no errors on the same windows" in text and "allows" not in text


def test_each_horizon_has_its_own_best():
    rows = RATIOS, rows_of("rollout", "position_ratio", 16, one=.8, two=.6, three=.9)
    errors = joined(errors_of("position", 4, one=0, two=.3, three=.9),
                    errors_of("position", 16, one=.8, two=.2, three=.9))
    text = said(rules.best_model, *rows, errors=errors)
    assert text.index("one at 4 steps") < text.index("two at 16 steps")


def test_horizons_with_one_outcome_share_a_clause():
    rows = RATIOS, rows_of("rollout", "position_ratio", 8, one=.4, two=.6, three=.9)
    errors = joined(*(errors_of("position", h, one=0, two=.3, three=.9) for h in (4, 8)))
    assert "one at 4 and 8 steps (0.30 and 0.40" in said(rules.best_model, *rows, errors=errors)


def test_both_probes_are_asked_and_agreement_is_short():
    errors = joined(errors_of("position", 4, one=0, two=.3, three=.9),
                    errors_of("mlp_position", 4, one=0, two=.3, three=.9))
    same = rows_of("rollout", "mlp_position_ratio", 4, one=.2, two=.4, three=.8)
    other = rows_of("rollout", "mlp_position_ratio", 4, one=.4, two=.2, three=.8)
    assert "MLP probe, they are the same" in said(rules.best_model, RATIOS, same, errors=errors)
    text = said(rules.best_model, RATIOS, other, errors=errors)
    assert "MLP probe, these predict best: two at 4 steps" in text


def test_pixels_decide_only_where_there_are_no_positions():
    pixels = rows_of("rollout", "pixel_ratio", 4, one=.9, two=.2)
    assert "In pixels" not in said(rules.best_model, RATIOS, pixels)
    assert "In pixels, these predict best: two" in said(rules.best_model, pixels)
    inches = rows_of("rollout", "position_std_ratio", 4, one=.2, two=.3)
    assert "In position" in said(rules.best_model, inches, pixels)


@pytest.mark.parametrize("rows", [[], rows_of("rollout", "position_ratio", 4, one=.3)])
def test_one_model_or_none_has_no_best(rows):
    assert said(rules.best_model, rows) == ""


# ---------------------------------------------------------------- below a baseline

def test_who_beats_every_baseline_is_said_in_one_sentence():
    fine = rows_of("rollout", "position_ratio", 4, one=.3, two=.5)
    assert said(rules.below_baseline, fine).startswith("Every model beats")


@pytest.mark.parametrize("value, words", [
    (1.3, "two does not beat it at 4 steps (1.30)"), (1.0, "two does not beat it at 4 steps (1.00)"),
    (.95, "two is not shown to at 4 steps")])
def test_who_does_not_is_named(value, words):
    text = said(rules.below_baseline, rows_of("rollout", "position_ratio", 4, one=.3, two=value))
    assert words in text and "one " not in text and "Every" not in text


def test_what_no_probe_measured_is_not_praised():
    assert said(rules.below_baseline, rows_of("probe", "r2 position", one=.9)) == ""


# ---------------------------------------------------------------- costs, training, matching, scope

def test_costs_name_the_least_and_the_most():
    rows = (rows_of("cost", "seconds", one=20, two=60, three=40),
            rows_of("cost", "parameters trainable", one=50_000, two=50_000, three=50_000),
            rows_of("cost", "flops_rollout", one=2e6, two=3e9, three=2e7))
    text = said(rules.costs, *rows)
    assert "20 (one) to 60 (two) s of training" in text and "50,000 trainable parameters each" in text
    assert "2 M (one) to 3 G (two) FLOPs a rollout step" in text and "three" not in text
    assert said(rules.costs, RATIOS) == ""


@pytest.mark.parametrize("about, there", [
    (dict(best_step=600), True), (dict(best_step=500), False),
    (dict(best_step=600, validations=1), False), (dict(best_step=600, recipe={"loaded": "x"}), False),
    (dict(best_step=0, steps=0), False)])
def test_a_best_step_that_is_the_last_is_told(about, there):
    text = said(rules.not_trained, stages=trained(one=about, two={}))
    assert ("The last validation was the best for one:" in text) == there and "two" not in text


@pytest.mark.parametrize("skill, there", [(-.003, True), (0., True), (.31, False), (None, False)])
def test_a_stage_without_skill_is_told(skill, there):
    text = said(rules.not_trained, stages=trained(one__first=dict(skill=skill)))
    assert ("one/first ended with a skill" in text) == there


@pytest.mark.parametrize("lines, skill", [
    ([], None), ([{"step": 1, "train/total": 2.}], None), ([{"step": 1, "train/skill": .1}], .1),
    ([{"step": 1, "val/skill": .2}, {"step": 2, "train/skill": .9}], .2),
    ([{"step": 1, "val/skill": .2}, {"step": 2, "val/skill": .3}], .3)])
def test_the_skill_is_the_last_one_on_validation(lines, skill):
    assert last_skill(lines) == skill


@pytest.mark.parametrize("value, there", [(.90, False), (.75, True), (.55, True)])
def test_an_encoder_no_better_than_untrained_is_told(value, there):
    rows = (rows_of("probe", "r2 position", one=value, two=.95),
            rows_of("probe", "r2 position", source=UNTRAINED, one=.7, two=.7))
    text = said(rules.not_trained, *rows)
    assert ("For one a linear probe is not shown to read position any better" in text) == there
    assert "two" not in text


@pytest.mark.parametrize("two, there", [(50_000, False), (52_499, False), (53_000, True), (70_000, True)])
def test_models_of_other_sizes_are_told(two, there):
    text = said(rules.not_matched, rows_of("cost", "parameters trainable", one=50_000, two=two))
    assert ("Not matched are trainable parameters" in text and "one 50,000" in text) == there


def test_other_numbers_of_frames_are_told():
    text = said(rules.not_matched, rows_of("cost", "frames_seen", one=48_000, two=57_600))
    assert "Not matched are frames seen" in text
    assert said(rules.not_matched, rows_of("cost", "frames_seen", one=48_000)) == ""


def test_a_run_is_one_seed():
    assert "one run with one seed" in said(rules.scope)


# ---------------------------------------------------------------- numbers that mean nothing

@pytest.mark.parametrize("n, steps, there", [
    (60, 600, False), (60, 20, True), (12, 600, True), (12, 20, True)])
def test_short_runs_mean_nothing(n, steps, there):
    rows = rows_of("rollout", "position_ratio", 4, n=n, one=.3, two=.5)
    text = said(rules.meaningless, rows, stages=trained(one=dict(steps=steps), two=dict(steps=steps)))
    assert ("These numbers mean nothing" in text) == there
    assert (f"more than {steps} steps" in text) == (steps < 100) and (f"{n} windows" in text) == (n < 20)


def test_loaded_stages_do_not_make_a_run_short():
    loaded = trained(one=dict(steps=0, recipe={"loaded": "x"}))
    assert said(rules.meaningless, RATIOS, stages=loaded) == ""
    assert said(rules.meaningless, RATIOS) == ""


# ---------------------------------------------------------------- collapse

PANEL = dict(within_episode_share=.4, probe_r2=.97, probe_r2_moving=.97, probe_r2_standing=.95, std_mean=.9,
             std_min=.5, rankme=9., rankme_centred=8., rank_limit=64., inverse_r2=.8, prediction_ratio=.3)


def panel_rows(model, **changes):
    return [row for metric, value in (PANEL | changes).items() for row in
            rows_of("collapse", metric, **{model: value})]


def test_a_model_that_has_lost_what_moves_is_named():
    still = panel_rows("one", within_episode_share=2e-5, probe_r2_moving=-.01)
    text = said(rules.lost, still, panel_rows("two"))
    assert text.startswith("one ") and "moves" in text and "two" not in text


def test_the_best_model_is_not_condemned_by_its_low_rank():
    assert said(rules.lost, panel_rows("one", rankme=2.5, rankme_centred=2.1)) == ""


# ---------------------------------------------------------------- all of it

def test_what_has_nothing_to_say_is_left_out():
    facts = Facts(RATIOS, errors_of("position", 4, one=0, two=.3, three=.9), trained(one={}))
    assert list(rules.verdict(facts)) == ["Prediction", "Baselines", "Scope"]
    assert list(rules.verdict(Facts([]))) == ["Scope"]


def test_caution_comes_first():
    assert next(iter(rules.verdict(Facts(RATIOS, {}, trained(one=dict(steps=5)))))) == "Caution"


def test_each_sentence_is_one_line_with_an_end():
    facts = Facts([*RATIOS, *panel_rows("one", within_episode_share=2e-5, probe_r2_moving=-.01)],
                  stages=trained(one=dict(steps=5, best_step=5, skill=-1.)))
    sentences = [sentence for some in rules.verdict(facts).values() for sentence in some]
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in sentences)


def test_no_rule_knows_a_models_name():
    names = {"encdec", "encdec_jepa", "jepa", "vjepa2"}
    for module in ("facts", "tables", "verdict", "figures", "report", "seeds", "joined", "compare"):
        tree = ast.parse((ROOT / f"worldmodels_nb/runs/{module}.py").read_text(encoding="utf-8"))
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not names & {word for word in words if isinstance(word, str)}, module


def test_the_run_that_comes_along_has_a_verdict():
    facts = read_facts(RunFolder(ROOT / "data/sample/run"))
    found = rules.verdict(facts)
    assert {"Prediction", "Baselines", "Cost", "Scope"} <= set(found)


# ---------------------------------------------------------------- paired differences

def test_only_windows_that_both_have_seen_are_compared():
    one, two = errors_of("position", 4, one=0, two=.3).values()
    fewer = {key: array[10:] for key, array in two.items()}
    assert paired_difference(one, two, "position", 4)[3] == N
    found = paired_difference(one, fewer, "position", 4)
    assert found[3] == N - 10
    assert found[0] == pytest.approx((one["error_position_4"][10:] - two["error_position_4"][10:]).mean())


def test_windows_are_matched_by_name_and_not_by_place():
    one, two = errors_of("position", 4, one=0, two=.3).values()
    order = np.random.default_rng(1).permutation(N)
    mixed = {key: array[order] for key, array in two.items()}
    assert paired_difference(one, mixed, "position", 4) == paired_difference(one, two, "position", 4)


def test_a_window_without_a_number_is_left_out():
    one, two = errors_of("position", 4, one=0, two=.3).values()
    one["error_position_4"][3] = np.nan
    assert paired_difference(one, two, "position", 4)[3] == N - 1


@pytest.mark.parametrize("change", [
    lambda arrays: arrays.pop("window_4"), lambda arrays: arrays.update(window_4=np.arange(3)),
    lambda arrays: arrays.update(error_position_4=np.zeros((N, 2))),
    lambda arrays: arrays.update(window_4=np.arange(N) + 1000),
    lambda arrays: arrays.update(episode_4=np.zeros(N, int)), lambda arrays: arrays.clear()])
def test_what_cannot_be_paired_is_none(change):
    one, two = errors_of("position", 4, one=0, two=.3).values()
    change(one)
    assert paired_difference(one, two, "position", 4) is None
