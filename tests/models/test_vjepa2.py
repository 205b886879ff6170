"V-JEPA 2 as a world model: it trains in two stages, and never encodes in the second."


import numpy as np
import pytest
import torch
from action_tools import BATCH, CONTINUOUS, DISCRETE, KINDS, other, some, transformer

from worldmodels_nb.data.datasets import Batch, Windows, sample_dataset
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.eval.latents import cache_name, encode_dataset
from worldmodels_nb.models.action_conditioned import normalize
from worldmodels_nb.models.base import build_model
from worldmodels_nb.models.released import ReleasedError, load_released
from worldmodels_nb.models.vjepa2 import check_actions, load_conditioned, robot_predictor
from worldmodels_nb.settings import SettingsError, make_settings
from worldmodels_nb.training.fit import count_parameters, fit, freeze, load_weights, save_weights


def tiny(**sections):
    base = {
        "env": {"size": 16},
        "vjepa2.pretrain": {
            "patch_size": 4,
            "dim": 24,
            "depth": 1,
            "heads": 2,
            "mlp_ratio": 2.0,
            "predictor_dim": 12,
            "predictor_depth": 1,
            "predictor_heads": 1,
            "frames": 2,
        },
        "vjepa2.action": {
            "dim": 24,
            "depth": 1,
            "heads": 2,
            "window_steps": 5,
            "context_length": 3,
            "rollout_steps": 2,
        },
    }
    return make_settings({s: base.get(s, {}) | sections.get(s, {}) for s in base | sections})


def frames(action, channels, stack, steps=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randint(0, 256, (BATCH, stack + steps, channels, 16, 16), dtype=torch.uint8, generator=rng),
        some(action, steps)[1],
        None,
        None,
    )


def world(action=CONTINUOUS, channels=3, seed=0, **sections):
    torch.manual_seed(seed)
    return build_model(
        "vjepa2", tiny(**sections), DataSpec((channels, 16, 16), action, [], [])
    ).fit_normalization(frames(action, channels, 1).frames.flatten(0, 1))


@pytest.mark.parametrize(
    "action, channels, stack, tubelet",
    [(DISCRETE, 1, 3, 2), (CONTINUOUS, 3, 1, 1), (CONTINUOUS, 3, 1, 2), (DISCRETE, 3, 2, 4)],
)
@torch.no_grad()
def test_contract(action, channels, stack, tubelet):
    model = world(
        action,
        channels,
        **{
            "model": {"frame_stack": stack},
            "vjepa2.pretrain": {
                "tubelet_size": tubelet,
                "frames": 4,
                "patch_size": 4,
                "dim": 24,
                "depth": 1,
                "heads": 2,
            },
        },
    ).eval()
    batch = frames(action, channels, stack)
    z = model.encode(batch.frames)
    assert z.shape == (BATCH, 6, *model.latent_shape) and model.latent_shape == (16, 24)
    torch.testing.assert_close(normalize(z), z, rtol=0, atol=1e-4)
    clip = model.masked.preprocess(batch.frames)  # the same, frame by frame
    for t in range(6):
        own = [max(t + stack - tubelet + i, t) for i in range(tubelet)]
        torch.testing.assert_close(
            normalize(model.masked.target(clip[:, :, own])), z[:, t], rtol=0, atol=1e-5
        )
    changed = batch.frames.clone()
    changed[:, -1] = 255 - changed[:, -1]
    later = model.encode(changed)
    torch.testing.assert_close(later[:, :-1], z[:, :-1])
    assert not torch.allclose(later[:, -1], z[:, -1])
    long = model.rollout(z[:, :1], batch.actions[:, :0], batch.actions)
    assert long.shape == (BATCH, 5, *model.latent_shape) and long.isfinite().all()
    for k in range(1, 5):
        torch.testing.assert_close(
            model.rollout(z[:, :1], batch.actions[:, :0], batch.actions[:, :k]),
            long[:, :k],
            rtol=0,
            atol=1e-6,
        )
    assert model.rollout(z[:, :3], batch.actions[:, :2], batch.actions[:, 2:]).shape[1] == 3
    assert not torch.allclose(model.rollout(z[:, :1], batch.actions[:, :0], other(batch.actions)), long)
    with pytest.raises(NotImplementedError, match="StateDecoder"):
        model.imagine(batch.frames[:, :stack], batch.actions)


def test_weights_have_one_name_each_and_the_encoder_is_all_that_encoding_depends_on():
    model, batch = world().eval(), frames(CONTINUOUS, 3, 1)
    state = model.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state) and "mean_frame" not in state
    z, seen = model.encode(batch.frames), set(model.encoder_state())
    with torch.no_grad():
        for name, t in model.state_dict().items():
            old = t.clone()
            t.add_(1 + torch.rand_like(t))  # a norm's output is blind to one shift of all
            moved = not torch.allclose(model.encode(batch.frames), z, atol=1e-6)
            t.copy_(old)
            assert moved == (name in seen) or name.endswith("qkv.bias") and name in seen, name
    sizes = count_parameters(model)
    assert set(sizes) == {"masked", "predictor", "frozen"} and sizes["frozen"] == sum(
        p.numel() for p in model.masked.target.parameters()
    )


def test_stages_train_what_they_name_and_stage_two_never_encodes(tmp_path):
    model = build_model(
        "vjepa2",
        settings := make_settings(
            {
                "vjepa2.pretrain": {
                    "dim": 24,
                    "depth": 1,
                    "heads": 2,
                    "predictor_dim": 12,
                    "predictor_heads": 1,
                    "patch_size": 16,
                },
                "vjepa2.action": {"dim": 24, "depth": 1, "heads": 2},
            }
        ),
        (data := sample_dataset()).spec,
    )
    model.fit_normalization(torch.from_numpy(data.frames[:64].copy()))
    first, second = model.stages()
    assert [(s.name, s.part, s.section, s.window, s.cached) for s in (first, second)] == [
        ("pretrain", model.masked, "vjepa2.pretrain", settings.vjepa2.pretrain.frames - 1, False),
        ("action", model.predictor, "vjepa2.action", settings.vjepa2.action.window_steps, True),
    ]
    recipe = settings.recipe("vjepa2.action").model_copy(update=dict(steps=3, batch_size=4))
    windows = Windows(data, range(len(data)), first.window)
    fit(first.part, lambda step: windows.sample(4, 0, step), recipe)
    name = cache_name(model, data, "float32")
    latents = encode_dataset(freeze(model), data, tmp_path, progress=False)
    model.requires_grad_(True)
    model.masked.target.requires_grad_(False)
    calls, before = [], {n: t.clone() for n, t in model.masked.state_dict().items()}
    for module in model.masked.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    windows = Windows(data, range(len(data)), second.window, latents=latents)
    fit(second.part, lambda step: windows.sample(4, 0, step), recipe)
    assert not calls and all(torch.equal(t, before[n]) for n, t in model.masked.state_dict().items())
    assert cache_name(model, data, "float32") == name  # stage two leaves the cache right


@KINDS
def test_ten_steps_on_one_batch_lower_the_loss_and_weights_come_back(action, tmp_path):
    model, batch = world(action), frames(action, 3, 1)
    optimizer, totals = torch.optim.AdamW(model.predictor.parameters(), 3e-3), []
    for _ in range(10):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        model.after_step(len(totals) + 1, 10)
        totals.append(loss.total.item())
    assert totals[-1] < totals[0] and all(p.grad is None for p in model.masked.parameters())
    save_weights(model, tmp_path / "w.safetensors")
    again = world(action, seed=1)
    load_weights(again, tmp_path / "w.safetensors")
    assert torch.equal(again.encode(batch.frames), model.encode(batch.frames))
    z = model.encode(batch.frames)
    assert torch.equal(
        again.rollout(z[:, :2], batch.actions[:, :1], batch.actions[:, 1:]),
        model.rollout(z[:, :2], batch.actions[:, :1], batch.actions[:, 1:]),
    )


def test_frozen_but_planners_may_differentiate_by_actions():
    model, batch = freeze(world()), frames(CONTINUOUS, 3, 1)
    z, actions = model.encode(batch.frames), batch.actions.requires_grad_(True)
    model.rollout(z[:, :1], actions[:, :0], actions).sum().backward()
    assert actions.grad.abs().amax((0, 2)).min() > 0 and all(p.grad is None for p in model.parameters())


def robot(seed=0, **sizes):
    torch.manual_seed(seed)
    arm = robot_predictor(
        **{"width": 24, "grid": (2, 3), "dim": 36, "depth": 2, "heads": 3, "mlp_ratio": 48 / 11} | sizes
    )
    with torch.no_grad():
        for p in arm.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return arm.eval()


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
@pytest.mark.parametrize("extrinsics", [False, True])
def test_a_released_action_conditioned_file_loads(tmp_path, prefix, extrinsics):
    from worldmodels_nb.models.masked import MaskedViT

    arm, encoder = robot(extrinsics=extrinsics), MaskedViT(3, 2, 4, 24, 1, 2)
    named = lambda module, more=None: {
        f"{prefix}{name}": t for name, t in {**module.state_dict(), **(more or {})}.items()
    }
    torch.save(
        {
            "encoder": named(encoder),
            "predictor": named(arm, {"predictor_pos_embed": torch.zeros(1, 6, 36)}),
            "epoch": 3,
        },
        tmp_path / "ac.pt",
    )
    released = load_released(tmp_path / "ac.pt", heads=2)
    assert released.predictor is None and released.conditioned
    again = load_conditioned(released.conditioned, (2, 3), heads=3, extrinsics=extrinsics)
    z, told = (
        normalize(torch.randn(2, 4, 6, 24)),
        [torch.randn(2, 4, n) for n in ((7, 7, 6) if extrinsics else (7, 7))],
    )
    with torch.no_grad():
        assert torch.equal(again(z, *told), arm(z, *told))
    broken = {name: t for name, t in released.conditioned.items() if name != "predictor_norm.bias"}
    with pytest.raises(ReleasedError, match="missing: predictor_norm.bias"):
        load_conditioned(broken, (2, 3), heads=3)


@torch.no_grad()
def test_the_robots_predictor_by_plain_loops():
    "Token by token, with the tiled turn written out: conditions turn in time only, patches in all three."
    arm = robot(depth=1)
    block, d, p = arm.predictor_blocks[0], 12, 4
    z, a, s = normalize(torch.randn(1, 3, 6, 24)), torch.randn(1, 3, 7), torch.randn(1, 3, 7)

    def turn(x, place):
        x = x.clone()
        for axis, where in enumerate(place):
            for i in range(0, p, 2):
                first, second = x[axis * p + i].clone(), x[axis * p + i + 1].clone()
                angles = [
                    where * 10000 ** (-(j % (p // 2)) / (p / 2)) for j in (i, i + 1)
                ]  # the quirk: two angles for one pair
                x[axis * p + i] = first * np.cos(angles[0]) - second * np.sin(angles[0])
                x[axis * p + i + 1] = second * np.cos(angles[1]) + first * np.sin(angles[1])
        return x

    rows, positions = [], []
    for t in range(3):
        rows += [arm.action_encoder(a[0, t]), arm.state_encoder(s[0, t]), *arm.predictor_embed(z[0, t])]
        positions += [(t, 0, 0), (t, 0, 0), *[(t, r, c) for r in range(2) for c in range(3)]]
    qkv = [block.attn.qkv(block.norm1(x)).view(3, 3, d) for x in rows]  # (query/key/value, head, d)
    out = []
    for i, x in enumerate(rows):
        heard = []
        for h in range(3):
            seen = [j for j in range(len(rows)) if positions[j][0] <= positions[i][0]]
            score = (
                torch.stack(
                    [turn(qkv[i][0, h], positions[i]) @ turn(qkv[j][1, h], positions[j]) for j in seen]
                )
                / d**0.5
            )
            heard.append(sum(w * qkv[j][2, h] for w, j in zip(score.softmax(0), seen)))
        x = x + block.attn.proj(torch.cat(heard))
        x = x + block.mlp(block.norm2(x))
        if i % 8 >= 2:
            out.append(arm.predictor_proj(arm.predictor_norm(x)))
    torch.testing.assert_close(arm(z, a, s), torch.stack(out).view(1, 3, 6, 24), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        arm.rollout(z, torch.cat([a, a[:, :1]], 1), torch.cat([s, s[:, :1]], 1))[:, 0],
        normalize(arm(z, a, s))[:, -1],
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "section, values, said",
    [
        ("vjepa2.action", {"heads": 5}, "vjepa2.action.heads = 5"),
        ("vjepa2.action", {"dim": 16, "heads": 4}, "width 6 or more"),
        ("vjepa2.action", {"window_steps": 4, "context_length": 8}, "vjepa2.action.context_length = 8"),
        ("vjepa2.action", {"loss_exponent": 3.0}, "vjepa2.action.loss_exponent"),
        ("vjepa2.action", {"rollout_steps": 9}, "vjepa2.action.rollout_steps = 9"),
        ("vjepa2.action", {"teacher_forcing": 1.1}, "vjepa2.action.teacher_forcing"),
        ("vjepa2.action", {"widow": 8}, "vjepa2.action.window_steps"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(section, values, said):
    with pytest.raises(SettingsError) as error:
        make_settings({section: values})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_bad_input_is_refused_in_one_sentence(tmp_path):
    model, batch = world().eval(), frames(CONTINUOUS, 3, 1)
    with pytest.raises(SettingsError, match="encode_dataset"):
        model.predictor.loss(batch)
    z = model.encode(batch.frames)
    with pytest.raises(ValueError, match="3 steps of history have 2 actions between them, not 3"):
        model.rollout(z[:, :3], batch.actions[:, :3], batch.actions)
    for action, more, word in (
        (CONTINUOUS, ActionSpec("continuous", 3, [-1.0] * 3, [1.0] * 3), "2 numbers"),
        (DISCRETE, ActionSpec("discrete", 5, None, None), "3 buttons"),
    ):
        own, others = transformer(action), transformer(more)
        check_actions(own.state_dict(), own)
        with pytest.raises(SettingsError, match=f"trained with actions of {word}.*env.id"):
            check_actions(own.state_dict(), others)


@pytest.mark.parametrize("name", ["encdec", "encdec_jepa", "jepa", "vjepa2"])
@pytest.mark.parametrize("stack, own", [
    (2, {}), (3, {}), (4, {}), (4, {"frames": 1}), (2, {"frames": 4, "tubelet_size": 4})])
@torch.no_grad()
def test_every_stacked_frame_is_seen(name, stack, own):
    "What moved before is in the latent: a change of any frame of the stack changes it."
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "dim": 24, "depth": 1, "heads": 2} | own
    settings = tiny(**{"model": {"frame_stack": stack, "patch_size": 4}, "vjepa2.pretrain": sizes})
    model = build_model(name, settings, DataSpec((3, 16, 16), CONTINUOUS, [], [])).eval()
    batch = frames(CONTINUOUS, 3, stack)
    z = model.encode(batch.frames)
    for k in range(stack):
        changed = batch.frames.clone()
        changed[:, k] = 255 - changed[:, k]
        assert not torch.allclose(model.encode(changed)[:, 0], z[:, 0]), k
    if name == "vjepa2": model.masked.loss(batch)


@pytest.mark.parametrize("clip, tubelet, stack, whole", [
    (4, None, 1, (4, 1)), (4, None, 3, (6, 3)), (1, None, 4, (4, 4)), (8, 2, 4, (8, 2))])
def test_a_clip_holds_whole_tubelets(clip, tubelet, stack, whole):
    own = tiny(**{"vjepa2.pretrain": {"frames": clip, "tubelet_size": tubelet}}).vjepa2.pretrain
    assert own.clip(stack) == whole


def test_the_untrained_baseline_refuses_an_encoder_that_has_learnt():
    settings = make_settings({"vjepa2.pretrain": {"pretrained": "somewhere.pt"}})
    with pytest.raises(SettingsError, match="vjepa2.pretrain.pretrained.*run.models") as refused:
        build_model("vjepa2_untrained", settings, DataSpec((3, 64, 64), CONTINUOUS, [], []))
    assert "\n" not in str(refused.value)
