"Turned attention is its formula and that of transformers; a cache changes nothing but the work."
import copy
import math

import pytest
import torch
from torch import nn

from worldmodels_nb.nn.rotary import (
    RotaryAttention,
    RotaryBlock,
    angle_dtype,
    grid_positions,
    init_weights,
    part_width,
    rotary_tables,
    rotate,
)

PLACES = grid_positions(3, 2, 2).double()
TABLES, STEP = rotary_tables(PLACES, 24), PLACES[:, 0]


def same(value, wanted): torch.testing.assert_close(value, wanted, atol=1e-12, rtol=0)


@pytest.fixture
def block(): return RotaryBlock(48, 2).double()


@pytest.fixture
def x(): return torch.randn(2, 12, 48, dtype=torch.float64)


# places and turns

def test_a_head_is_split_in_three_even_parts():
    assert [part_width(d) for d in (6, 16, 24, 32, 64)] == [2, 4, 8, 10, 20]
    with pytest.raises(ValueError, match="no room"): part_width(5)


def test_positions_run_through_time_then_row_then_column():
    assert grid_positions(1, 1, 1).shape == (1, 3)
    expected = [[t, row, column] for t in range(2) for row in range(3) for column in range(4)]
    assert grid_positions(2, 3, 4).tolist() == expected


def test_rows_and_columns_may_run_over_a_given_span():
    plain, spanned = (grid_positions(2, 3, 4, dtype=torch.float64, span=span) for span in (None, 15))
    same(spanned, plain * torch.tensor([1, 15 / 2, 15 / 3]).double())
    assert grid_positions(2, 1, 1, span=15).tolist() == [[0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("weights, angles", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32),
                                             (torch.float64, torch.float64)])
def test_angles_are_as_precise_as_the_weights(weights, angles):
    assert angle_dtype(torch.zeros(1, dtype=weights)) is angles


def worst_errors(tiled, d=24):
    "Of lengths, and of scores when both places are moved by the same amount."
    x, y = torch.randn(200, d).double(), torch.randn(200, d).double()
    place, shift = 10 * torch.rand(200, 3).double(), 5 * torch.rand(200, 3).double()
    def at(v, where): return rotate(v, *rotary_tables(where, d, tiled))
    length = (at(x, place).norm(dim=-1) / x.norm(dim=-1) - 1).abs().max()
    here, there = ((at(x, place + s) * at(y, 2 * place + s)).sum(-1) for s in (0, shift))
    return length.item(), (here - there).abs().max().item()


def test_a_proper_turn_keeps_lengths_and_sees_distances_only():
    length, score = worst_errors(tiled=False)
    assert length < 1e-12 and score < 1e-12


def test_the_tiled_table_of_the_released_weights_does_neither():
    length, score = worst_errors(tiled=True)
    assert length > 0.1 and score > 1


@pytest.mark.parametrize("tiled", [False, True])
def test_the_pattern_of_a_proper_turn_moves_with_its_query(tiled):
    keys = rotate(torch.ones(24), *rotary_tables(grid_positions(1, 12, 12), 24, tiled))
    first, second = ((keys @ keys[12 * r + r]).view(12, 12) for r in (3, 8))
    moved = (first[:7, :7] - second[5:, 5:]).abs().max()
    assert moved > 1 if tiled else moved < 1e-4


# attention

def turn(vector, place):
    "Pair by pair, with the quirk: frequencies tiled, pairs neighbours."
    out, p = vector.clone(), part_width(len(vector))
    omega = [10000 ** (-2 * i / p) for i in range(p // 2)] * 2
    for axis in range(3):
        for i in range(0, p, 2):
            at = axis * p + i
            a, b = vector[at], vector[at + 1]
            s, t = place[axis].item() * omega[i], place[axis].item() * omega[i + 1]
            out[at] = a * math.cos(s) - b * math.sin(s)
            out[at + 1] = b * math.cos(t) + a * math.sin(t)
    return out


def by_hand(attn, x, positions):
    "One sample (N, D), one token and one head at a time."
    d, rows = x.shape[1] // attn.heads, []
    q, k, v = attn.qkv(x).view(len(x), 3, attn.heads, d).unbind(1)
    for n in range(len(x)):
        mixed = []
        for h in range(attn.heads):
            keys = [turn(k[m, h], positions[m]) for m in range(len(x))]
            scores = torch.stack([turn(q[n, h], positions[n]) @ key for key in keys]) / math.sqrt(d)
            mixed.append(scores.softmax(0) @ v[:, h])
        rows.append(attn.proj(torch.cat(mixed)))
    return torch.stack(rows)


def test_attention_is_the_formula():
    attn, x = RotaryAttention(28, 2).double(), torch.randn(6, 28).double()
    places = grid_positions(2, 1, 3)
    same(attn(x[None], rotary_tables(places.double(), 14))[0], by_hand(attn, x, places))


def test_widths_that_heads_cannot_share_are_refused():
    with pytest.raises(ValueError, match="not divisible"): RotaryAttention(30, 4)
    with pytest.raises(ValueError, match="no room"): RotaryAttention(16, 4)


@pytest.fixture(scope="module")
def theirs():
    "An attention of transformers, with weights large enough to matter."
    transformers = pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    config = transformers.VJEPA2Config(
        patch_size=4, crop_size=16, frames_per_clip=4, tubelet_size=2, hidden_size=48, num_attention_heads=2,
        num_hidden_layers=3, pred_hidden_size=36, pred_num_attention_heads=3, pred_num_hidden_layers=2,
        pred_num_mask_tokens=3, mlp_ratio=3.0, pred_mlp_ratio=2.0)
    torch.manual_seed(0)
    model, rng = transformers.VJEPA2Model(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=rng) * 0.08)
    return copy.deepcopy(model.eval().encoder.layer[0].attention)


def test_rotary_attention_equals_that_of_transformers(theirs):
    ours, three = RotaryAttention(48, 2), (theirs.query, theirs.key, theirs.value)
    ours.load_state_dict({
        "qkv.weight": torch.cat([m.weight for m in three]), "qkv.bias": torch.cat([m.bias for m in three]),
        "proj.weight": theirs.proj.weight, "proj.bias": theirs.proj.bias})
    x = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(0))
    wanted, places = theirs(x)[0], grid_positions(2, 4, 4)
    torch.testing.assert_close(ours(x, rotary_tables(places, 24)), wanted, atol=1e-5, rtol=0)
    assert (ours(x, rotary_tables(places, 24, tiled=False)) - wanted).abs().max() > 1e-2  # the quirk matters


# blocks and their cache

def test_step_by_step_with_a_cache_equals_all_at_once(block, x):
    whole, cache, grown = block(x, TABLES, mask=STEP[:, None] >= STEP[None]), None, []
    for t in range(3):
        tables = rotary_tables(PLACES[STEP == t], 24)
        y, cache = block.forward_cached(x[:, STEP == t], tables, past=cache)
        grown.append(y)
        assert [part.shape for part in cache] == [(2, 2, 4 * (t + 1), 24)] * 2
    same(torch.cat(grown, 1), whole)


def test_places_may_differ_from_sample_to_sample(block, x):
    same(block(x, rotary_tables(PLACES.expand(2, -1, -1), 24)), block(x, TABLES))
    own = torch.stack([PLACES, PLACES.flip(0)])
    same(block(x, rotary_tables(own, 24))[1], block(x, rotary_tables(PLACES.flip(0), 24))[1])


def test_one_cache_serves_a_whole_batch(block, x):
    one = tuple(part[:1] for part in block.forward_cached(x[:1], TABLES)[1])
    each = tuple(part.expand(2, -1, -1, -1) for part in one)
    same(block.forward_cached(x, TABLES, past=one)[0], block.forward_cached(x, TABLES, past=each)[0])


def test_masks_may_differ_from_sample_to_sample(block, x):
    each = torch.rand(2, 1, 12, 12) > .5
    each |= torch.eye(12, dtype=torch.bool)
    same(block(x, TABLES, mask=each)[1], block(x[1:], TABLES, mask=each[1, 0])[0])


def test_order_does_not_matter_and_places_do(block, x):
    order = torch.randperm(12)
    plain = block(x, TABLES)[:, order]
    same(block(x[:, order], rotary_tables(PLACES[order], 24)), plain)
    assert (block(x[:, order], TABLES) - plain).abs().max() > 1e-3


def test_fresh_weights_are_small_and_each_block_adds_less():
    blocks = nn.ModuleList(RotaryBlock(192, 2) for _ in range(3))
    init_weights(blocks, blocks)
    for i, block in enumerate(blocks, 1):
        for layer in (block.attn.proj, block.mlp.fc2):
            assert layer.weight.std().item() * math.sqrt(2 * i) == pytest.approx(0.02, rel=0.03)
        for layer in (block.attn.qkv, block.mlp.fc1):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
        for layer in (block.attn.proj, block.mlp.fc2, block.attn.qkv, block.mlp.fc1):
            assert not layer.bias.any()
