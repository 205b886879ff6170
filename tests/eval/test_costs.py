"Costs: parameters of each part, and steps, frames and seconds of all stages together."
import pytest
from torch import nn

from worldmodels_nb.eval.costs import cost_results


class World(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.target = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)

    def parts(self): return dict(self.named_children())


def result(steps, seconds): return dict(steps=steps, seconds=seconds, best_step=steps - 1, weights="…")


def test_one_stage_has_a_best_step():
    rows = cost_results(World(), [result(10, 2.5)], 720, "jepa")
    found = {row["metric"]: (row["value"], row["unit"]) for row in rows}
    assert found == {"parameters encoder": (8, "parameters"), "parameters target": (8, "parameters"),
                     "steps": (10, "steps"), "frames_seen": (720, "frames"), "seconds": (2.5, "s"),
                     "best_step": (9, "steps")}
    assert list(found)[-4:] == ["steps", "frames_seen", "seconds", "best_step"]
    whose = {(row["protocol"], row["model"], row["kind"], row["horizon"]) for row in rows}
    assert whose == {("cost", "jepa", "model", 0)}


def test_stages_are_added_up_and_have_no_single_best_step():
    rows = cost_results(World(), [result(10, 2.5), result(4, .25)], 1, "m")
    found = {row["metric"]: row["value"] for row in rows}
    assert (found["steps"], found["seconds"], found["frames_seen"]) == (14, pytest.approx(2.75), 1)
    assert "best_step" not in found
