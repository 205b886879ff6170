"Stage 2: nothing looks ahead, nothing is computed twice, and the loss is what plain loops say."

import itertools
from dataclasses import replace

import pytest
import torch
from action_tools import (
    BATCH,
    CONTINUOUS,
    GRID,
    KINDS,
    WIDTH,
    ac,
    other,
    some,
    transformer,
    uncached,
)

from worldmodels_nb.data.datasets import Batch
from worldmodels_nb.models import action_conditioned
from worldmodels_nb.models.action_conditioned import (
    ActionConditionedPredictor,
    WorldModelTransformer,
    frame_mask,
    normalize,
)


@pytest.mark.parametrize("dim", [48, 1024])
def test_fresh_weights_keep_the_size_of_what_passes_through_them_at_any_width(dim):
    torch.manual_seed(0)
    layer = (
        WorldModelTransformer(WIDTH, GRID, CONTINUOUS, ac(dim=dim, depth=1))
        .predictor_blocks[0]
        .attn.qkv.weight
    )
    assert 0.95 * 0.64 < layer.std().item() * dim**0.5 < 1.05 * 0.64  # .02 at the paper's 1024


@pytest.mark.parametrize("weights, angles", [(torch.float32, torch.float32), (torch.float64, torch.float64),
                                             (torch.bfloat16, torch.float32)])
@torch.no_grad()
def test_positions_are_as_precise_as_the_weights(monkeypatch, weights, angles):
    made, plain = [], action_conditioned.rotary_tables

    def tables(*args):
        made.extend(plain(*args))
        return made[-2:]

    monkeypatch.setattr(action_conditioned, "rotary_tables", tables)
    model = ActionConditionedPredictor(WIDTH, GRID, dict(action=torch.nn.Linear(2, 24)), 24, 1, 2).to(weights)
    z, actions = (x.to(weights) for x in some(CONTINUOUS, 3))
    assert model(z, actions).dtype is weights and {table.dtype for table in made} == {angles}


@KINDS
@pytest.mark.parametrize("steps", range(1, 7))
@torch.no_grad()
def test_later_tokens_and_actions_move_nothing_earlier(action, steps):
    model, (z, actions) = transformer(action), some(action, steps)
    before = model(z, actions)
    for t in range(steps):
        moved, done = z.clone(), actions.clone()
        moved[:, t] += 1
        done[:, t] = other(done)[:, t]
        for after in (model(moved, actions), model(z, done)):
            assert torch.equal(after[:, :t], before[:, :t])  # not one bit
            assert (after[:, t] - before[:, t]).abs().amax((1, 2)).min() > 1e-4  # and from there on it does
            if t + 1 < steps:
                assert (after[:, t + 1] - before[:, t + 1]).abs().max() > 1e-5


@pytest.mark.parametrize("steps", range(1, 7))
@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_reach_back_as_far_as_the_band_and_never_ahead(steps, depth):
    model, (z, actions) = transformer(depth=depth, context_length=2), some(CONTINUOUS, steps)
    z.requires_grad_(True)
    actions.requires_grad_(True)
    out = model(z, actions)
    for t in range(steps):
        for x in torch.autograd.grad(out[:, t].square().sum(), (z, actions), retain_graph=True):
            reached = x.flatten(2).abs().amax((0, 2)) > 0  # (T,)
            assert reached.tolist() == [
                t - depth <= s <= t for s in range(steps)
            ]  # L - 1 = 1 step further back with each block


@pytest.mark.parametrize(
    "steps, kept, tokens, context", list(itertools.product([1, 2, 5], [0, 1, 3], [1, 3], [1, 2, 4, 9]))
)
def test_mask_equals_the_plain_rule(steps, kept, tokens, context):
    found = frame_mask(steps, kept, tokens, context)
    wanted = torch.tensor(
        [
            [0 <= (i // tokens + kept) - j // tokens < context for j in range((kept + steps) * tokens)]
            for i in range(steps * tokens)
        ]
    )
    assert torch.equal(torch.ones_like(wanted) if found is None else found, wanted)
    assert (found is None) == bool(wanted.all())


@KINDS
@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("depth, residual", [(1, False), (3, False), (2, True)])
@torch.no_grad()
def test_rollout_with_a_cache_equals_one_without(action, context, depth, residual):
    sizes = dict(context_length=context, depth=depth, rollout_steps=1, size=0.05, residual=residual)
    model, (z, actions) = (
        transformer(action, **sizes),
        some(action, context + 2 + 16),
    )
    for T0, H in itertools.product(range(1, context + 3), (1, 2, 5, 16)):
        wanted = uncached(model, z[:, :T0], actions[:, : T0 - 1 + H])
        assert wanted.shape == (BATCH, H, 6, WIDTH)
        torch.testing.assert_close(
            model.rollout(z[:, :T0], actions[:, : T0 - 1 + H]), wanted, rtol=0, atol=1e-5
        )


@KINDS
@torch.no_grad()
def test_a_residual_prediction_is_what_was_there_and_what_the_network_says(action):
    model, plain = transformer(action, residual=True), transformer(action)
    plain.load_state_dict(model.state_dict())
    z, actions = some(action, 4)
    torch.testing.assert_close(model(z, actions), z + plain(z, actions), rtol=0, atol=1e-6)
    fresh = WorldModelTransformer(WIDTH, GRID, action, ac(residual=True))  # at first, nothing changes
    still = z[:, 1:2].expand(-1, 3, -1, -1)
    torch.testing.assert_close(fresh.rollout(z[:, :2], actions), still, rtol=0, atol=1e-4)


@KINDS
@torch.no_grad()
def test_a_rollout_is_the_beginning_of_a_longer_one_and_depends_on_the_right_things(action):
    model, (z, actions) = transformer(action), some(action, 12)
    long = model.rollout(z[:, :6], actions)  # T0 = 6, H = 7
    for H in range(1, 7):
        torch.testing.assert_close(
            model.rollout(z[:, :6], actions[:, : 5 + H]), long[:, :H], rtol=0, atol=1e-6
        )
    torch.testing.assert_close(
        model.rollout(z[:, 2:6], actions[:, 2:]), long, rtol=0, atol=1e-6
    )  # only L = 4 steps of history count
    last = actions.clone()
    last[:, 8] = other(last)[:, 8]  # the action of step 3 ahead
    moved = (model.rollout(z[:, :6], last) - long).abs().amax((0, 2, 3))
    assert moved[:3].max() == 0 and moved[3] > 1e-4
    earlier = z[:, :6].clone()
    earlier[:, 3] += 1  # history inside the context does count
    assert (model.rollout(earlier, actions) - long).abs().max() > 1e-4


@torch.no_grad()
def test_time_is_relative_unless_the_table_is_tiled():
    z, actions = some(CONTINUOUS, 4)
    moved = {}
    for tiled in (False, True):
        model = transformer()
        model.tiled = tiled
        here, cache = model.forward_cached(z[:, :2], actions[:, :2])
        cache.steps += 50
        there = model.forward_cached(z[:, 2:], actions[:, 2:], cache=replace(cache))[0]
        late = model.forward_cached(
            z[:, :2], actions[:, :2], cache=replace(cache, blocks=cache.last(0).blocks)
        )
        moved[tiled] = (late[0] - here).abs().max().item()
        assert there.shape == (BATCH, 2, 6, WIDTH)
    assert moved[False] < 1e-5 and moved[True] > 1e-3


@KINDS
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@torch.no_grad()
def test_terms_of_the_loss_by_plain_loops(action, power):
    model, (z, actions) = transformer(action, teacher_forcing=0.7, loss_exponent=power), some(action, 7)
    error = lambda x, y: ((x - y).abs() ** power).mean() / power
    losses = model.loss(Batch(None, actions[:, :6], None, None, None, z))
    one_step = [
        normalize(model(z[:, : t + 1], actions[:, : t + 1]))[:, -1] for t in range(6)
    ]  # each with its true past alone
    forced = sum(error(p, z[:, t + 1]) for t, p in enumerate(one_step)) / 6
    rolled = (
        sum(error(p, z[:, t + 1]) for t, p in enumerate(uncached(model, z[:, :1], actions[:, :3]).unbind(1)))
        / 3
    )
    torch.testing.assert_close(losses.terms["teacher_forcing"], forced)
    torch.testing.assert_close(losses.terms["rollout"], rolled)
    torch.testing.assert_close(losses.total, 0.7 * forced + 0.3 * rolled)
    torch.testing.assert_close(
        losses.terms["ratio"], forced / error(z[:, 1:], z[:, :-1])
    )  # below 1: better than "nothing changes"
    for p in (
        one_step[0],
        model.rollout(z[:, :2], actions[:, :4]),
    ):  # what is compared and fed back is normed
        torch.testing.assert_close(p.mean(-1), torch.zeros(p.shape[:-1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(p.std(-1, correction=0), torch.ones(p.shape[:-1]), rtol=0, atol=1e-3)


def test_a_term_without_weight_is_not_computed():
    z, actions = some(CONTINUOUS, 7)
    for r, term, steps in ((1.0, "teacher_forcing", 6), (0.0, "rollout", 3)):
        model, seen = transformer(teacher_forcing=r), []
        model.predictor_proj.register_forward_hook(lambda *call, seen=seen: seen.append(call[2].shape[1]))
        assert [
            name
            for name in model.loss(Batch(None, actions[:, :6], None, None, None, z)).terms
            if name != "ratio"
        ] == [term] and sum(seen) == steps


def test_a_rollout_of_h_steps_computes_each_step_once():
    model, (z, actions) = transformer(), some(CONTINUOUS, 19)
    seen = []
    model.predictor_blocks[0].norm1.register_forward_hook(lambda module, into, out: seen.append(out.shape[1]))
    model.rollout(z[:, :3], actions[:, :18])  # T0 = 3, H = 16
    assert seen == [3 * 7] + 15 * [7]  # six patches and one action a step
    losses = len(seen)
    model.loss(Batch(None, actions[:, :6], None, None, None, z[:, :7]))
    assert seen[losses:] == [6 * 7, 7, 7]  # step one of the rollout is teacher forcing's


def test_gradients_of_the_rollout_term_run_through_its_cache():
    model, (z, actions) = transformer(teacher_forcing=0.0), some(CONTINUOUS, 4)
    z.requires_grad_(True)
    actions.requires_grad_(True)
    first = model.loss(Batch(None, actions[:, :3], None, None, None, z)).total
    loop = (uncached.__wrapped__(model, z[:, :1], actions[:, :3]) - z[:, 1:4]).abs().mean()
    for ours, plain in zip(torch.autograd.grad(first, (z, actions)), torch.autograd.grad(loop, (z, actions))):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-6)

