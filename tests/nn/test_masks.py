"Which tokens are hidden: laws that hold for every grid, ratio and seed."
import itertools

import numpy as np
import pytest
import torch
from device_tools import ELSEWHERE, Device, numbers
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from worldmodels_nb.nn.masks import (
    all_steps,
    block_mask,
    block_shape,
    check_masks,
    draw_masks,
    equal_counts,
    mask_frames,
    random_mask,
    scatter_blocks,
    tube_mask,
)
from worldmodels_nb.settings import PretrainSettings, SettingsError

GRIDS = [(1, 4, 4), (4, 4, 4), (4, 8, 8), (2, 8, 6), (8, 16, 16), (1, 2, 2), (3, 5, 7)]


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def check(mask, batch, grid):
    "No token twice, none in both lists, all of the grid, ascending, equal counts, something in each."
    context, targets = mask
    tokens = int(np.prod(grid))
    assert context.dtype == targets.dtype == torch.int64 and len(context) == len(targets) == batch
    assert context.shape[1] > 0 and targets.shape[1] > 0
    for c, t in zip(context.tolist(), targets.tolist()):
        assert c == sorted(set(c)) and t == sorted(set(t)) and not set(c) & set(t)
        assert set(c) | set(t) <= set(range(tokens))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("masking", ["blocks", "random", "tubes"])
def test_every_mask_keeps_the_laws(grid, masking):
    s = PretrainSettings(masking=masking, ratio=0.5)
    for seed in range(20):
        masks = draw_masks(s, 8, grid, seeded(seed))
        assert len(masks) == (2 if masking == "blocks" else 1)
        for mask in masks: check(mask, 8, grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("ratio", [0.35, 0.5, 0.75])
def test_a_ratio_is_kept_to_the_token(grid, ratio):
    steps, positions = grid[0], grid[1] * grid[2]
    context, targets = random_mask(3, grid, ratio, seeded())
    assert targets.shape[1] == round(ratio * steps * positions)
    assert context.shape[1] + targets.shape[1] == steps * positions
    context, targets = tube_mask(3, grid, ratio, seeded())
    assert targets.shape[1] == steps * round(ratio * positions)
    assert context.shape[1] + targets.shape[1] == steps * positions


TUBES_AND_BLOCKS = {
    "tubes": lambda generator: tube_mask(4, (3, 8, 8), 0.6, generator),
    "blocks": lambda generator: block_mask(4, (3, 8, 8), 8, 0.15, (0.75, 1.5), generator),
}


@pytest.mark.parametrize("mask", TUBES_AND_BLOCKS.values(), ids=TUBES_AND_BLOCKS)
def test_tubes_and_blocks_hide_the_same_positions_at_every_step(mask):
    for part in mask(seeded(1)):
        per_step = part.view(4, 3, -1) % 64
        assert (per_step == per_step[:, :1]).all()
        assert (part.view(4, 3, -1) // 64 == torch.arange(3)[:, None]).all()


def test_hidden_positions_of_a_single_block_are_a_rectangle():
    for seed in range(30):
        hidden = scatter_blocks(5, (3, 2), 1, (8, 6), seeded(seed)).view(5, 8, 6)
        for one in hidden:
            rows, columns = one.any(1).nonzero()[:, 0], one.any(0).nonzero()[:, 0]
            assert one.sum() == 6 and len(rows) == 3 and len(columns) == 2
            assert rows[-1] - rows[0] == 2 and columns[-1] - columns[0] == 1


def test_every_position_of_a_block_is_equally_likely():
    hidden = scatter_blocks(40_000, (3, 3), 1, (5, 4), seeded()).view(-1, 5, 4)
    firsts = hidden.flatten(1).float().argmax(1)                      # its upper left corner
    count = torch.bincount(firsts, minlength=20).view(5, 4)
    assert (count[:3, :2] > 0).all() and count[3:].sum() == count[:, 2:].sum() == 0
    expected = 40_000 / 6
    chi_squared = ((count[:3, :2] - expected) ** 2 / expected).sum()
    assert chi_squared < 20.5                                         # 5 degrees of freedom, p = .001


def counted_visible(side, shape, blocks):
    "How often each position stays visible, by counting every position of one block."
    covered = np.zeros((side, side))
    tops, lefts = side - shape[0] + 1, side - shape[1] + 1
    for top, left in itertools.product(range(tops), range(lefts)):
        covered[top:top + shape[0], left:left + shape[1]] += 1 / (tops * lefts)
    return (1 - covered) ** blocks


@pytest.mark.parametrize("side, blocks, scale", [(16, 8, .15), (16, 2, .7), (8, 8, .15)])
def test_share_of_coverage_is_what_counting_all_positions_says(side, blocks, scale):
    shape = block_shape(side, side, scale, 1.0)
    hidden = scatter_blocks(20_000, shape, blocks, (side, side), seeded())
    visible = (~hidden).float().mean(0).view(side, side).numpy()
    np.testing.assert_allclose(visible, counted_visible(side, shape, blocks), atol=0.018)


@pytest.mark.parametrize("shape, blocks", [((3, 3), 8), ((7, 6), 2), ((8, 5), 2)])
def test_share_visible_is_what_counting_says(shape, blocks):
    visible = (~scatter_blocks(20_000, shape, blocks, (8, 8), seeded())).float().mean().item()
    assert visible == pytest.approx(counted_visible(8, shape, blocks).mean(), abs=4e-3)


def test_block_shapes_of_small_grids_are_whole_and_fit():
    assert block_shape(16, 16, 0.15, 1.0) == (6, 6)
    assert block_shape(2, 2, 0.15, 1.0) == (1, 1)
    assert block_shape(16, 16, 0.7, 1.5) == (16, 11)


def test_block_shapes_have_the_area_and_the_aspect_asked_for():
    for scale, aspect in itertools.product((.15, .4, .7), (.75, 1., 1.5)):
        height, width = block_shape(64, 64, scale, aspect)
        if height < 64 and width < 64:
            assert abs(height * width / 4096 - scale) < .03 and abs(height / width - aspect) < .1


def test_what_is_given_up_for_equal_counts_is_drawn_evenly():
    hidden = torch.zeros(3000, 6, dtype=torch.bool)
    hidden[:, :2] = True
    hidden[0, :4] = True                              # this clip shows least: 2; the fewest hidden are 2
    context, targets = equal_counts(hidden, seeded())
    assert context.shape == (3000, 2) and targets.shape == (3000, 2)
    count = torch.bincount(context[1:].flatten(), minlength=6)
    assert count[:2].sum() == 0 and (count[2:] / 2999 - .5).abs().max() < .04
    assert (targets[1:] == torch.tensor([0, 1])).all() and set(targets[0].tolist()) < {0, 1, 2, 3}


def test_at_least_a_tenth_stays_visible_on_small_grids():
    for seed in range(50):
        context, _ = block_mask(64, (1, 8, 8), 2, .7, (.75, 1.5), seeded(seed))
        assert context.shape[1] >= 7
        context, _ = block_mask(64, (1, 4, 4), 2, .7, (.75, 1.5), seeded(seed))
        assert context.shape[1] >= 2


@pytest.mark.parametrize("least, seen", [(0, 1), (.1, 7), (.2, 13)])
def test_the_share_that_stays_visible_is_a_setting(least, seen):
    s = PretrainSettings(blocks=[2], scales=[.7], least=least)
    counts = [draw_masks(s, 64, (1, 8, 8), seeded(seed))[0][0].shape[1] for seed in range(50)]
    assert min(counts) >= seen and (least or min(counts) < 7)


def test_a_share_that_no_draw_leaves_visible_is_refused():
    with pytest.raises(SettingsError, match=r"vjepa2.pretrain.scales or \.least"):
        draw_masks(PretrainSettings(blocks=[2], scales=[.7], least=.9), 4, (1, 8, 8), seeded())


def test_masks_follow_from_the_generator_and_nothing_else():
    for masking in ("blocks", "random", "tubes"):
        s = PretrainSettings(masking=masking)
        torch.manual_seed(1)
        first = draw_masks(s, 4, (2, 8, 8), seeded(5))
        torch.manual_seed(2)
        np.random.seed(3)
        before = torch.get_rng_state()
        second, other = draw_masks(s, 4, (2, 8, 8), seeded(5)), draw_masks(s, 4, (2, 8, 8), seeded(6))
        assert torch.equal(before, torch.get_rng_state())
        assert same_masks(first, second) and not same_masks(first, other)


def same_masks(first, second):
    pairs = [pair for one, two in zip(first, second) for pair in zip(one, two)]
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)), ratio=st.floats(.01, .99),
    masking=st.sampled_from(["blocks", "random", "tubes"]), scale=st.floats(.01, .99),
    blocks=st.integers(1, 9), seed=st.integers(0, 1000))
@budget(max_examples=150, deadline=None)
def test_any_grid_gives_a_mask_or_one_clear_error(grid, ratio, masking, scale, blocks, seed):
    s = PretrainSettings(masking=masking, ratio=ratio, blocks=[blocks], scales=[scale])
    try: masks = draw_masks(s, 5, grid, seeded(seed))
    except SettingsError as error:
        message = str(error)
        assert "\n" not in message and f"{grid[1]}×{grid[2]}" in message
        assert str(scale if masking == "blocks" else ratio) in message
        return
    for mask in masks: check(mask, 5, grid)


@pytest.mark.parametrize("grid", [(4, 8, 8), (1, 4, 4)], ids=str)
def test_the_default_masks_leave_something_in_every_shape(grid):
    check_masks(PretrainSettings(), grid)


def test_masks_that_some_shape_makes_impossible_are_refused_before_training():
    with pytest.raises(SettingsError, match="vjepa2.pretrain.scales"):
        check_masks(PretrainSettings(scales=[.15, .97]), (1, 4, 4))


def test_only_hidden_patches_turn_grey():
    frames = torch.randint(0, 100, (4, 3, 8, 12), dtype=torch.uint8)
    masked = mask_frames(frames, torch.tensor([0, 11]), (2, 2, 3), grey=200)
    assert torch.equal(masked[:2, :, :4, :4], frames[:2, :, :4, :4])
    assert torch.equal(masked[2:, :, 4:, 8:], frames[2:, :, 4:, 8:])
    assert (masked == 200).float().mean().item() == pytest.approx(10 / 12)


# where the default device is another one

@pytest.mark.parametrize("grid", [(1, 4, 4), (2, 8, 6), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("masking", ["blocks", "random", "tubes"])
def test_masks_are_drawn_on_the_cpu_wherever_a_model_is_built(masking, grid):
    s = PretrainSettings(masking=masking, ratio=0.5)
    with torch.device("meta"):
        check_masks(s, grid)
        there = draw_masks(s, 3, grid, seeded())
    for mask, same in zip(there, draw_masks(s, 3, grid, seeded()), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mask, same))


@pytest.mark.parametrize("steps, count", [(1, 4), (3, 6), (4, 9)])
def test_a_clip_is_masked_where_it_is(steps, count):
    positions = torch.tensor([[0, 2], [1, 3]])
    with Device():
        there = all_steps(positions.to(ELSEWHERE), steps, count)
        assert torch.equal(numbers(there), all_steps(positions, steps, count))
        clip = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
        for visible in (torch.tensor([1, 5]), torch.tensor([1, 5]).to(ELSEWHERE)):
            masked = mask_frames(clip.to(ELSEWHERE), visible, (2, 2, 2))
            assert torch.equal(numbers(masked), mask_frames(clip, torch.tensor([1, 5]), (2, 2, 2)))
