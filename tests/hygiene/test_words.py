"The field's words: what the package exports is called what papers call it, and by no private word."
import ast
import importlib
import inspect
import pkgutil
import re

import pytest

import worldmodels_nb
from worldmodels_nb.models.base import MODELS, known_stages
from worldmodels_nb.runs.folder import STAGES
from worldmodels_nb.settings import JepaSettings, Settings, sections

# A name of old, and what took its place; what stands before a dot confines it to that part of the package
OLD = {
    # models
    "sight": "encoder_state", "eye": "inference_encoder", "prepare": "preprocess", "door": "preprocess",
    "calibrate": "fit_normalization", "tell": "decoder_input", "told": "conditioning",
    "middle": "build_bridge", "expect": "predicted_latent", "paint": "decode", "painted": "decoded",
    "dream": "rollout", "dreamed": "imagined", "Memory": "KVCache", "extend": "forward_cached",
    "cut": "patchify", "take": "gather_tokens", "see": "encode_frames", "explained": "skill",
    "places": "positions",
    # training
    "adopt": "use_pretrained, or record_loaded", "aside": "evaluation_mode",
    "training.kept": "resume_state",
    "Apart": "ThreadedTracker", "watchers": "callbacks",
    # losses and settings
    "Auxiliary": "Regularizer", "auxiliary": "regularizer", "nn.regularizer.share": "weight",
    "misfit": "find_conflict", "determining": "dataset_settings", "MaskedSettings": "PretrainSettings",
    "AcSettings": "ActionSettings",
    # evaluation
    "eval.rewards.reader": "reward_mlp_net", "eval.rewards.seen": "latents_per_step",
    "rows_of": "frame_indices", "episode_rows": "frame_indices", "probe_rows": "probe_results",
    "panel_rows": "collapse_results", "tidy_row": "result_row", "HeadError": "EvaluationError",
    "floor": "baseline, or reference", "floors": "baselines, or references", "is_floor": "a row's kind",
    "FLOOR_COLOR": "BASELINE_COLOR",
    # widgets
    "said": "message",
}

# Settings are looked up by whole dotted names: a section, or a key
OLD_SETTINGS = {
    "masked": "vjepa2.pretrain", "ac": "vjepa2.action", "training": "train", "ppo": "collect.ppo",
    "patch": "encoder.patch", "cnn": "encoder.cnn", "vit": "encoder.vit", "mlp": "encoder.mlp",
    "barlow": "loss.barlow", "dino": "loss.dino", "sigreg": "loss.sigreg", "probe": "evaluation.probe",
    "state_decoder": "train.state_decoder", "reward_mlp": "train.reward_mlp", "larp": "train.larp",
    "train.window": "train.window_steps", "evaluation.windows": "evaluation.n_windows",
    "vjepa2.action.window": "vjepa2.action.window_steps", "loss.barlow": "loss.barlow.weight",
    "loss.dino": "loss.dino.weight", "loss.sigreg": "loss.sigreg.weight",
}
OLD_STAGES = {"masked": "pretrain", "ac": "action"}
OLD_TARGETS = {"none": "shared", "vjepa2": "ema_target", "default": "ema_both"}

PARTS = sorted(info.name.removeprefix("worldmodels_nb.")
               for info in pkgutil.walk_packages(worldmodels_nb.__path__, "worldmodels_nb.")
               if not info.ispkg and not info.name.rpartition(".")[2].startswith("_"))


def is_public(name): return not name.startswith("_")


def parameters(thing):
    "Names of a callable's parameters; none where Python does not say."
    try: return list(inspect.signature(thing).parameters)
    except (TypeError, ValueError): return []


def class_names(kind):
    "What a class of ours shows: attributes, fields and methods, and the parameters of methods."
    names = [*vars(kind), *vars(kind).get("__annotations__", {})]
    methods = [thing for name, thing in vars(kind).items() if callable(thing)]
    return [*names, *(name for method in methods for name in parameters(method))]


def assigned_to_self(module):
    "Attributes that methods set, patched ones included: `self.x = …`."
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    stored = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return [node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"]


def exported_names(part):
    "Every public name a module adds: exports, their attributes, methods and parameters."
    module = importlib.import_module(f"worldmodels_nb.{part}")
    names = [*module.__all__, *assigned_to_self(module)]
    for name in module.__all__:
        thing = getattr(module, name)
        ours = inspect.isclass(thing) and thing.__module__.startswith("worldmodels_nb")
        if ours: names += class_names(thing)
        elif callable(thing): names += parameters(thing)
    return {name for name in names if is_public(name)}


def old_words(part):
    "The names of old that a module is not to use."
    split = [(*key.rpartition("."), new) for key, new in OLD.items()]
    return {name: new for scope, _, name, new in split if f"{part}.".startswith(f"{scope}." if scope else "")}


def test_the_walk_finds_what_there_is():
    assert len(PARTS) > 30
    assert {"Regularizer", "weight", "settings"} <= exported_names("nn.regularizer")
    assert {"WorldModel", "rollout", "past_actions", "frame_stack"} <= exported_names("models.base")
    assert {"View", "message", "render", "state"} <= exported_names("widgets.base")
    assert {"sight", "kept"} <= set(old_words("training.fit")) and "kept" not in old_words("models.base")


@pytest.mark.parametrize("part", PARTS)
def test_no_exported_name_is_an_old_word(part):
    found = exported_names(part) & set(old_words(part))
    assert {name: old_words(part)[name] for name in found} == {}, "these names have others in the field"


def test_old_names_are_retired_in_favour_of_names_that_exist():
    there = {name for part in PARTS for name in exported_names(part)}
    names = {word for new in OLD.values() for word in new.split(", or ")}
    names = {name for name in names if re.fullmatch(r"[A-Z]\w+|\w+_\w+", name)}  # others are words of prose
    assert names - there == set()


def test_settings_have_no_old_names():
    names = {*Settings().flat()}
    assert {name: new for name, new in OLD_SETTINGS.items() if name in names} == {}
    groups = {name.split(".")[0] for name in sections()}
    assert {name: new for name, new in OLD_SETTINGS.items() if name in groups} == {}
    keys = {key.rpartition(".")[2] for key in Settings().flat()}
    assert {name: new for name, new in OLD.items() if name in keys} == {}


def test_stages_and_models_have_no_old_names():
    stages = {*STAGES, *known_stages(), *(name for model in MODELS.values() for name in model.stage_names)}
    assert {name: new for name, new in OLD_STAGES.items() if name in stages} == {}
    assert stages >= set(OLD_STAGES.values())
    assert not {*MODELS} & set(OLD)


def test_targets_of_jepa_have_no_old_names():
    choices = JepaSettings.model_json_schema()["properties"]["target"]["enum"]
    assert not set(choices) & set(OLD_TARGETS) and set(choices) == set(OLD_TARGETS.values())
