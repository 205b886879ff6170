"V-JEPA 2's second stage: nothing looks ahead, nothing is computed twice, and what is trained is what is said."
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.datasets import Batch, Windows, sample_dataset
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.models.base import build_model
from worldmodels_nb.training.fit import count_parameters, freeze
from worldmodels_nb.models.released import ReleasedError, load_released
from worldmodels_nb.models.action_conditioned import WorldModelTransformer, frame_mask, normalize
from worldmodels_nb.models.vjepa2 import check_actions, load_conditioned, robot_predictor
from worldmodels_nb.settings import ActionSettings, SettingsError, make_settings
from worldmodels_nb.training.fit import fit, load_weights, save_weights
from worldmodels_nb.eval.latents import cache_name, encode_dataset

DISCRETE, CONTINUOUS = ActionSpec("discrete", 3, None, None), ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])
KINDS = pytest.mark.parametrize("action", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
GRID, WIDTH, BATCH = (2, 3), 10, 3


def ac(**fields):
    return ActionSettings(**{"dim": 24, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "context_length": 4, "rollout_steps": 3, "loss_exponent": 1.0} | fields)


def transformer(action=CONTINUOUS, seed=0, kind=WorldModelTransformer, size=0.1, **fields):
    "Untrained, and with weights large enough that everything in it matters."
    torch.manual_seed(seed)
    model = kind(WIDTH, GRID, action, ac(**fields))
    with torch.no_grad():
        for p in model.parameters(): p.mul_(0.2 if p.ndim > 1 else 1).add_(size * torch.randn_like(p))
    return model.eval()


def some(action, steps, batch=BATCH, seed=0):
    rng = torch.Generator().manual_seed(seed)
    z = normalize(torch.randn(batch, steps, 6, WIDTH, generator=rng))
    return z, (torch.randint(0, 3, (batch, steps), generator=rng) if action is DISCRETE else torch.rand(batch, steps, 2, generator=rng) * 2 - 1)


def other(actions):
    return (actions + 1) % 3 if actions.dtype == torch.int64 else -actions + 0.1


@pytest.mark.parametrize("dim", [48, 1024])
def test_fresh_weights_keep_the_size_of_what_passes_through_them_at_any_width(dim):
    torch.manual_seed(0)
    layer = WorldModelTransformer(WIDTH, GRID, CONTINUOUS, ac(dim=dim, depth=1)).predictor_blocks[0].attn.qkv.weight
    assert 0.95 * 0.64 < layer.std().item() * dim ** 0.5 < 1.05 * 0.64                    # .02 at the paper's 1024


@KINDS
@pytest.mark.parametrize("steps", range(1, 7))
@torch.no_grad()
def test_later_tokens_and_actions_move_nothing_earlier(action, steps):
    model, (z, actions) = transformer(action), some(action, steps)
    before = model(z, actions)
    for t in range(steps):
        moved, done = z.clone(), actions.clone()
        moved[:, t] += 1; done[:, t] = other(done)[:, t]
        for after in (model(moved, actions), model(z, done)):
            assert torch.equal(after[:, :t], before[:, :t])                             # not one bit
            assert (after[:, t] - before[:, t]).abs().amax((1, 2)).min() > 1e-4         # and from there on it does
            if t + 1 < steps: assert (after[:, t + 1] - before[:, t + 1]).abs().max() > 1e-5


@pytest.mark.parametrize("steps", range(1, 7))
@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_reach_back_as_far_as_the_band_and_never_ahead(steps, depth):
    model, (z, actions) = transformer(depth=depth, context_length=2), some(CONTINUOUS, steps)
    z.requires_grad_(True); actions.requires_grad_(True)
    out = model(z, actions)
    for t in range(steps):
        for x in torch.autograd.grad(out[:, t].square().sum(), (z, actions), retain_graph=True):
            reached = x.flatten(2).abs().amax((0, 2)) > 0                               # (T,)
            assert reached.tolist() == [t - depth <= s <= t for s in range(steps)]      # L - 1 = 1 step further back with each block


@pytest.mark.parametrize("steps, kept, tokens, context", list(itertools.product([1, 2, 5], [0, 1, 3], [1, 3], [1, 2, 4, 9])))
def test_mask_equals_the_plain_rule(steps, kept, tokens, context):
    found = frame_mask(steps, kept, tokens, context)
    wanted = torch.tensor([[0 <= (i // tokens + kept) - j // tokens < context for j in range((kept + steps) * tokens)] for i in range(steps * tokens)])
    assert torch.equal(torch.ones_like(wanted) if found is None else found, wanted)
    assert (found is None) == bool(wanted.all())


@torch.no_grad()
def uncached(model, z, actions):
    "All steps through the network again for every step ahead."
    L, H = model.context_length, actions.shape[1] - z.shape[1] + 1
    actions, z = actions[:, max(z.shape[1] - L, 0):], z[:, -L:]
    steps = []
    for _ in range(H):
        steps.append(normalize(model(z, actions[:, :z.shape[1]]))[:, -1:])
        z = torch.cat([z, steps[-1]], 1)
    return torch.cat(steps, 1)


@KINDS
@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("depth", [1, 3])
@torch.no_grad()
def test_rollout_with_a_memory_equals_one_without(action, context, depth):
    model, (z, actions) = transformer(action, context_length=context, depth=depth, rollout_steps=1, size=0.05), some(action, context + 2 + 16)
    for T0, H in itertools.product(range(1, context + 3), (1, 2, 5, 16)):
        wanted = uncached(model, z[:, :T0], actions[:, :T0 - 1 + H])
        assert wanted.shape == (BATCH, H, 6, WIDTH)
        torch.testing.assert_close(model.rollout(z[:, :T0], actions[:, :T0 - 1 + H]), wanted, rtol=0, atol=1e-5)


@KINDS
@torch.no_grad()
def test_a_rollout_is_the_beginning_of_a_longer_one_and_depends_on_the_right_things(action):
    model, (z, actions) = transformer(action), some(action, 12)
    long = model.rollout(z[:, :6], actions)                                             # T0 = 6, H = 7
    for H in range(1, 7): torch.testing.assert_close(model.rollout(z[:, :6], actions[:, :5 + H]), long[:, :H], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.rollout(z[:, 2:6], actions[:, 2:]), long, rtol=0, atol=1e-6)   # only L = 4 steps of history count
    last = actions.clone(); last[:, 8] = other(last)[:, 8]                              # the action of step 3 ahead
    moved = (model.rollout(z[:, :6], last) - long).abs().amax((0, 2, 3))
    assert moved[:3].max() == 0 and moved[3] > 1e-4
    earlier = z[:, :6].clone(); earlier[:, 3] += 1                                      # history inside the context does count
    assert (model.rollout(earlier, actions) - long).abs().max() > 1e-4


@torch.no_grad()
def test_time_is_relative_unless_the_table_is_tiled():
    z, actions = some(CONTINUOUS, 4)
    moved = {}
    for tiled in (False, True):
        model = transformer(); model.tiled = tiled
        here, cache = model.forward_cached(z[:, :2], actions[:, :2])
        cache.steps += 50; there = model.forward_cached(z[:, 2:], actions[:, 2:], cache=replace(cache))[0]
        late = model.forward_cached(z[:, :2], actions[:, :2], cache=replace(cache, blocks=cache.last(0).blocks))
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
    one_step = [normalize(model(z[:, :t + 1], actions[:, :t + 1]))[:, -1] for t in range(6)]            # each with its true past alone
    forced = sum(error(p, z[:, t + 1]) for t, p in enumerate(one_step)) / 6
    rolled = sum(error(p, z[:, t + 1]) for t, p in enumerate(uncached(model, z[:, :1], actions[:, :3]).unbind(1))) / 3
    torch.testing.assert_close(losses.terms["teacher_forcing"], forced)
    torch.testing.assert_close(losses.terms["rollout"], rolled)
    torch.testing.assert_close(losses.total, 0.7 * forced + 0.3 * rolled)
    torch.testing.assert_close(losses.terms["ratio"], forced / error(z[:, 1:], z[:, :-1]))      # below 1: better than "nothing changes"
    for p in (one_step[0], model.rollout(z[:, :2], actions[:, :4])):                                     # what is compared and fed back is normed
        torch.testing.assert_close(p.mean(-1), torch.zeros(p.shape[:-1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(p.std(-1, correction=0), torch.ones(p.shape[:-1]), rtol=0, atol=1e-3)


def test_a_term_without_weight_is_not_computed():
    z, actions = some(CONTINUOUS, 7)
    for r, term, steps in ((1.0, "teacher_forcing", 6), (0.0, "rollout", 3)):
        model, seen = transformer(teacher_forcing=r), []
        model.predictor_proj.register_forward_hook(lambda module, into, out: seen.append(out.shape[1]))
        assert [name for name in model.loss(Batch(None, actions[:, :6], None, None, None, z)).terms if name != "ratio"] == [term] and sum(seen) == steps


def test_a_rollout_of_h_steps_computes_each_step_once():
    model, (z, actions) = transformer(), some(CONTINUOUS, 19)
    seen = []
    model.predictor_blocks[0].norm1.register_forward_hook(lambda module, into, out: seen.append(out.shape[1]))
    model.rollout(z[:, :3], actions[:, :18])                                            # T0 = 3, H = 16
    assert seen == [3 * 7] + 15 * [7]                                                   # six patches and one action a step
    losses = len(seen); model.loss(Batch(None, actions[:, :6], None, None, None, z[:, :7]))
    assert seen[losses:] == [6 * 7, 7, 7]                                               # step one of the rollout is teacher forcing's


def test_gradients_of_the_rollout_term_run_through_its_memory():
    model, (z, actions) = transformer(teacher_forcing=0.0), some(CONTINUOUS, 4)
    z.requires_grad_(True); actions.requires_grad_(True)
    first = model.loss(Batch(None, actions[:, :3], None, None, None, z)).total
    loop = (uncached.__wrapped__(model, z[:, :1], actions[:, :3]) - z[:, 1:4]).abs().mean()
    for ours, plain in zip(torch.autograd.grad(first, (z, actions)), torch.autograd.grad(loop, (z, actions))): torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-6)


def tiny(**sections):
    base = {"env": {"size": 16}, "masked": {"patch_size": 4, "dim": 24, "depth": 1, "heads": 2, "mlp_ratio": 2.0, "predictor_dim": 12, "predictor_depth": 1, "predictor_heads": 1, "frames": 2},
            "ac": {"dim": 24, "depth": 1, "heads": 2, "window": 5, "context_length": 3, "rollout_steps": 2}}
    return make_settings({s: base.get(s, {}) | sections.get(s, {}) for s in base | sections})


def frames(action, channels, stack, steps=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Batch(torch.randint(0, 256, (BATCH, stack + steps, channels, 16, 16), dtype=torch.uint8, generator=rng), some(action, steps)[1], None, None)


def world(action=CONTINUOUS, channels=3, seed=0, **sections):
    torch.manual_seed(seed)
    return build_model("vjepa2", tiny(**sections), DataSpec((channels, 16, 16), action, [], [])).fit_normalization(frames(action, channels, 1).frames.flatten(0, 1))


@pytest.mark.parametrize("action, channels, stack, tubelet", [(DISCRETE, 1, 3, 2), (CONTINUOUS, 3, 1, 1), (CONTINUOUS, 3, 1, 2), (DISCRETE, 3, 2, 4)])
@torch.no_grad()
def test_contract(action, channels, stack, tubelet):
    model = world(action, channels, model={"frame_stack": stack}, masked={"tubelet_size": tubelet, "frames": 4, "patch_size": 4, "dim": 24, "depth": 1, "heads": 2}).eval()
    batch = frames(action, channels, stack)
    z = model.encode(batch.frames)
    assert z.shape == (BATCH, 6, *model.latent_shape) and model.latent_shape == (16, 24)
    torch.testing.assert_close(normalize(z), z, rtol=0, atol=1e-4)
    clip = model.masked.preprocess(batch.frames)                                           # the same, frame by frame
    for t in range(6):
        own = [max(t + stack - tubelet + i, t) for i in range(tubelet)]
        torch.testing.assert_close(normalize(model.masked.target(clip[:, :, own])), z[:, t], rtol=0, atol=1e-5)
    changed = batch.frames.clone(); changed[:, -1] = 255 - changed[:, -1]
    later = model.encode(changed)
    torch.testing.assert_close(later[:, :-1], z[:, :-1]); assert not torch.allclose(later[:, -1], z[:, -1])
    long = model.rollout(z[:, :1], batch.actions[:, :0], batch.actions)
    assert long.shape == (BATCH, 5, *model.latent_shape) and long.isfinite().all()
    for k in range(1, 5): torch.testing.assert_close(model.rollout(z[:, :1], batch.actions[:, :0], batch.actions[:, :k]), long[:, :k], rtol=0, atol=1e-6)
    assert model.rollout(z[:, :3], batch.actions[:, :2], batch.actions[:, 2:]).shape[1] == 3
    assert not torch.allclose(model.rollout(z[:, :1], batch.actions[:, :0], other(batch.actions)), long)
    with pytest.raises(NotImplementedError, match="StateDecoder"): model.imagine(batch.frames[:, :stack], batch.actions)


def test_weights_have_one_name_each_and_the_eye_is_all_that_encoding_depends_on():
    model, batch = world().eval(), frames(CONTINUOUS, 3, 1)
    state = model.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state) and "mean_frame" not in state
    z, seen = model.encode(batch.frames), set(model.encoder_state())
    with torch.no_grad():
        for name, t in model.state_dict().items():
            old = t.clone(); t.add_(1 + torch.rand_like(t))                              # a norm's output is blind to one shift of all
            moved = not torch.allclose(model.encode(batch.frames), z, atol=1e-6)
            t.copy_(old)
            assert moved == (name in seen) or name.endswith("qkv.bias") and name in seen, name
    sizes = count_parameters(model)
    assert set(sizes) == {"masked", "predictor", "frozen"} and sizes["frozen"] == sum(p.numel() for p in model.masked.target.parameters())


def test_stages_train_what_they_name_and_stage_two_never_encodes(tmp_path):
    model = build_model("vjepa2", settings := make_settings({"masked": {"dim": 24, "depth": 1, "heads": 2, "predictor_dim": 12, "predictor_heads": 1, "patch_size": 16}, "ac": {"dim": 24, "depth": 1, "heads": 2}}), (data := sample_dataset()).spec)
    model.fit_normalization(torch.from_numpy(data.frames[:64].copy()))
    first, second = model.stages()
    assert [(s.name, s.part, s.section, s.window, s.cached) for s in (first, second)] == [("masked", model.masked, "masked", settings.vjepa2.pretrain.frames - 1, False), ("ac", model.predictor, "ac", settings.vjepa2.action.window_steps, True)]
    recipe = settings.recipe("ac").model_copy(update=dict(steps=3, batch_size=4))
    windows = Windows(data, range(len(data)), first.window)
    fit(first.part, lambda step: windows.sample(4, 0, step), recipe)
    name = cache_name(model, data, "float32")
    latents = encode_dataset(freeze(model), data, tmp_path, progress=False)
    model.requires_grad_(True); model.masked.target.requires_grad_(False)
    calls, before = [], {n: t.clone() for n, t in model.masked.state_dict().items()}
    for module in model.masked.modules(): module.register_forward_hook(lambda *_: calls.append(1))
    windows = Windows(data, range(len(data)), second.window, latents=latents)
    fit(second.part, lambda step: windows.sample(4, 0, step), recipe)
    assert not calls and all(torch.equal(t, before[n]) for n, t in model.masked.state_dict().items())
    assert cache_name(model, data, "float32") == name                                   # stage two leaves the cache right


@KINDS
def test_ten_steps_on_one_batch_lower_the_loss_and_weights_come_back(action, tmp_path):
    model, batch = world(action), frames(action, 3, 1)
    optimizer, totals = torch.optim.AdamW(model.predictor.parameters(), 3e-3), []
    for _ in range(10):
        loss = model.loss(batch)
        optimizer.zero_grad(); loss.total.backward(); optimizer.step(); model.after_step(len(totals) + 1, 10)
        totals.append(loss.total.item())
    assert totals[-1] < totals[0] and all(p.grad is None for p in model.masked.parameters())
    save_weights(model, tmp_path / "w.safetensors")
    again = world(action, seed=1)
    load_weights(again, tmp_path / "w.safetensors")
    for name in ("encode",): assert torch.equal(again.encode(batch.frames), model.encode(batch.frames))
    z = model.encode(batch.frames)
    assert torch.equal(again.rollout(z[:, :2], batch.actions[:, :1], batch.actions[:, 1:]), model.rollout(z[:, :2], batch.actions[:, :1], batch.actions[:, 1:]))


def test_frozen_but_planners_may_differentiate_by_actions():
    model, batch = freeze(world()), frames(CONTINUOUS, 3, 1)
    z, actions = model.encode(batch.frames), batch.actions.requires_grad_(True)
    model.rollout(z[:, :1], actions[:, :0], actions).sum().backward()
    assert actions.grad.abs().amax((0, 2)).min() > 0 and all(p.grad is None for p in model.parameters())


def robot(seed=0, **sizes):
    torch.manual_seed(seed)
    arm = robot_predictor(**{"width": 24, "grid": (2, 3), "dim": 36, "depth": 2, "heads": 3, "mlp_ratio": 48 / 11} | sizes)
    with torch.no_grad():
        for p in arm.parameters(): p.add_(0.1 * torch.randn_like(p))
    return arm.eval()


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
@pytest.mark.parametrize("extrinsics", [False, True])
def test_a_released_action_conditioned_file_loads(tmp_path, prefix, extrinsics):
    from worldmodels_nb.models.masked import MaskedViT
    arm, encoder = robot(extrinsics=extrinsics), MaskedViT(3, 2, 4, 24, 1, 2)
    named = lambda module, more=None: {f"{prefix}{name}": t for name, t in {**module.state_dict(), **(more or {})}.items()}
    torch.save({"encoder": named(encoder), "predictor": named(arm, {"predictor_pos_embed": torch.zeros(1, 6, 36)}), "epoch": 3}, tmp_path / "ac.pt")
    released = load_released(tmp_path / "ac.pt", heads=2)
    assert released.predictor is None and released.conditioned
    again = load_conditioned(released.conditioned, (2, 3), heads=3, extrinsics=extrinsics)
    z, told = normalize(torch.randn(2, 4, 6, 24)), [torch.randn(2, 4, n) for n in ((7, 7, 6) if extrinsics else (7, 7))]
    with torch.no_grad(): assert torch.equal(again(z, *told), arm(z, *told))
    broken = {name: t for name, t in released.conditioned.items() if name != "predictor_norm.bias"}
    with pytest.raises(ReleasedError, match="missing: predictor_norm.bias"): load_conditioned(broken, (2, 3), heads=3)


@torch.no_grad()
def test_the_robots_predictor_by_plain_loops():
    "Token by token, with the tiled turn written out: conditions turn in time only, patches in time, row and column."
    arm = robot(depth=1); block, d, p = arm.predictor_blocks[0], 12, 4
    z, a, s = normalize(torch.randn(1, 3, 6, 24)), torch.randn(1, 3, 7), torch.randn(1, 3, 7)
    def turn(x, place):
        x = x.clone()
        for axis, where in enumerate(place):
            for i in range(0, p, 2):
                first, second = x[axis * p + i].clone(), x[axis * p + i + 1].clone()
                angles = [where * 10000 ** (-(j % (p // 2)) / (p / 2)) for j in (i, i + 1)]          # the quirk: two angles for one pair
                x[axis * p + i] = first * np.cos(angles[0]) - second * np.sin(angles[0])
                x[axis * p + i + 1] = second * np.cos(angles[1]) + first * np.sin(angles[1])
        return x
    rows, positions = [], []
    for t in range(3):
        rows += [arm.action_encoder(a[0, t]), arm.state_encoder(s[0, t]), *arm.predictor_embed(z[0, t])]
        positions += [(t, 0, 0), (t, 0, 0), *[(t, r, c) for r in range(2) for c in range(3)]]
    qkv = [block.attn.qkv(block.norm1(x)).view(3, 3, d) for x in rows]                               # (query/key/value, head, d)
    out = []
    for i, x in enumerate(rows):
        heard = []
        for h in range(3):
            seen = [j for j in range(len(rows)) if positions[j][0] <= positions[i][0]]
            score = torch.stack([turn(qkv[i][0, h], positions[i]) @ turn(qkv[j][1, h], positions[j]) for j in seen]) / d ** 0.5
            heard.append(sum(w * qkv[j][2, h] for w, j in zip(score.softmax(0), seen)))
        x = x + block.attn.proj(torch.cat(heard))
        x = x + block.mlp(block.norm2(x))
        if i % 8 >= 2: out.append(arm.predictor_proj(arm.predictor_norm(x)))
    torch.testing.assert_close(arm(z, a, s), torch.stack(out).view(1, 3, 6, 24), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(arm.rollout(z, torch.cat([a, a[:, :1]], 1), torch.cat([s, s[:, :1]], 1))[:, 0], normalize(arm(z, a, s))[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("section, values, said", [
    ("ac", {"heads": 5}, "vjepa2.action.heads = 5"), ("ac", {"dim": 16, "heads": 4}, "width 6 or more"), ("ac", {"window": 4, "context_length": 8}, "vjepa2.action.context_length = 8"), ("ac", {"loss_exponent": 3.0}, "vjepa2.action.loss_exponent"),
    ("ac", {"rollout_steps": 9}, "vjepa2.action.rollout_steps = 9"), ("ac", {"teacher_forcing": 1.1}, "vjepa2.action.teacher_forcing"), ("ac", {"widow": 8}, "vjepa2.action.window_steps")])
def test_settings_that_do_not_fit_are_refused_by_name(section, values, said):
    with pytest.raises(SettingsError) as error: make_settings({section: values})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_bad_input_is_refused_in_one_sentence(tmp_path):
    model, batch = world().eval(), frames(CONTINUOUS, 3, 1)
    with pytest.raises(SettingsError, match="encode_dataset"): model.predictor.loss(batch)
    z = model.encode(batch.frames)
    with pytest.raises(ValueError, match="3 steps of history have 2 actions between them, not 3"): model.rollout(z[:, :3], batch.actions[:, :3], batch.actions)
    for action, more, word in ((CONTINUOUS, ActionSpec("continuous", 3, [-1.0] * 3, [1.0] * 3), "2 numbers"), (DISCRETE, ActionSpec("discrete", 5, None, None), "3 buttons")):
        own, others = transformer(action), transformer(more)
        check_actions(own.state_dict(), own)
        with pytest.raises(SettingsError, match=f"trained with actions of {word}.*env.id"): check_actions(own.state_dict(), others)
