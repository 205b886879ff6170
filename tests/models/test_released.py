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
