"Released V-JEPA 2 weights, from either layout: what fits is loaded, what does not is named."

import json
import math
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from masked_tools import GRID, PATCH, SIDE, TUBELET, awake, clips, stage, two_masks
from torch.nn import functional as F

from worldmodels_nb.models.masked import MaskedPredictor, MaskedViT
from worldmodels_nb.models.released import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    encoder_like,
    fill,
    load_released,
    released_path,
)
from worldmodels_nb.models.weight_files import ReleasedError, read_released

# --- released files -------------------------------------------------------------------------------


def released_file(path, seed=0, prefix="module.backbone.", drop=(), add=(), conditioned=False, suffix=".pt"):
    "A file as the reference code writes it, and the modules it holds."
    torch.manual_seed(seed)
    encoder, target = (
        awake(MaskedViT(3, TUBELET, PATCH, 48, 2, 2), seed),
        awake(MaskedViT(3, TUBELET, PATCH, 48, 2, 2), seed + 1),
    )
    predictor = awake(MaskedPredictor(48, 24, 2, 2, mask_tokens=10), seed + 2)
    named = {"encoder": encoder, "target_encoder": target, "predictor": predictor}
    held = {part: {prefix + n: t for n, t in module.state_dict().items()} for part, module in named.items()}
    held["encoder"][prefix + "pos_embed"] = torch.zeros(1, 32, 48)
    held["predictor"]["module.predictor_pos_embed"] = torch.zeros(1, 32, 24)
    if conditioned:
        held["predictor"] = {n: t for n, t in held["predictor"].items() if "mask_tokens" not in n} | {
            f"module.{n}_encoder.{p}": torch.randn(24, 7) if p == "weight" else torch.randn(24)
            for n in ("action", "state", "extrinsics")
            for p in ("weight", "bias")
        }
        del held["target_encoder"]
    for part, name in drop:
        del held[part][prefix + name]
    for part, name, t in add:
        held[part][prefix + name] = t
    held |= {"epoch": 3, "opt": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "loss": 0.5}
    file = path / f"released{suffix}"
    torch.save(held, file)
    return file, named


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "backbone."])
def test_released_layout_round_trip(tmp_path, prefix):
    file, named = released_file(tmp_path, prefix=prefix)
    got = load_released(file, heads=2, predictor_heads=2)
    assert all(got.report.values()) and set(got.report) == {"encoder", "target_encoder", "predictor"}
    clip, (context, targets) = torch.randn(2, 3, 4, SIDE, SIDE), two_masks()
    for module, part in ((got.encoder, "encoder"), (got.target, "target_encoder")):
        assert torch.equal(module(clip), named[part](clip))
    x = torch.randn(2, 12, 48)
    for kind in (0, 7):
        assert torch.equal(
            got.predictor(x, context, targets, GRID, kind),
            named["predictor"](x, context, targets, GRID, kind),
        )
    assert len(got.predictor.mask_tokens) == 10 and not got.conditioned


def test_transformers_layout_round_trip_by_folder_and_by_file(theirs, folder):
    got = load_released(folder)
    assert (
        all(got.report.values())
        and got.target is got.encoder
        and got.encoder.head_dim == 24
        and got.predictor.head_dim == 12
    )
    alone = load_released(folder / "model.safetensors")
    clip = torch.randn(1, 3, 4, SIDE, SIDE)
    assert torch.equal(alone.encoder(clip), got.encoder(clip)) and len(got.predictor.mask_tokens) == 3
    assert got.predictor.predictor_blocks[0].mlp.fc1.out_features == 72


def test_transformers_weights_in_several_files(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    got = load_released(tmp_path / "shards")
    clip = torch.randn(1, 3, 4, SIDE, SIDE)
    torch.testing.assert_close(
        got.encoder(clip),
        theirs(clip.transpose(1, 2), skip_predictor=True).last_hidden_state,
        atol=1e-5,
        rtol=0,
    )


def test_every_key_that_does_not_fit_is_reported(tmp_path):
    file, _ = released_file(
        tmp_path,
        drop=[("encoder", "norm.bias"), ("predictor", "predictor_proj.weight")],
        add=[
            ("encoder", "head.weight", torch.zeros(3)),
            ("encoder", "blocks.1.mlp.fc1.weight", torch.zeros(7, 48)),
            ("target_encoder", "cls_token", torch.zeros(1)),
        ],
    )
    with pytest.raises(ReleasedError) as caught:
        load_released(file, 2, 2)
    for name in (
        "norm.bias",
        "predictor_proj.weight",
        "head.weight",
        "blocks.1.mlp.fc1.weight is (7, 48), expected (192, 48)",
        "cls_token",
    ):
        assert name in str(caught.value)
    assert "pos_embed" not in str(caught.value)
    report = load_released(file, 2, 2, strict=False).report
    assert report["encoder"].missing == ["norm.bias"] and report["encoder"].unexpected == ["head.weight"]
    assert report["encoder"].misshaped == ["blocks.1.mlp.fc1.weight is (7, 48), expected (192, 48)"]
    assert report["predictor"].missing == ["predictor_proj.weight"] and report[
        "target_encoder"
    ].unexpected == ["cls_token"]


def test_an_incomplete_triple_of_transformers_is_reported_not_guessed(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["encoder.layer.1.attention.key.bias"]
    tensors["pooler.query"] = torch.zeros(2)
    safetensors.torch.save_file(tensors, file)
    report = load_released(folder, strict=False).report
    assert report["encoder"].missing == ["blocks.1.attn.qkv.bias"]
    assert report["encoder"].unexpected == ["blocks.1.attention.query.bias", "blocks.1.attention.value.bias"]
    assert report["other"].unexpected == ["pooler.query"] and report["predictor"]


def test_action_conditioned_predictor_is_handed_on_under_its_own_names(tmp_path):
    file, named = released_file(tmp_path, conditioned=True)
    got = load_released(file, heads=2)
    assert got.predictor is None and got.target is got.encoder
    names = {n.split(".")[0] for n in got.conditioned}
    assert names == {
        "predictor_embed",
        "predictor_blocks",
        "predictor_norm",
        "predictor_proj",
        "action_encoder",
        "state_encoder",
        "extrinsics_encoder",
        "predictor_pos_embed",
    }
    bare = torch.nn.ModuleDict(
        {n: torch.nn.Linear(7, 24) for n in ("action_encoder", "state_encoder", "extrinsics_encoder")}
    )
    fit = fill(bare, got.conditioned)
    assert (
        not fit.missing
        and not fit.misshaped
        and torch.equal(bare["state_encoder"].weight, got.conditioned["state_encoder.weight"])
    )


def test_weights_of_one_grid_work_on_another(tmp_path):
    file, _ = released_file(tmp_path)
    got = load_released(file, 2, 2)
    assert got.encoder(torch.randn(1, 3, 8, 24, 32)).shape == (1, 4 * 6 * 8, 48)
    assert got.target.encode_images(torch.randn(1, 3, 12, 20)).shape == (1, 15, 48)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        whole = released_file(tmp_path)[0].read_bytes()
    else:
        whole = safetensors.torch.save({"encoder.layer.0.norm1.weight": torch.zeros(8)})
    for content in (whole[:-40], whole[: len(whole) // 2], b"", b"not weights at all"):
        file.write_bytes(content)
        with pytest.raises(ReleasedError) as caught:
            load_released(file, 2, 2)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    for name, save in (
        ("torch", lambda o, f: torch.save(o, f)),
        ("plain", lambda o, f: f.write_bytes(pickle.dumps(o, protocol=2))),
    ):
        trace, file = tmp_path / f"trace-{name}", tmp_path / f"{name}.pt"
        save({"encoder": {"x": torch.zeros(1)}, "more": Bomb(trace)}, file)
        with pytest.raises(ReleasedError, match="not opened|not a whole file"):
            load_released(file, 2, 2)
        assert not trace.exists()


def test_other_files_are_refused_by_name(tmp_path):
    with pytest.raises(ReleasedError, match="no weights"):
        read_released(tmp_path)
    with pytest.raises(ReleasedError, match="cannot read"):
        read_released(tmp_path / "nowhere.pt")
    safetensors.torch.save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ReleasedError, match="neither"):
        read_released(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ReleasedError, match="neither"):
        read_released(tmp_path / "list.pt")
    file, _ = released_file(tmp_path)
    with pytest.raises(ReleasedError, match="give heads"):
        load_released(file)
    with pytest.raises(ReleasedError, match="give predictor_heads"):
        load_released(file, heads=2)


# --- a stage that is not trained but loaded -------------------------------------------------------


def test_pretrained_weights_take_the_place_of_the_stage(folder, loaded):
    model = stage(pretrained=str(folder), dim=96)  # sizes come from the weights
    assert model.target.dim == 48 and model.grid() == GRID
    frames = clips()
    mean, std = (torch.tensor(v).view(1, 1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = (frames / 255 - mean) / std
    torch.testing.assert_close(model.preprocess(frames), x.transpose(1, 2), atol=1e-5, rtol=0)
    model.fit_normalization(frames.flatten(0, 1))
    torch.testing.assert_close(
        model.preprocess(frames), x.transpose(1, 2), atol=1e-5, rtol=0
    )  # fitting does not undo it
    torch.testing.assert_close(
        model.encode_frames(frames)[:, 2], loaded.target.encode_images(x[:, 2]), atol=1e-5, rtol=0
    )
    assert model.error_map(frames).shape == (6, *GRID)


def test_pretrained_weights_see_grey_frames_as_grey_colours(folder):
    grey = stage(pretrained=str(folder), channels=1)
    frames = clips(channels=1)
    assert torch.equal(
        grey.encode_frames(frames),
        stage(pretrained=str(folder)).encode_frames(frames.expand(-1, -1, 3, -1, -1)),
    )


def test_a_hub_id_is_fetched_and_nothing_else(folder, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub (extra: hf) is not installed")
    asked = []
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **how: asked.append((name, how)) or str(folder)
    )
    assert (
        released_path("facebook/tiny") == folder
        and asked[0][0] == "facebook/tiny"
        and asked[0][1]["allow_patterns"] == ["*.safetensors", "*.json"]
    )
    assert released_path(str(folder)) == folder and len(asked) == 1

    def fails(name, **how):
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", fails)
    with pytest.raises(ReleasedError, match="vjepa2.pretrain.pretrained.*no network"):
        released_path("facebook/tiny")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ReleasedError, match="extra hf"):
        released_path("facebook/tiny")
    with pytest.raises(ReleasedError, match="nothing at"):
        released_path(str(tmp_path / "no" / "such" / "file.pt"))


def test_importing_and_building_opens_no_connection():
    code = (
        "import socket\ndef no(*a, **k): raise SystemExit('network')\nsocket.socket.connect = no\n"
        "import worldmodels_nb.models.released as m, sys\n"
        "assert not any(n.split('.')[0] in ('transformers', 'huggingface_hub') for n in sys.modules)\n"
        "from worldmodels_nb.data.datasets import sample_dataset\n"
        "from worldmodels_nb.settings import Settings\n"
        "m.build_pretraining(Settings(), sample_dataset().spec)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-400:]


def test_config_of_another_network_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ReleasedError, match="hidden_act"):
        load_released(folder)


# --- names of wrapped networks, of other networks, and of nobody ----------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module._orig_mod.backbone.", "_orig_mod.module.backbone.", "backbone._orig_mod."],
)
def test_compiled_networks_are_read(tmp_path, prefix):
    file, named = released_file(tmp_path, prefix=prefix)
    got = load_released(file, heads=2, predictor_heads=2)
    weights = got.target.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in named["target_encoder"].state_dict().items())


def rename(folder, how):
    file = folder / "model.safetensors"
    tensors = {how(name): t for name, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file)
    return folder


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module.vjepa2.", "vjepa2._orig_mod."])
def test_wrapped_networks_of_transformers_are_read(folder, prefix):
    before = load_released(folder).encoder.state_dict()
    after = load_released(rename(folder, lambda name: f"{prefix}{name}")).encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_compiled_block_of_transformers_is_read(folder):
    assert all(load_released(rename(folder, lambda n: n.replace("mlp.", "mlp._orig_mod."))).report.values())


@pytest.mark.parametrize("twin", ["norm.bias", "_orig_mod.norm.bias", "module.norm.bias"])
def test_a_tensor_under_two_names_is_refused(tmp_path, twin):
    file, _ = released_file(tmp_path)
    held = torch.load(file, weights_only=True)
    held["encoder"][twin] = torch.ones(48)
    torch.save(held, file)
    with pytest.raises(ReleasedError, match="norm.bias twice") as caught:
        load_released(file, 2, 2)
    assert "\n" not in str(caught.value)


# --- V-JEPA 2.1 -----------------------------------------------------------------------------------


def newer_weights(seed=0, width=48, depth=4, hidden=96, channels=3):
    "An encoder's random tensors as V-JEPA 2.1 names them, large enough for each to matter."
    sizes = {
        "patch_embed.proj.weight": (width, channels, TUBELET, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "patch_embed_img.proj.weight": (width, channels, 1, PATCH, PATCH),
        "patch_embed_img.proj.bias": (width,),
        "video_mod_embed": (1, 1, width),
        "img_mod_embed": (1, 1, width),
    }
    for i in range(depth):
        linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linear |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
        for name, size in linear.items():
            sizes |= {f"blocks.{i}.{name}.weight": size, f"blocks.{i}.{name}.bias": size[:1]}
        for name in (f"blocks.{i}.norm1", f"blocks.{i}.norm2", f"norms_block.{i}"):
            sizes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    rng = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(size, generator=rng) for name, size in sizes.items()}


def turned(x, position):
    "One head of one token (d,): neighbouring pairs, each at its own speed, a third for each axis."
    out, third = x.clone(), 2 * (len(x) // 3 // 2)
    for axis in range(3):
        for i in range(third // 2):
            a, b = (axis * third + 2 * i + k for k in (0, 1))
            angle = position[axis] / 10000 ** (2 * i / third)
            out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
            out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


def newer_encoder(w, clip, heads):
    "V-JEPA 2.1's encoder written out, for one clip (C, T, h, w)."
    def norm(x, name): return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    def linear(x, name): return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    size = w["patch_embed.proj.weight"].shape[2:]
    x = F.conv3d(clip[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=size)
    steps, rows, columns = x.shape[2:]
    x = x[0].flatten(1).T + w["video_mod_embed"][0]                            # (N, D)
    places = [
        (t, 15 * r / (rows - 1), 15 * c / (columns - 1))
        for t in range(steps) for r in range(rows) for c in range(columns)
    ]
    blocks = len({name.split(".")[1] for name in w if name.startswith("blocks.")})
    for i in range(blocks):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1)
        mixed = []
        for part in torch.arange(x.shape[1]).chunk(heads):
            asking, asked = (torch.stack([turned(row, at) for row, at in zip(side[:, part], places)])
                             for side in (q, k))
            mixed.append((asking @ asked.T / len(part) ** 0.5).softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(mixed, -1), f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(x, f"norms_block.{blocks - 1}")


def newer_file(path, weights, part="ema_encoder", prefix="module.backbone."):
    predictor = {prefix + name: torch.zeros(2) for name in ("predictor_embed.0.weight", "img_mod_embed")}
    torch.save({part: {prefix + n: t for n, t in weights.items()}, "predictor": predictor}, path)
    return path


@pytest.mark.parametrize("part", ["ema_encoder", "target_encoder", "encoder"])
def test_vjepa_2_1_encoders_are_read(tmp_path, part):
    weights = newer_weights()
    got = load_released(newer_file(tmp_path / "newer.pt", weights, part), heads=2)
    assert got.predictor is None and all(got.report.values())
    clip = torch.randn(3, 4, 12, 20, generator=torch.Generator().manual_seed(1))
    wanted = newer_encoder(weights, clip, heads=2)
    torch.testing.assert_close(got.target(clip[None])[0], wanted, atol=2e-5, rtol=0)
    double = {name: t.double() for name, t in weights.items()}
    precise = got.target.double()(clip[None].double())[0]
    torch.testing.assert_close(precise, newer_encoder(double, clip.double(), heads=2), atol=1e-6, rtol=0)


def test_vjepa_2_1_read_as_vjepa_2_would_be_wrong(tmp_path):
    weights = newer_weights()
    got = load_released(newer_file(tmp_path / "newer.pt", weights), heads=2)
    clip = torch.randn(3, 4, 12, 20, generator=torch.Generator().manual_seed(1))
    wanted = newer_encoder(weights, clip, heads=2)
    for name, older in (("tiled", True), ("span", None)):
        newer = vars(got.target)[name]
        setattr(got.target, name, older)
        assert (got.target(clip[None])[0] - wanted).abs().max() > 1e-2
        setattr(got.target, name, newer)


def test_a_masked_vjepa_2_1_encoder_sees_what_attention_to_the_visible_would(tmp_path):
    got = load_released(newer_file(tmp_path / "newer.pt", newer_weights()), heads=2)
    clip, all_tokens = torch.randn(1, 3, 4, SIDE, SIDE), torch.arange(32)[None]
    torch.testing.assert_close(got.target(clip, all_tokens), got.target(clip), atol=1e-5, rtol=0)
    one = load_released(newer_file(tmp_path / "newer.pt", newer_weights()), heads=2).encoder
    assert one(torch.randn(1, 3, 2, PATCH, PATCH)).isfinite().all()             # one row, one column


@pytest.mark.parametrize("width, heads", [(768, 12), (1024, 16), (1408, 22), (1664, 26)])
def test_heads_of_the_released_sizes_are_known(width, heads):
    weights = {name: t.to("meta") for name, t in newer_weights(width=width, depth=1).items()}
    with torch.device("meta"): assert encoder_like(weights).head_dim == width // heads


def test_vjepa_2_1_takes_the_place_of_the_stage(tmp_path):
    file = newer_file(tmp_path / "newer.pt", newer_weights(width=768, depth=1))
    model, frames = stage(pretrained=str(file)), clips()
    assert model.grid() == GRID and model.encode_frames(frames).shape == (6, 4, 16, 768)
    with pytest.raises(ValueError, match="no masked predictor"): model.error_map(frames)


NEW_NAMES = ["video_mod_embed", "norms_block.3.weight", "norms_block.3.bias", "patch_embed.proj.bias"]


@pytest.mark.parametrize("name", NEW_NAMES)
def test_an_incomplete_vjepa_2_1_encoder_is_refused_by_name(tmp_path, name):
    weights = newer_weights()
    del weights[name]
    with pytest.raises(ReleasedError, match=f"V-JEPA 2.1.*norms_block|{name} is missing") as caught:
        load_released(newer_file(tmp_path / "newer.pt", weights), heads=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["video_mod_embed", "norms_block.3.weight", "patch_embed_img.proj.weight"])
def test_a_mixture_of_both_versions_is_refused(tmp_path, name):
    file, _ = released_file(tmp_path, add=[("encoder", name, torch.zeros(1, 1, 48))])
    with pytest.raises(ReleasedError, match="weights of V-JEPA 2.1, and norms_block"):
        load_released(file, 2, 2)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 1, 7), torch.zeros(0)])
def test_a_modality_of_another_width_is_refused(tmp_path, wrong):
    weights = newer_weights() | {"video_mod_embed": wrong}
    with pytest.raises(ReleasedError, match="video_mod_embed has"):
        load_released(newer_file(tmp_path / "newer.pt", weights), heads=2)


# --- other packagings, and other networks under the same names ------------------------------------


def flattened(file, parts=("encoder", "target_encoder", "predictor")):
    held = torch.load(file, weights_only=True)
    return {f"{part}.{name}": t for part in parts for name, t in held[part].items()}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_flat_files_are_read(tmp_path, suffix):
    file, named = released_file(tmp_path)
    flat, path = flattened(file), tmp_path / f"flat{suffix}"
    if suffix == ".pt": torch.save(flat, path)
    else: safetensors.torch.save_file(flat, path)
    got = load_released(path, 2, 2)
    assert all(got.report.values()) and set(got.report) == {"encoder", "target_encoder", "predictor"}
    assert same_weights(got.encoder, named["encoder"]) and same_weights(got.target, named["target_encoder"])
    assert same_weights(got.predictor, named["predictor"])


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
def test_a_bare_encoder_is_read(tmp_path, prefix):
    _, named = released_file(tmp_path)
    bare = {prefix + name: t for name, t in named["target_encoder"].state_dict().items()}
    torch.save(bare, tmp_path / "bare.pt")
    got = load_released(tmp_path / "bare.pt", 2)
    assert got.target is got.encoder and got.predictor is None and set(got.report) == {"encoder"}
    assert same_weights(got.encoder, named["target_encoder"]) and got.report["encoder"]


def test_the_ema_encoder_is_the_target(tmp_path):
    file, named = released_file(tmp_path)
    held = torch.load(file, weights_only=True)
    held["ema_encoder"] = held.pop("target_encoder")
    torch.save(held, file)
    got = load_released(file, 2, 2)
    assert same_weights(got.target, named["target_encoder"]) and same_weights(got.encoder, named["encoder"])


def sine_cosine(width, grid):
    "The table that V-JEPA 1 adds: half of it for time, a quarter each for row and column."
    columns, widths = [], (width // 2, width // 4, width // 4)
    for axis, numbers in zip(torch.cartesian_prod(*map(torch.arange, grid)).T, widths):
        angle = axis[:, None] * 10000 ** -(torch.arange(numbers // 2) / (numbers / 2))
        columns += [angle.sin(), angle.cos()]
    return torch.cat(columns, 1)[None]


@pytest.mark.parametrize("part, name", [("encoder", "pos_embed"), ("target_encoder", "pos_embed"),
                                        ("predictor", "predictor_pos_embed")])
def test_weights_trained_with_added_positions_are_refused(tmp_path, part, name):
    file, _ = released_file(tmp_path)
    held = torch.load(file, weights_only=True)
    held[part] = {n: t for n, t in held[part].items() if not n.endswith(name)} | {name: sine_cosine(48, GRID)}
    torch.save(held, file)
    assert all(load_released(file, 2, 2).report.values())                       # V-JEPA 2's ten mask tokens
    for i in range(2, 10): del held["predictor"][f"module.backbone.mask_tokens.{i}"]
    torch.save(held, file)
    with pytest.raises(ReleasedError, match=f"{part} has a table of positions.*V-JEPA 1") as caught:
        load_released(file, 2, 2)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_an_encoder_by_itself_with_a_table_is_refused_and_without_it_read(tmp_path):
    bare = released_file(tmp_path)[1]["encoder"].state_dict()
    torch.save(bare | {"pos_embed": sine_cosine(48, GRID)}, tmp_path / "bare.pt")
    with pytest.raises(ReleasedError, match="encoder has a table of positions.*save them without it"):
        load_released(tmp_path / "bare.pt", 2)
    torch.save(bare, tmp_path / "bare.pt")
    assert all(load_released(tmp_path / "bare.pt", 2).report.values())


def test_an_action_conditioned_file_may_carry_its_unused_table(tmp_path):
    file, _ = released_file(tmp_path, conditioned=True, add=[("encoder", "pos_embed", sine_cosine(48, GRID))])
    assert load_released(file, heads=2).conditioned


# --- what loading costs ---------------------------------------------------------------------------


def test_nothing_is_initialised_to_be_overwritten(tmp_path, monkeypatch):
    file, named = released_file(tmp_path)
    plain = torch.nn.init.trunc_normal_

    def on_meta_only(tensor, *args, **how):
        assert tensor.is_meta
        return plain(tensor, *args, **how)

    monkeypatch.setattr(torch.nn.init, "trunc_normal_", on_meta_only)
    got = load_released(file, 2, 2)
    assert same_weights(got.predictor, named["predictor"])
    assert all(p.requires_grad and not p.is_meta for p in got.predictor.parameters())


def test_training_loaded_weights_leaves_the_file_as_it_is(tmp_path):
    file, _ = released_file(tmp_path)
    before, got = file.read_bytes(), load_released(file, 2, 2)
    awake(got.encoder)
    assert file.read_bytes() == before
    assert not same_weights(got.encoder, load_released(file, 2, 2).encoder)


def test_all_kinds_of_mask_share_the_released_token(folder, loaded):
    model, frames = stage(pretrained=str(folder)), clips()
    assert len(loaded.predictor.mask_tokens) == 3 and len(model.predictor.mask_tokens) == 1
    assert torch.equal(model.predictor.mask_tokens[0], loaded.predictor.mask_tokens[0])
    rows, grid = model.target.patch_embed.patchify(model.preprocess(frames))
    context, targets = two_masks(6)
    answers = [model.predict(rows, grid, context, targets, kind) for kind in (0, 1)]
    assert torch.equal(*answers)


# --- sizes that cannot be -------------------------------------------------------------------------


BLOCKS = [
    "1000000000",
    "99999999999999999999",
    "-1",
    "00",
    "01",
    "\u0663",  # an Arabic three
    "\u00b2",  # a raised two
    "1e3",
    "",
    "2_0",
    "4",  # there are two
    "9" * 5000,
]


@pytest.mark.parametrize("number", BLOCKS, ids=lambda number: ascii(number)[:25])
@pytest.mark.parametrize("layout", ["ours", "transformers"])
def test_blocks_of_odd_numbers_are_refused_at_once(tmp_path, request, number, layout):
    if layout == "ours":
        path, _ = released_file(tmp_path, add=[("encoder", f"blocks.{number}.norm1.bias", torch.zeros(48))])
    else:
        path = request.getfixturevalue("folder")
        file = path / "model.safetensors"
        more = {f"encoder.layer.{number}.norm1.bias": torch.zeros(48)}
        safetensors.torch.save_file(safetensors.torch.load_file(file) | more, file)
    with pytest.raises(ReleasedError, match="numbered from 0") as caught:
        load_released(path, 2, 2)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_thousand_blocks_are_refused_at_once(tmp_path):
    blocks = [("encoder", f"blocks.{i}.norm1.bias", torch.zeros(1)) for i in range(2, 1000)]
    file, _ = released_file(tmp_path, add=blocks)
    with pytest.raises(ReleasedError, match="255 at most"):
        load_released(file, 2, 2)


WIDE = 300_000  # of a network with 300 GB


@pytest.mark.parametrize(
    "embed, first",
    [
        ((WIDE, 1, 1, 1, 1), (1, WIDE)),
        ((WIDE, 1, 1, 1, 1), (4, 48)),
        ((48, 3, 2, 8, 8), (192, 0)),
        ((48, 3, 2, 8, 8), (192,)),
        ((48, 3, 2, 8, 8), (192, 48, 1)),
        ((48,), (192, 48)),
        ((0, 3, 2, 8, 8), (192, 0)),
        ((), (192, 48)),
    ],
)
def test_a_file_asks_for_no_more_memory_than_it_is(tmp_path, embed, first):
    file, _ = released_file(
        tmp_path,
        add=[
            ("encoder", "patch_embed.proj.weight", torch.zeros(embed)),
            ("encoder", "blocks.0.mlp.fc1.weight", torch.zeros(first)),
        ],
    )
    with pytest.raises(ReleasedError) as caught:
        load_released(file, 2, 2)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.zeros(1).expand(10**9, 48),
        lambda: torch.zeros(48, 2).to_sparse(),
        lambda: torch.zeros(48, device="meta"),
        lambda: torch.zeros(1).expand(48),
    ],
)
def test_tensors_without_numbers_of_their_own_are_refused(tmp_path, odd):
    file, _ = released_file(tmp_path, add=[("encoder", "norm.bias", odd())])
    with pytest.raises(ReleasedError, match="norm.bias has no numbers of its own"):
        load_released(file, 2, 2)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_numbers_of_another_kind_do_not_fit(tmp_path, kind):
    file, _ = released_file(tmp_path, add=[("encoder", "norm.bias", torch.zeros(48, dtype=kind))])
    with pytest.raises(ReleasedError, match="misshaped: norm.bias"):
        load_released(file, 2, 2)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_read(tmp_path, half):
    file, _ = released_file(tmp_path)
    held = torch.load(file, weights_only=True)
    for part in ("encoder", "target_encoder", "predictor"):
        held[part] = {name: t.to(half) for name, t in held[part].items()}
    torch.save(held, file)
    got = load_released(file, 2, 2)
    kinds = {t.dtype for t in got.encoder.state_dict().values()}
    assert all(got.report.values()) and kinds == {torch.float32}


@pytest.mark.parametrize("odd", [{5: torch.zeros(2)}, {"epoch": 3}, {("a",): torch.zeros(1)}, {"x": [1]}])
def test_what_is_no_named_tensor_is_left_out(tmp_path, odd):
    file, _ = released_file(tmp_path)
    held = torch.load(file, weights_only=True)
    held["encoder"] |= odd
    torch.save(held | odd, file)
    assert all(load_released(file, 2, 2).report.values())


# --- files that are damaged, and folders that are not there ---------------------------------------


def test_a_number_that_changed_on_the_disk_is_noticed(tmp_path):
    file, named = released_file(tmp_path)
    content = file.read_bytes()
    bits = named["encoder"].state_dict()["norm.weight"].numpy().tobytes()
    file.write_bytes(content.replace(bits, bits[:7] + bytes([bits[7] ^ 1]) + bits[8:]))
    with pytest.raises(ReleasedError, match="checksum") as caught:
        load_released(file, 2, 2)
    assert "\n" not in str(caught.value)


CONFIGS = {
    "not utf-8": b'{"hidden_act": "\xff"}',
    "utf-16": '{"hidden_act": "gelu"}'.encode("utf-16"),
    "cut": b'{"hidden_act": "ge',
    "a list": b"[1]",
    "deep": b"[" * 10**5 + b"]" * 10**5,
    "5,000 digits": b'{"num_attention_heads": ' + b"9" * 5000 + b"}",
    "nan": b'{"layer_norm_eps": NaN}',
    "heads a word": b'{"num_attention_heads": "2"}',
    "no heads": b'{"num_attention_heads": -2}',
    "many heads": b'{"num_attention_heads": 1000000000}',
    "heads that do not divide": b'{"num_attention_heads": 5}',
    "heads true": b'{"num_attention_heads": true}',
    "heads a list": b'{"num_attention_heads": [2]}',
    "act a dict": b'{"hidden_act": {"a": 1}}',
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_damaged_config_is_one_sentence(folder, kind):
    (folder / "config.json").write_bytes(CONFIGS[kind])
    with pytest.raises(ReleasedError, match="config.json") as caught:
        load_released(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("heads", [0.5, "2", -1, 7, 48, 10**12, True])
def test_heads_that_cannot_be_are_refused(tmp_path, heads):
    file, _ = released_file(tmp_path)
    with pytest.raises(ReleasedError, match="attention heads") as caught:
        load_released(file, heads, 2)
    assert "\n" not in str(caught.value)


def test_files_of_one_folder_that_hold_the_same_name_are_refused(folder):
    twin = {"encoder.layernorm.weight": torch.ones(48)}
    for name in ("a", "b", "other"):
        safetensors.torch.save_file(twin, folder / f"{name}.safetensors")
        with pytest.raises(ReleasedError, match="both hold 'encoder.layernorm.weight'"):
            load_released(folder)


def test_one_of_several_files_says_what_is_missing(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    first, *_ = sorted((tmp_path / "shards").glob("*.safetensors"))
    with pytest.raises(ReleasedError):
        load_released(first)
    first.unlink()
    with pytest.raises(ReleasedError):
        load_released(tmp_path / "shards")


PATHS = [
    "./facebook/vjepa2",
    "../facebook/vjepa2",
    "~/facebook/vjepa2",
    "/facebook/vjepa2",
    "facebook/vjepa2/",
    "facebook//vjepa2",
    "facebook\\vjepa2",
    "C:\\weights\\vjepa2",
    "a/b/c",
    "vjepa2",
    "weights/vjepa2",
    "Models/vjepa2",
    "data/vjepa2",
    "nbs/vjepa2",
    "facebook/vjepa2.pt",
    "facebook/model.safetensors",
    "facebook/ vjepa2",
    "facebook/..",
    ".hidden/vjepa2",
    "https://huggingface.co/facebook/vjepa2",
    "facebook/vjepa2\n",
    "fäcebook/vjepa2",
    "~nobody-here/vjepa2",
    "x" * 5000 + "/y",
]


@pytest.mark.parametrize("name", PATHS, ids=lambda name: ascii(name)[:30])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(monkeypatch, tmp_path, name):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub (extra: hf) is not installed")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **how: pytest.fail("asked the hub"))
    with pytest.raises(ValueError) as caught:
        released_path(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["facebook/vjepa2-vitl-fpc64-256", "me/my_vjepa.v2", "Org-1/x"])
def test_a_plain_hub_id_is_asked_of_the_hub_once(monkeypatch, tmp_path, name):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub (extra: hf) is not installed")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **how: asked.append(name) or str(tmp_path))
    assert released_path(name) == tmp_path and asked == [name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name.partition("/")[0]).mkdir()
    with pytest.raises(ReleasedError, match="nothing at"):
        released_path(name)
    assert asked == [name]


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), ConnectionError("no"), KeyError("x"), EOFError()])
def test_whatever_the_hub_raises_is_one_sentence(monkeypatch, error):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub (extra: hf) is not installed")

    def fails(*args, **how):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fails)
    with pytest.raises(ReleasedError, match="cannot be fetched") as caught:
        released_path("facebook/tiny")
    assert "\n" not in str(caught.value)


def test_a_home_is_expanded(monkeypatch, folder):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert released_path(f"~/{folder.name}") == folder
