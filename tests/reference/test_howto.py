"What the how-to chapters say about other kernels and other models, which no chapter can show in its own."
import json
import re
import subprocess
import sys

import pytest
import torch

from worldmodels_nb.models import base
from worldmodels_nb.models.base import MODELS, ModelError, WorldModel, build_model, check_model
from worldmodels_nb.nn.regularizer import TERMS
from worldmodels_nb.runs.experiment import blank_models, data_spec
from worldmodels_nb.settings import FURTHER_TERMS, load_settings, make_settings, refusal, repo_root

FOLDER = repo_root() / "nbs" / "9_reference"
CHAPTERS = ("92_add_a_model", "93_add_a_loss_term", "94_add_an_environment", "95_released_weights",
            "96_run_a_study", "99_read_a_run")


def cells_of(chapter, kind="code"):
    "Sources of a chapter's cells."
    cells = json.loads((FOLDER / f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def imports_and(chapter, words):
    "A chapter as a module of one's own would hold it: its first imports, and the cells with these words."
    cells = cells_of(chapter)
    return "\n\n".join([cells[0], *(cell for cell in cells[1:] if re.search(words, cell))])


# ---------------------------------------------------------------- the chapters

def test_forty_lines_lead_from_an_empty_notebook_to_the_report():
    lines = [line for cell in cells_of("92_add_a_model")[:4] for line in cell.splitlines() if line.strip()]
    assert "write_report(run)" in "".join(lines) and len(lines) <= 55
    assert len([line for line in lines if not line.startswith(("import", "from"))]) <= 42


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_how_to_ends_with_how_it_fails_and_exports_nothing(chapter):
    headings = re.findall(r"^## (.+)$", "\n".join(cells_of(chapter, "markdown")), re.M)
    assert headings[-1] == "How it fails"
    assert not [cell for cell in cells_of(chapter) if re.search(r"#\|\s*(export|default_exp)", cell)]


# ---------------------------------------------------------------- in another kernel

ASKS = """
import sys
import worldmodels_nb.models, worldmodels_nb.nn
worldmodels_nb.models.__path__.append({folder!r} + "/models")
worldmodels_nb.nn.__path__.append({folder!r} + "/nn")
from worldmodels_nb.runs.experiment import blank_models, data_spec
from worldmodels_nb.runs.folder import check_names, resolve
settings = resolve("smoke", models=["linear"], overrides={{"loss.centre": 2.0}})
check_names(settings)
world = blank_models(settings, data_spec(settings, None))["linear"]
print(type(world).__module__, world.color, world.weights["centre"])
"""


def test_a_chapter_of_ones_own_is_found_by_a_fresh_kernel(tmp_path):
    for package in ("models", "nn"): (tmp_path / package).mkdir()
    (tmp_path / "models" / "linear.py").write_text(imports_and("92_add_a_model", "@register"))
    (tmp_path / "nn" / "centre.py").write_text(imports_and("93_add_a_loss_term", r'@loss_term\("centre"'))
    code = ASKS.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root(), capture_output=True, text=True)
    assert done.stdout.split() == ["worldmodels_nb.models.linear", "#009E73", "2.0"], done.stderr


def test_an_unknown_key_of_loss_is_looked_for_once_and_still_a_misprint():
    before = dict(TERMS), dict(FURTHER_TERMS)
    said = refusal(lambda: make_settings({"loss": {"centre": 1.0}}))
    assert "unknown setting 'loss.centre'" in said and (dict(TERMS), dict(FURTHER_TERMS)) == before


# ---------------------------------------------------------------- a model's word

@pytest.fixture(scope="module")
def spec():
    return data_spec(load_settings(preset="smoke"), None)


@pytest.mark.parametrize("changes", [
    {}, {"model.tokens": True}, {"model.frame_stack": 3}, {"env.color": "grey"}, {"env.id": "CartPole-v1"}],
    ids=str)
def test_every_model_of_the_project_keeps_its_word(changes):
    settings = load_settings(preset="smoke", overrides=changes)
    worlds = blank_models(settings, data_spec(settings, None))
    assert list(worlds) == settings.run.models
    for name, world in worlds.items(): check_model(name, world)


class Honest(WorldModel):
    "Two numbers a frame, which never change."
    latent_shape = (1, 2)
    def encode(self, frames):
        x = self.preprocess(frames)
        return x.mean((2, 3, 4))[:, :, None, None].expand(-1, -1, 1, 2)
    def rollout(self, z, past_actions, actions): return z[:, -1:].expand(-1, actions.shape[1], -1, -1)
    def loss(self, batch): return None


class Mute(Honest): loss = WorldModel.loss
class Still(Honest): rollout = WorldModel.rollout
class Wide(Honest): latent_shape = (1, 3)
class Unsaid(Honest): latent_shape = None


class Long(Honest):
    def rollout(self, z, past_actions, actions):
        return torch.cat([z, super().rollout(z, past_actions, actions)], 1)


class Odd(Honest):
    def encode(self, frames): raise RuntimeError("two\nlines")


WRONG = {Mute: ["has no loss for its stage 'world'"], Still: ["has no rollout"],
         Wide: ["encode", "(2, 3, 1, 2)", "(2, 3, 1, 3)", "latent_shape"],
         Unsaid: ["cannot encode", "TypeError"], Long: ["rollout", "(2, 2, 1, 2)", "(2, 1, 1, 2)"],
         Odd: ["cannot encode", "RuntimeError: two lines"]}


def test_a_model_that_keeps_its_word_is_taken(spec):
    with torch.device("meta"): check_model("mine", Honest(load_settings(preset="smoke"), spec))


@pytest.mark.parametrize("kind, words", WRONG.items(), ids=lambda part: getattr(part, "__name__", ""))
def test_a_model_that_breaks_its_word_is_refused_in_a_sentence(kind, words, spec, monkeypatch):
    monkeypatch.setattr(base, "MODELS", dict(MODELS) | {"mine": kind})
    settings = load_settings(preset="smoke", overrides={"run.models": ["mine"]})
    with torch.device("meta"): model = build_model("mine", settings, spec)
    for call in (lambda: check_model("mine", model), lambda: blank_models(settings, spec)):
        with pytest.raises(ModelError) as caught: call()
        said = str(caught.value)
        assert all(word in said for word in ["mine", *words]) and "\n" not in said, said
