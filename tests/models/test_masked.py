"V-JEPA 2's first stage against independent forms of itself: transformers, loops, interventions."


import pytest
import torch
from masked_tools import GRID, PATCH, SIDE, TUBELET, awake, batch_of, clips, stage, two_masks
from torch.nn import functional as F

from worldmodels_nb.models.masked import MaskedPredictor, MaskedViT, gather_tokens
from worldmodels_nb.nn.masks import draw_masks
from worldmodels_nb.nn.rotary import grid_positions, rotary_tables
from worldmodels_nb.settings import SettingsError


def test_encoder_and_predictor_equal_transformers(theirs, loaded):
    clip = torch.randn(2, 4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    context, targets = two_masks()
    said = theirs(clip, context_mask=[context], target_mask=[targets])
    tokens = loaded.encoder(clip.transpose(1, 2))
    torch.testing.assert_close(tokens, said.last_hidden_state, atol=1e-5, rtol=0)
    predicted = loaded.predictor(
        gather_tokens(tokens, context), context, targets, GRID, kind=1
    )  # transformers always takes mask token 1
    torch.testing.assert_close(predicted, said.predictor_output.last_hidden_state, atol=1e-5, rtol=0)
    assert predicted.std() > 0.1 and tokens.std() > 0.1


def test_gradients_equal_those_of_transformers(theirs, loaded):
    clip = torch.randn(2, 4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    context, targets = two_masks()
    goal = torch.randn(2, 15, 48, generator=torch.Generator().manual_seed(2))
    x, y = clip.clone().requires_grad_(), clip.clone().requires_grad_()
    theirs.zero_grad()
    said = theirs(x, context_mask=[context], target_mask=[targets])
    (said.predictor_output.last_hidden_state - goal).abs().mean().backward()
    (
        loaded.predictor(
            gather_tokens(loaded.encoder(y.transpose(1, 2)), context), context, targets, GRID, kind=1
        )
        - goal
    ).abs().mean().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=0)
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert (
        loaded.encoder.patch_embed.proj.weight.grad.shape
        == wanted["encoder.embeddings.patch_embeddings.proj.weight"].shape
    )
    for ours, name in (
        (loaded.encoder.patch_embed.proj.weight, "encoder.embeddings.patch_embeddings.proj.weight"),
        (loaded.encoder.norm.bias, "encoder.layernorm.bias"),
        (loaded.encoder.blocks[1].mlp.fc1.weight, "encoder.layer.1.mlp.fc1.weight"),
        (loaded.encoder.blocks[2].attn.proj.bias, "encoder.layer.2.attention.proj.bias"),
        (loaded.predictor.predictor_embed.weight, "predictor.embeddings.predictor_embeddings.weight"),
        (loaded.predictor.predictor_proj.bias, "predictor.proj.bias"),
        (loaded.predictor.predictor_blocks[0].norm1.weight, "predictor.layer.0.norm1.weight"),
    ):
        torch.testing.assert_close(ours.grad, wanted[name], atol=1e-4, rtol=0)
    for part, kept in (
        ("encoder", loaded.encoder.blocks[0]),
        ("predictor", loaded.predictor.predictor_blocks[1]),
    ):
        i = 0 if part == "encoder" else 1
        fused = torch.cat(
            [wanted[f"{part}.layer.{i}.attention.{n}.weight"] for n in ("query", "key", "value")]
        )
        torch.testing.assert_close(kept.attn.qkv.weight.grad, fused, atol=1e-4, rtol=0)
    tokens = wanted["predictor.embeddings.mask_tokens"]
    torch.testing.assert_close(loaded.predictor.mask_tokens[1].grad, tokens[1], atol=1e-4, rtol=0)
    assert (
        all(
            g is None or (g == 0).all()
            for g in (loaded.predictor.mask_tokens[0].grad, loaded.predictor.mask_tokens[2].grad)
        )
        and tokens[1].abs().max() > 0
    )


def test_a_still_image_equals_transformers_on_one_frame(theirs, loaded):
    image = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        loaded.target.encode_images(image),
        theirs(image[:, None], skip_predictor=True).last_hidden_state,
        atol=1e-5,
        rtol=0,
    )


# --- tokens that are dropped ----------------------------------------------------------------------


def hidden_by_attention(encoder, clip, keep):
    "The whole clip through the encoder, hidden tokens present but not looked at."
    rows, grid = encoder.patch_embed.patchify(clip)
    seen = torch.zeros(rows.shape[:2], dtype=torch.bool).scatter(1, keep, True)
    x, tables = encoder.patch_embed(rows), rotary_tables(grid_positions(*grid), encoder.head_dim)
    for block in encoder.blocks:
        x = block(x, tables, mask=seen[:, None, None].expand(-1, 1, x.shape[1], -1))
    return gather_tokens(encoder.norm(x), keep)


def test_positions_are_as_precise_as_the_weights():
    encoder = awake(MaskedViT(3, TUBELET, PATCH, 48, 2, 2)).double()
    predictor = awake(MaskedPredictor(48, 24, 2, 2)).double()
    clip, (context, targets) = torch.randn(2, 3, 4, SIDE, SIDE).double(), two_masks()
    places = grid_positions(*GRID).double()
    x = encoder.patch_embed(encoder.patch_embed.patchify(clip)[0])
    for block in encoder.blocks: x = block(x, rotary_tables(places, 24))
    torch.testing.assert_close(encoder(clip), encoder.norm(x), atol=1e-13, rtol=0)
    x = seen = gather_tokens(x, context)
    x = torch.cat([predictor.predictor_embed(x), predictor.mask_tokens[0].expand(*targets.shape, -1)], 1)
    tables = rotary_tables(places[torch.cat([context, targets], 1)], 12)
    for block in predictor.predictor_blocks: x = block(x, tables)
    wanted = predictor.predictor_proj(predictor.predictor_norm(x[:, context.shape[1]:]))
    torch.testing.assert_close(predictor(seen, context, targets, GRID), wanted, atol=1e-13, rtol=0)


def test_dropping_tokens_equals_hiding_them_from_attention():
    encoder = awake(MaskedViT(3, TUBELET, PATCH, 48, 3, 2))
    clip, (keep, _) = torch.randn(2, 3, 4, SIDE, SIDE), two_masks()
    torch.testing.assert_close(
        encoder(clip, keep), hidden_by_attention(encoder, clip, keep), atol=1e-5, rtol=0
    )
    assert (
        encoder(clip, keep) - gather_tokens(encoder(clip), keep)
    ).abs().max() > 1e-2  # and is not the same as seeing all


def test_hidden_pixels_have_no_influence_on_the_context():
    encoder = awake(MaskedViT(3, TUBELET, PATCH, 48, 3, 2))
    clip, (keep, _) = torch.randn(2, 3, 4, SIDE, SIDE, requires_grad=True), two_masks()
    seen = torch.zeros(2, 32).scatter(1, keep, 1.0).view(2, 1, *GRID)
    for axis, size in ((2, TUBELET), (3, PATCH), (4, PATCH)):
        seen = seen.repeat_interleave(size, axis)  # (2, 1, 4, 16, 16)
    said = encoder(clip, keep)
    changed = encoder(torch.where(seen.bool(), clip, 1e3 * torch.randn(clip.shape)), keep)
    assert torch.equal(said, changed)
    said.square().sum().backward()
    assert (clip.grad * (1 - seen) == 0).all() and (
        clip.grad.abs().sum(1, keepdim=True)[seen.bool()] > 0
    ).all()


@pytest.mark.parametrize("predictor", ["transformer", "mlp"])
def test_hidden_pixels_reach_the_loss_only_through_the_target(predictor):
    model = stage(predictor=predictor)
    awake(model.encoder)
    awake(model.predictor)
    frames = clips()

    def predictions(frames):
        rows, grid = model.encoder.patch_embed.patchify(model.preprocess(frames))
        context, targets = draw_masks(model.settings, 6, grid, torch.Generator().manual_seed(0))[0]
        return model.predictor(model.encoder.encode(rows, grid, context), context, targets, grid, 0), context

    before, context = predictions(frames)
    seen = torch.zeros(6, 32, dtype=torch.bool).scatter(1, context, True).view(6, 2, 1, 4, 4)
    for axis, size in ((1, TUBELET), (3, PATCH), (4, PATCH)):
        seen = seen.repeat_interleave(size, axis)
    after, _ = predictions(torch.where(seen, frames, 255 - frames))
    assert torch.equal(before, after)
    assert not torch.equal(before, predictions(255 - frames)[0])


def test_the_order_of_tokens_makes_no_difference_to_the_predictor():
    predictor = awake(MaskedPredictor(48, 24, 2, 2, 2))
    context, targets = two_masks()
    x, shuffle = torch.randn(2, 12, 48), torch.randperm(12)
    torch.testing.assert_close(
        predictor(x[:, shuffle], context[:, shuffle], targets, GRID),
        predictor(x, context, targets, GRID),
        atol=1e-5,
        rtol=0,
    )


def test_mask_tokens_begin_at_zero_and_are_cycled_by_kind():
    predictor = MaskedPredictor(48, 24, 1, 2, mask_tokens=3)
    assert all((token == 0).all() and token.shape == (1, 1, 24) for token in predictor.mask_tokens)
    awake(predictor)
    context, targets = two_masks()
    x = torch.randn(2, 12, 48)
    said = [predictor(x, context, targets, GRID, kind) for kind in range(4)]
    assert (
        torch.equal(said[0], said[3])
        and not torch.allclose(said[0], said[1])
        and not torch.allclose(said[1], said[2])
    )


def test_tubelets_through_one_matrix_equal_the_convolution():
    encoder = MaskedViT(3, TUBELET, PATCH, 48, 1, 2)
    clip = torch.randn(2, 3, 4, SIDE, SIDE)
    rows, grid = encoder.patch_embed.patchify(clip)
    assert grid == GRID
    torch.testing.assert_close(
        encoder.patch_embed(rows),
        encoder.patch_embed.proj(clip).flatten(2).transpose(1, 2),
        atol=1e-5,
        rtol=0,
    )


def test_an_image_is_a_clip_of_one_frame_repeated():
    encoder = awake(MaskedViT(3, TUBELET, PATCH, 48, 2, 2))
    image = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(encoder.encode_images(image), encoder(image[:, :, None].repeat(1, 1, TUBELET, 1, 1)))


# --- the objective --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "masked",
    [{}, {"masking": "random", "ratio": 0.5}, {"masking": "tubes", "ratio": 0.5}],
    ids=["blocks", "random", "tubes"],
)
def test_loss_is_what_plain_loops_say(masked):
    model = stage(**masked)
    awake(model)
    frames = clips()
    torch.manual_seed(11)
    found = model.loss(batch_of(frames))
    torch.manual_seed(11)
    masks = draw_masks(model.settings, 6, GRID, torch.Generator().manual_seed(int(torch.randint(2**62, ()))))
    kinds = []
    with torch.no_grad():
        for kind, (context, targets) in enumerate(masks):
            errors = []
            for b in range(6):
                clip = ((frames[b : b + 1] / 255 - model.mean_frame) / model.frame_scale).transpose(1, 2)
                y = model.target(clip)[0]
                said = model.predictor(
                    model.encoder(clip, context[b : b + 1]),
                    context[b : b + 1],
                    targets[b : b + 1],
                    GRID,
                    kind,
                )[0]
                for n, token in enumerate(targets[b]):
                    centred = (y[token] - y[token].mean()) / (y[token].var(correction=0) + 1e-5).sqrt()
                    errors.append(sum(abs(said[n, d] - centred[d]).item() for d in range(48)) / 48)
            kinds.append(sum(errors) / len(errors))
    assert (
        found.total.item()
        == pytest.approx(sum(kinds) / len(kinds), rel=1e-5)
        == pytest.approx(found.terms["prediction"].item(), rel=1e-5)
    )


def test_in_evaluation_the_total_is_the_error_over_that_of_the_best_constant():
    model, frames = stage(masking="random"), clips()
    awake(model)
    torch.manual_seed(3)
    trained = model.loss(batch_of(frames))
    torch.manual_seed(3)
    judged = model.eval().loss(batch_of(frames))
    rows, grid = model.target.patch_embed.patchify(model.preprocess(frames))
    y = F.layer_norm(model.target.encode(rows, grid), (48,))
    torch.manual_seed(3)
    ((context, targets),) = draw_masks(
        model.settings, 6, grid, torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    )
    floor = (
        sum((y[b, n] - y[:, n].sort(0).values[2]).abs().mean().item() for b in range(6) for n in targets[b])
        / targets.numel()
    )
    assert (
        judged.total.item()
        == pytest.approx(trained.total.item() / floor, rel=1e-4)
        == pytest.approx(1 - judged.terms["skill"].item(), rel=1e-4)
    )
    every = torch.linspace(-3, 3, 601)[:, None]  # no constant does better than the median
    best = (y[:, 5, 0][None] - every).abs().mean(1).min()
    assert (y[:, 5, 0] - y[:, 5, 0].sort().values[2]).abs().mean() <= best + 1e-3
    for p in model.target.parameters():
        p.data.zero_()  # a collapsed target is no success
    assert model.loss(batch_of(frames)).total > 100


def test_no_gradient_reaches_the_target_encoder():
    model = stage()
    model.loss(batch_of(clips())).total.backward()
    assert all(p.grad is None for p in model.target.parameters()) and not any(
        p.requires_grad for p in model.target.parameters()
    )
    assert all(p.grad is not None for p in model.encoder.parameters()) and all(
        p.grad is not None for p in model.predictor.parameters()
    )


def test_the_slow_copy_follows_a_ramp():
    model = stage(ema_start=0.9, ema_end=1.0)
    assert all(
        torch.equal(slow, fast) for slow, fast in zip(model.target.parameters(), model.encoder.parameters())
    )
    for step in (1, 5, 10):
        slow, fast = [
            [p.detach().clone() for p in m.parameters()] for m in (model.target, awake(model.encoder, step))
        ]
        model.after_step(step, 10)
        m = 0.9 + 0.1 * (step - 1) / 10                 # the first step keeps ema_start
        for now, s, f in zip(model.target.parameters(), slow, fast):
            torch.testing.assert_close(now, m * s + (1 - m) * f)
    model = stage(ema_start=1.0)
    last = [p.detach().clone() for p in model.target.parameters()]
    awake(model.encoder, 99)
    model.after_step(1, 10)
    assert all(
        torch.equal(a, b) for a, b in zip(last, model.target.parameters())
    )  # a decay of 1 stands still


@pytest.mark.parametrize("predictor", ["transformer", "mlp"])
@pytest.mark.parametrize("masking", ["blocks", "random", "tubes"])
def test_ten_steps_lower_the_loss(predictor, masking):
    model, batch = stage(predictor=predictor, masking=masking, ratio=0.5), batch_of(clips(batch=16))
    model.fit_normalization(batch.frames.flatten(0, 1))
    optimizer, losses = torch.optim.AdamW(model.parameters(), 6e-3), []
    for step in range(10):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        model.after_step(step + 1, 10)
        losses.append(loss.total.item())
    assert max(losses[-2:]) < 0.9 * min(losses[:2]), losses


@pytest.mark.parametrize("predictor", ["transformer", "mlp"])
def test_half_precision_comes_close(predictor):
    model, batch = stage(predictor=predictor), batch_of(clips())
    awake(model, scale=1.0)
    totals = []
    for half in (False, True):
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.loss(batch)
        assert loss.total.dtype == torch.float32
        loss.total.backward()
        totals.append(loss.total.item())
    assert totals[1] == pytest.approx(totals[0], rel=0.02) and totals[0] != totals[1]
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())


def test_masks_can_be_taken_up_where_they_were_left():
    model, batch = stage(), batch_of(clips())
    torch.manual_seed(5)
    model.loss(batch)
    state = torch.get_rng_state()
    after = [model.loss(batch).total.item() for _ in range(3)]
    torch.set_rng_state(state)
    assert [model.loss(batch).total.item() for _ in range(3)] == after and len(set(after)) == 3


def test_training_taken_up_half_way_ends_bit_for_bit_the_same(tmp_path):
    from worldmodels_nb.settings import TrainingSettings
    from worldmodels_nb.training.parts import train

    class Clips:
        def __len__(self):
            return 12

        def batch(self, indices):
            return batch_of(clips(batch=12)[torch.as_tensor(indices)])

        def sample(self, size, seed, step):
            return self.batch(
                torch.randint(12, (size,), generator=torch.Generator().manual_seed(1000 * seed + step))
            )

    recipe = TrainingSettings(
        steps=6, batch_size=4, validate_every=3, validation_batches=1, checkpoint_every=3, picture_every=0
    )

    class Cut(Exception):
        pass

    def run(name, stop=None):
        model = stage(seed=1)
        if stop:
            plain = model.after_step

            def breaking(step, steps):
                plain(step, steps)
                if step == stop:
                    raise Cut

            model.after_step = breaking
        try:
            train(model, Clips(), Clips(), recipe, tmp_path / name, seed=0)
        except Cut:
            return None
        return model

    whole = run("whole")
    run("parts", stop=5)
    resumed = run("parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_only_the_last_frames_of_a_longer_window_count():
    model, frames = stage(), clips(frames=7)
    torch.manual_seed(0)
    long = model.loss(batch_of(frames)).total
    torch.manual_seed(0)
    short = model.loss(batch_of(frames[:, -4:])).total
    assert torch.equal(long, short)


@pytest.mark.parametrize("predictor", ["transformer", "mlp"])
def test_error_map_predicts_every_token_once_and_from_others_only(predictor):
    model = stage(predictor=predictor)
    awake(model)
    frames = clips()
    errors = model.error_map(frames)
    assert errors.shape == (6, *GRID) and errors.isfinite().all() and (errors > 0).all()
    assert torch.equal(errors, model.error_map(frames)) and not torch.equal(
        errors, model.error_map(frames, seed=1)
    )
    before = torch.get_rng_state()
    model.error_map(frames)
    assert torch.equal(before, torch.get_rng_state())


# --- preprocessing --------------------------------------------------------------------------------


def test_preprocessing_leaves_no_trace_of_what_never_changes():
    model, frames = stage(), clips(batch=8)
    model.fit_normalization(frames.flatten(0, 1))
    x = model.preprocess(frames)
    assert x.shape == (8, 3, 4, SIDE, SIDE) and x.std().item() == pytest.approx(1, abs=0.01)
    moving = (frames == 255).all(2, keepdim=True).expand_as(frames).transpose(1, 2)
    assert (x[~moving] == 0).all() and (x[moving] > 1).all()  # no ghost of the square where it has been
    assert (((frames / 255 - (frames / 255).mean((0, 1))).transpose(1, 2))[~moving] != 0).any()


def test_encode_frames_is_the_target_encoder_on_each_frame_by_itself():
    model, frames = stage(), clips()
    awake(model.target)
    z = model.encode_frames(frames)
    assert z.shape == (6, 4, 16, 48)
    for t in range(4):
        torch.testing.assert_close(
            z[:, t], model.target.encode_images(model.preprocess(frames)[:, :, t]), atol=1e-5, rtol=0
        )
    changed = frames.clone()
    changed[:, 3] = 0
    assert torch.equal(model.encode_frames(changed)[:, :3], z[:, :3])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(frames=5), "vjepa2.pretrain.frames = 5 is not divisible by vjepa2.pretrain.tubelet_size = 2"),
        (dict(dim=50, heads=4), "vjepa2.pretrain.dim = 50"),
        (dict(dim=20, heads=4), "vjepa2.pretrain.heads = 4"),
        (dict(predictor_dim=8, predictor_heads=2), "vjepa2.pretrain.predictor_dim = 8"),
        (dict(blocks=[8]), "vjepa2.pretrain.blocks"),
        (dict(aspect=[2.0, 1.0]), "vjepa2.pretrain.aspect"),
        (dict(ema_start=1.0, ema_end=0.5), "vjepa2.pretrain.ema_start"),
        (dict(ratio=1.0), "vjepa2.pretrain.ratio"),
        (dict(scales=[0.15, 1.5]), "vjepa2.pretrain.scales"),
        (dict(patch_size=5), "vjepa2.pretrain.patch_size"),
        (dict(masking="random", ratio=0.999), "vjepa2.pretrain.ratio"),
        (dict(scales=[0.15, 0.99]), "vjepa2.pretrain.scales"),
        (dict(pretrained="/no/such/weights.pt"), "vjepa2.pretrain.pretrained"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence_before_training(values, words):
    with pytest.raises(ValueError) as caught:
        stage(**values)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_bad_clips_are_refused():
    model = stage()
    with pytest.raises(SettingsError, match="vjepa2.pretrain.tubelet_size.*3 frames"):
        model.loss(batch_of(clips(frames=3)))
    with pytest.raises(SettingsError, match="vjepa2.pretrain.patch_size"):
        model.encoder.patch_embed.patchify(torch.zeros(1, 3, 4, 16, 18))

