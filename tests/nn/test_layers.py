"The bricks equal torch's own, and a mask really hides."
import pytest
import torch
from torch import nn

from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.nn.layers import (
    ACTIVATIONS,
    ActionEmbedding,
    Attention,
    Block,
    UnitActions,
    autocast,
    frames_to_float,
    mlp,
    patch_grid,
    stack_frames,
)
from worldmodels_nb.settings import SettingsError

CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
HOW = {
    "d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "activation": "gelu",
    "norm_first": True, "batch_first": True,
}


def same(value, wanted): torch.testing.assert_close(value, wanted, atol=1e-12, rtol=0)
def tokens(n): return torch.randn(3, n, 8, dtype=torch.float64)


def copy_attention(ours, theirs):
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key_value.weight]).data
    theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key_value.bias]).data
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def copy_parts(pairs):
    for ours, theirs in pairs: theirs.load_state_dict(ours.state_dict())


@pytest.fixture
def attentions():
    "Ours and torch's, with the same weights."
    ours, theirs = Attention(8, 2).double(), nn.MultiheadAttention(8, 2, batch_first=True).double()
    copy_attention(ours, theirs)
    return ours, theirs


# frames and actions

def test_bytes_become_numbers_from_zero_to_one():
    frames = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(frames_to_float(frames), torch.arange(256) / 255)


@pytest.mark.parametrize("stack", [1, 2, 4])
def test_stacks_are_the_latest_frames_oldest_first(stack):
    frames = torch.randint(0, 256, (2, stack - 1 + 3, 3, 4, 5), dtype=torch.uint8)
    stacked = stack_frames(frames, stack)
    assert stacked.shape == (2, 3, 3 * stack, 4, 5)
    for t in range(3): assert torch.equal(stacked[:, t], frames[:, t:t + stack].flatten(1, 2))


def test_patches_must_fit():
    assert patch_grid(64, 8) == 8
    with pytest.raises(SettingsError, match="60 px cannot be cut into patches of 8 px"): patch_grid(60, 8)
    with pytest.raises(SettingsError, match="change decoder.patch"): patch_grid(60, 16, "decoder.patch_size")


@pytest.mark.parametrize("widths", [[4, -5, 2], [4, 0], [0, 3], [2, 8, 0, 1]])
def test_layers_without_width_are_refused(widths):
    with pytest.raises(SettingsError, match="every width must be 1 or more"): mlp(widths)


def test_a_discrete_action_is_a_row_and_a_continuous_one_is_mapped():
    buttons = ActionEmbedding(ActionSpec("discrete", 4), 8)
    assert torch.equal(buttons(torch.tensor([[0, 3]]))[0, 1], buttons.embed.weight[3])
    joystick = ActionEmbedding(ActionSpec("continuous", 2, [-1., -1.], [1., 1.]), 8)
    pushed = torch.randn(3, 2)
    assert torch.equal(joystick(pushed.double()), joystick.embed(pushed))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_perceptron_has_nothing_after_its_last_layer(activation, dropout):
    kinds = [type(layer) for layer in mlp([4, 8, 8, 2], activation, dropout)]
    between = [ACTIVATIONS[activation], nn.Dropout][:1 + (dropout > 0)]
    assert kinds == [nn.Linear, *between, nn.Linear, *between, nn.Linear]
    assert [type(layer) for layer in mlp([4, 2])] == [nn.Linear]


# attention

def test_attention_equals_that_of_torch(attentions):
    ours, theirs = attentions
    x, memory = tokens(5), tokens(7)
    same(ours(x), theirs(x, x, x)[0])
    same(ours(x, memory), theirs(x, memory, memory)[0])
    allowed = torch.rand(5, 7) < .5
    allowed[:, 0] = True
    same(ours(x, memory, allowed), theirs(x, memory, memory, attn_mask=~allowed)[0])  # theirs says where not


def test_heads_must_divide_the_width():
    with pytest.raises(SettingsError, match="not divisible by 4"): Attention(10, 4)


def test_a_mask_hides(attentions):
    ours, x = attentions[0], tokens(5)
    changed = x.clone()
    changed[:, -1] += 10
    moved = (ours(changed, mask=CAUSAL) - ours(x, mask=CAUSAL)).abs().amax((0, 2))
    assert moved[:-1].max() == 0 and moved[-1] > 0


def test_attention_is_blind_to_order(attentions):
    ours, x, order = attentions[0], tokens(5), torch.randperm(5)
    same(ours(x)[:, order], ours(x[:, order]))


# blocks

def test_block_equals_that_of_torch():
    ours, theirs = Block(8, 2, 16), nn.TransformerEncoderLayer(**HOW)
    copy_parts([(ours.norm1, theirs.norm1), (ours.norm2, theirs.norm2)])
    copy_parts([(ours.mlp[0], theirs.linear1), (ours.mlp[2], theirs.linear2)])
    copy_attention(ours.attention, theirs.self_attn)
    ours, theirs, x = ours.double(), theirs.double(), tokens(5)
    same(ours(x), theirs(x))
    same(ours(x, mask=CAUSAL), theirs(x, src_mask=~CAUSAL))


def test_block_with_a_memory_equals_that_of_torch():
    ours, theirs = Block(8, 2, 16, cross=True), nn.TransformerDecoderLayer(**HOW)
    copy_parts([(ours.norm1, theirs.norm1), (ours.norm_cross, theirs.norm2), (ours.norm2, theirs.norm3)])
    copy_parts([(ours.mlp[0], theirs.linear1), (ours.mlp[2], theirs.linear2)])
    copy_attention(ours.attention, theirs.self_attn)
    copy_attention(ours.cross, theirs.multihead_attn)
    ours, theirs, x, memory = ours.double(), theirs.double(), tokens(5), tokens(7)
    same(ours(x, memory), theirs(x, memory))
    assert not torch.allclose(ours(x, memory), ours(x, memory.flip(0)))


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "meta", "xpu"])
def test_autocast_is_off_wherever_there_is_one(kind):
    "A device without it is no error."
    with torch.autocast("cpu", torch.bfloat16), autocast(torch.device(kind), False):
        assert torch.is_autocast_enabled("cpu") == (kind != "cpu")


@pytest.mark.parametrize("kind, half", [("cpu", True), ("cpu", False), ("meta", True), ("meta", False)])
def test_autocast_is_on_where_it_is_asked_for_and_can_be(kind, half):
    with autocast(kind, half):
        assert torch.is_autocast_enabled("cpu") == (half and kind == "cpu")


BOUNDS = [([-1.0, -1.0], [1.0, 1.0]), ([-100.0, 0.0], [100.0, 4.0]), ([-.01, 3.0], [.05, 3.5]),
          ([0.0, -3e38], [1.0, 3e38])]


@pytest.mark.parametrize("low, high", BOUNDS, ids=str)
def test_actions_have_their_bounds_at_one(low, high):
    unit = UnitActions(ActionSpec("continuous", 2, low, high))
    ends = torch.tensor([low, high])
    torch.testing.assert_close(unit(ends), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert unit((ends[0] / 2 + ends[1] / 2)[None]).abs().max() < 1e-5
    assert unit.state_dict() == {}


@pytest.mark.parametrize("low, high", BOUNDS[:3], ids=str)
def test_units_of_actions_change_no_embedding(low, high):
    torch.manual_seed(0)
    plain = ActionEmbedding(ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0]), 8)
    other = ActionEmbedding(ActionSpec("continuous", 2, low, high), 8)
    other.load_state_dict(plain.state_dict())
    actions = torch.rand(64, 2) * 2 - 1
    low, high = torch.tensor(low), torch.tensor(high)
    theirs = low + (actions + 1) / 2 * (high - low)
    torch.testing.assert_close(other(theirs), plain(actions), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", [ActionSpec("discrete", 4), ActionSpec("continuous", 1),
                                  ActionSpec("continuous", 1, [2.0], [2.0])], ids=str)
def test_actions_without_bounds_or_order_stay_finite(spec):
    actions = torch.tensor([0, 3]) if spec.kind == "discrete" else torch.tensor([[.5], [2.0]])
    unit = UnitActions(spec)(actions)
    assert torch.equal(unit, actions) if spec.low is None else unit.isfinite().all()
