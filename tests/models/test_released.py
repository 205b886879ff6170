"Released V-JEPA 2 weights, from either layout: what fits is loaded, what does not is named."

import json
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from masked_tools import GRID, PATCH, SIDE, TUBELET, awake, clips, stage, two_masks

from worldmodels_nb.models.masked import MaskedPredictor, MaskedViT
from worldmodels_nb.models.released import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ReleasedError,
    fill,
    load_released,
    read_released,
    released_path,
)

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


NEW_NAMES = ["video_mod_embed", "img_mod_embed", "norms_block.3.weight", "patch_embed_img.proj.weight"]


@pytest.mark.parametrize("name", NEW_NAMES)
@pytest.mark.parametrize("part", ["target_encoder", "ema_encoder", "encoder"])
def test_vjepa_2_1_is_named(tmp_path, name, part):
    file, _ = released_file(tmp_path)
    held = torch.load(file, weights_only=True)
    held[part] = {f"module.backbone.{name}": torch.zeros(1, 1, 48)} | held.get(part, held["encoder"])
    torch.save(held, file)
    with pytest.raises(ReleasedError, match="these are V-JEPA 2.1 weights") as caught:
        load_released(file, 2, 2)
    assert str(file) in str(caught.value) and "facebook/vjepa2" in str(caught.value)


@pytest.mark.parametrize("name", ["encoder.video_mod_embed", "encoder.norms_block.0.bias", "img_mod_embed"])
def test_vjepa_2_1_is_named_in_other_peoples_packaging_too(folder, name):
    file = folder / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | {name: torch.zeros(3)}, file)
    with pytest.raises(ReleasedError, match="these are V-JEPA 2.1 weights"):
        load_released(folder)


def test_the_distilled_encoders_of_2_1_are_known_by_their_part(tmp_path):
    torch.save({"ema_encoder": {"blocks.0.norm1.weight": torch.zeros(3)}}, tmp_path / "vjepa2_1_vitb.pt")
    with pytest.raises(ReleasedError, match="these are V-JEPA 2.1 weights"):
        load_released(tmp_path / "vjepa2_1_vitb.pt")


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
