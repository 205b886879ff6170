"What others have gathered is taken in as it is, or refused; films and joined datasets are whole."
import io
import json

import numpy as np
import pytest
from PIL import Image

from worldmodels_nb.data.datasets import open_dataset, sample_dataset, verify
from worldmodels_nb.data.episodes import DatasetError
from worldmodels_nb.data.exchange import (
    SHIFTED,
    as_foreign,
    export_film,
    import_dataset,
    merge_datasets,
    motion_explained,
    preview_episodes,
    summarize,
)
from worldmodels_nb.data.foreign import check_steps, leads, open_hdf5, split_rows
from worldmodels_nb.data.lerobot import open_lerobot

h5py = pytest.importorskip("h5py")
N = 10  # rows: two episodes of five


def table(path, drop=(), **more):
    "An HDF5 file in stable-worldmodel's columns."
    rng = np.random.default_rng(0)
    actions, rewards = rng.normal(size=(N, 2)).astype(np.float32), np.arange(N, dtype=np.float32)
    actions[[4, 9]], rewards[[0, 5]] = np.nan, np.nan
    ends = np.arange(N) == 9
    columns = dict(pixels=rng.integers(0, 255, (N, 12, 12, 3), np.uint8), action=actions, reward=rewards,
                   terminated=ends, ep_len=np.int32([5, 5]), ep_offset=np.int64([0, 5]))
    with h5py.File(path, "w") as file:
        for name, values in (columns | more).items():
            if name not in drop: file[name] = values
    return path


def test_rows_of_pictures_become_steps_between_them(tmp_path, left_in):
    source = table(tmp_path / "t.h5")
    data = import_dataset(open_hdf5(source), tmp_path / "set")
    with h5py.File(source) as file: pixels, actions = file["pixels"][()], file["action"][()]
    assert np.array_equal(data.frames, np.moveaxis(pixels, -1, 1)) and data.lengths.tolist() == [4, 4]
    first, second = data.episode(0), data.episode(1)
    assert np.array_equal(first.actions, actions[:4]) and np.array_equal(second.actions, actions[5:9])
    assert first.rewards.tolist() == [1, 2, 3, 4] and second.rewards.tolist() == [6, 7, 8, 9]
    assert (first.terminated, second.terminated) == (False, True)
    assert verify(data.folder).hash == data.hash and left_in(tmp_path) == ["set", "t.h5"]
    assert data.info["settings"]["imported"]["format"] == "hdf5"


def test_actions_that_came_with_their_picture(tmp_path):
    late = np.arange(N, dtype=np.float32)
    late[[0, 5]] = np.nan
    opened = open_hdf5(table(tmp_path / "t.h5", action=late))
    assert opened.episode(1, 12, False).actions.tolist() == [[6], [7], [8], [9]]
    assert "A row's action led to its own row, as NaN shows." in opened.notes
    with pytest.raises(DatasetError, match="NaN shows"): open_hdf5(tmp_path / "t.h5", actions_lead=True)


def test_where_nothing_tells_a_row_leads_to_the_next_and_that_is_said(tmp_path):
    plain = dict(action=np.arange(N) % 3, reward=np.arange(N, dtype=np.float32))
    opened = open_hdf5(table(tmp_path / "t.h5", **plain))
    episode = opened.episode(0, 12, False)
    assert episode.actions.tolist() == [0, 1, 2, 0] and episode.rewards.tolist() == [0, 1, 2, 3]
    assert opened.action.n == 3 and sum("as is usual" in note for note in opened.notes) == 2
    said = open_hdf5(tmp_path / "t.h5", rewards_lead=False).episode(0, 12, False)
    assert said.rewards.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["grey", "first", "float"])
def test_pictures_in_other_orders_and_types(tmp_path, kind):
    pixels = np.random.default_rng(1).integers(0, 255, (N, 12, 12, 3), np.uint8)
    stored = dict(grey=pixels[..., 0], first=np.moveaxis(pixels, -1, 1), float=pixels / 255)[kind]
    frames = open_hdf5(table(tmp_path / "t.h5", pixels=stored)).episode(0, 12, kind == "grey").frames
    wanted = pixels[:5, None, ..., 0] if kind == "grey" else np.moveaxis(pixels[:5], -1, 1)
    assert np.array_equal(frames, wanted)


def test_other_names_other_ways_to_tell_episodes_apart_and_a_state(tmp_path):
    numbers = np.repeat([7, 8], 5)
    path = table(tmp_path / "t.h5", drop=("ep_len", "ep_offset", "action"), episode_idx=numbers,
                 step_idx=np.tile(np.arange(5), 2), move=np.zeros(N, int), body=np.ones((N, 3)))
    opened = open_hdf5(path, dict(action="move", state="body"))
    data = import_dataset(opened, tmp_path / "set", size=8, color="grey")
    assert data.spec.frame_shape == (1, 8, 8) and data.spec.state_names == ["body 0", "body 1", "body 2"]
    assert len(data) == 2 and data.states.min() == 1


BAD = {
    "no column 'pixels'": dict(drop=("pixels",)),
    "there is no column 'episode_idx'": dict(drop=("ep_len", "ep_offset")),
    "do not cut 10 rows": dict(ep_len=np.int32([5, 6])),
    "is called step": dict(step_idx=np.r_[np.arange(5), 0, 1, 2, 4, 5]),
    "and there are 10 pictures": dict(reward=np.zeros(9)),
    "where a number is needed": dict(action=np.where(np.arange(N) == 2, np.nan, 1.)),
    "and goes on": dict(terminated=np.arange(N) == 2),
    "for a picture": dict(pixels=np.zeros((N, 2, 3, 12, 12), np.uint8)),
    "values from": dict(pixels=np.full((N, 12, 12, 3), -5.)),
    "one whole number or one vector": dict(action=np.zeros((N, 2), int)),
}


@pytest.mark.parametrize("why", BAD)
def test_what_does_not_fit_is_one_sentence_and_leaves_nothing(tmp_path, left_in, why):
    source = table(tmp_path / "t.h5", **BAD[why])
    with pytest.raises(DatasetError, match=why) as caught:
        import_dataset(open_hdf5(source), tmp_path / "set")
    assert "t.h5" in str(caught.value) or "picture" in str(caught.value)
    assert "\n" not in str(caught.value) and left_in(tmp_path) == ["t.h5"]


def test_no_table_and_no_file(tmp_path):
    (tmp_path / "t.h5").write_text("words")
    for name, why in (("t.h5", "cannot be read"), ("gone.h5", "no such file")):
        with pytest.raises(DatasetError, match=why): open_hdf5(tmp_path / name)
    with pytest.raises(DatasetError, match="nearest known one is 'pixels'"):
        open_hdf5(table(tmp_path / "u.h5"), dict(pixel="pixels"))


def test_columns_that_lead_out_of_the_file_are_not_followed(tmp_path):
    other = table(tmp_path / "other.h5")
    for name in ("link", "virtual"):
        with h5py.File(table(tmp_path / f"{name}.h5", drop=("pixels",)), "r+") as file:
            if name == "link": file["pixels"] = h5py.ExternalLink(str(other), "/pixels")
            else:
                layout = h5py.VirtualLayout((N, 12, 12, 3), np.uint8)
                layout[:] = h5py.VirtualSource(str(other), "pixels", (N, 12, 12, 3))
                file.create_virtual_dataset("pixels", layout)
        with pytest.raises(DatasetError, match="column|another file"): open_hdf5(tmp_path / f"{name}.h5")


def test_small_parts():
    starts, lengths = np.array([0, 3]), np.array([3, 3])
    assert leads(np.zeros(6), starts, lengths) is None and leads(np.zeros(6, int), starts, lengths) is None
    assert split_rows(np.array([4, 4, 2])).tolist() == [2, 1]
    with pytest.raises(DatasetError, match="comes back"): split_rows(np.array([1, 2, 1]))
    check_steps(np.array([1, 2, 1, 2, 3]), np.array([2, 3]))


def test_a_shift_by_a_step_is_seen(tmp_path):
    data = sample_dataset()
    after, before = motion_explained(as_foreign(data))
    assert after > .8 and after > before + .1
    shifted = np.concatenate([np.roll(data.actions, 1, 0)])
    source = table(tmp_path / "t.h5", pixels=np.moveaxis(data.frames, 1, -1), action=shifted,
                   ep_len=data.lengths + 1, ep_offset=data.starts, drop=("reward", "terminated"))
    assert SHIFTED in summarize(open_hdf5(source))["alignment"]
    assert SHIFTED not in summarize(as_foreign(data))["alignment"]
    assert preview_episodes(as_foreign(data))._repr_png_()[:4] == b"\x89PNG"


# LeRobot

CAMERA = "observation.images.top"


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return dict(bytes=buffer.getvalue(), path=None)


def smooth(n, seed=0):
    "Pictures that a video hardly changes."
    base = np.linspace(0, 200, 32)[None, :, None, None] + np.zeros((n, 1, 32, 3))
    return (base + 5 * np.arange(n)[:, None, None, None]).clip(0, 255).astype(np.uint8)


def film(path, pictures, fps):
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 32, 32, "yuv420p", 10**7
        for picture in pictures: container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def lerobot(folder, version, video, lengths=(5, 4), **info):
    "A small dataset as LeRobot lays it out; its pictures."
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures, fps = [smooth(n) for n in lengths], 10
    about = dict(codebase_version=version, fps=fps, total_frames=sum(lengths), chunks_size=1000,
                 features={CAMERA: dict(dtype="video" if video else "image")}) | info
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(about))
    rows = []
    for e, n in enumerate(lengths):
        new = {"action": [[float(e), float(t)] for t in range(n)], "episode_index": [e] * n,
               "frame_index": list(range(n)), "next.reward": [float(t) for t in range(n)]}
        rows.append(new if video else new | {CAMERA: list(map(png, pictures[e]))})
    v3 = version.startswith("v3")
    joined = [{key: sum((row[key] for row in rows), []) for key in rows[0]}] if v3 else rows
    for k, table in enumerate(joined):
        path = folder / "data" / "chunk-000" / (f"file-{k:03d}" if v3 else f"episode_{k:06d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), f"{path}.parquet")
    if not video: return pictures
    if not v3:
        place = folder / "videos/chunk-000" / CAMERA
        for e, own in enumerate(pictures): film(place / f"episode_{e:06d}.mp4", own, fps)
        return pictures
    film(folder / "videos" / CAMERA / "chunk-000/file-000.mp4", np.concatenate(pictures), fps)
    begin = np.cumsum([0, *lengths])[:-1] / fps
    places = {f"videos/{CAMERA}/{name}": [0, 0] for name in ("chunk_index", "file_index")}
    meta = {"episode_index": [0, 1], **places, f"videos/{CAMERA}/from_timestamp": begin.tolist()}
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(meta), folder / "meta/episodes/chunk-000/file-000.parquet")
    return pictures


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("video", [False, True])
def test_lerobot_datasets(tmp_path, version, video):
    pictures = lerobot(tmp_path / "theirs", version, video)
    opened = open_lerobot(tmp_path / "theirs")
    data = import_dataset(opened, tmp_path / "set")
    assert data.lengths.tolist() == [4, 3] and data.spec.action.n == 2
    for e, own in enumerate(pictures):
        episode = data.episode(e)
        off = np.abs(np.moveaxis(episode.frames, 1, -1).astype(int) - own)
        assert off.max() <= (4 if video else 0)
        assert episode.actions.tolist() == [[e, t] for t in range(len(own) - 1)] and not episode.terminated
        assert episode.rewards.tolist() == list(range(len(own) - 1))


def test_lerobot_that_lost_something(tmp_path):
    lerobot(tmp_path / "rows", "v3.0", False, total_frames=10)
    with pytest.raises(DatasetError, match="9 rows, and should have 10"): open_lerobot(tmp_path / "rows")
    lerobot(tmp_path / "old", "v1.6", False)
    with pytest.raises(DatasetError, match="v2 and v3"): open_lerobot(tmp_path / "old")
    lerobot(tmp_path / "cams", "v3.0", False, features={"a": dict(dtype="image"), "b": dict(dtype="image")})
    with pytest.raises(DatasetError, match="2 cameras: a, b"): open_lerobot(tmp_path / "cams")
    with pytest.raises(DatasetError, match="no meta/info.json"): open_lerobot(tmp_path)


def test_a_video_that_ends_too_early_and_a_camera_that_is_a_path(tmp_path):
    lerobot(tmp_path / "short", "v2.1", True)
    film(tmp_path / "short/videos/chunk-000" / CAMERA / "episode_000001.mp4", smooth(3), 10)
    opened = open_lerobot(tmp_path / "short")
    with pytest.raises(DatasetError, match="no picture at 0.300 s"): import_dataset(opened, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    lerobot(tmp_path / "path", "v3.0", False, features={"../../secret": dict(dtype="video")})
    with pytest.raises(DatasetError, match="0 cameras"): open_lerobot(tmp_path / "path")


# Joined, and shown

def test_joined_episodes_are_what_they_were(tmp_path, make_episodes, written, either):
    one = written(tmp_path / "one", either, make_episodes(either, [3, 2], 1), env=dict(id="A-v0"))
    two = written(tmp_path / "two", either, make_episodes(either, [4], 2), env=dict(id="A-v0"))
    both = merge_datasets([one, two], tmp_path / "both")
    assert both.lengths.tolist() == [3, 2, 4] and verify(both.folder).hash not in (one.hash, two.hash)
    assert np.array_equal(both.frames, np.concatenate([one.frames, two.frames]))
    assert [part["hash"] for part in both.info["settings"]["merged"]] == [one.hash, two.hash]


def test_what_cannot_be_joined(tmp_path, make_episodes, written, either, left_in):
    one = written(tmp_path / "one", either, make_episodes(either, [3, 2], 1), env=dict(id="A-v0"))
    two = written(tmp_path / "two", either, make_episodes(either, [3, 2], 2), env=dict(id="B-v0"))
    sets = {"two or more": [one], "same environment": [one, two], "more than once": [one, one],
            "same spec": [one, sample_dataset()]}
    for why, some in sets.items():
        with pytest.raises(DatasetError, match=why): merge_datasets(some, tmp_path / "new")
    assert left_in(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_films(tmp_path, suffix, left_in):
    if suffix == "mp4": av = pytest.importorskip("av")
    data = as_foreign(sample_dataset())
    path = export_film(data, tmp_path / f"film.{suffix}", [0, 3], fps=10)
    if suffix == "gif":
        with Image.open(path) as image: assert image.size == (192, 192) and image.n_frames <= 24
    else:
        with av.open(str(path)) as container: assert len(list(container.decode(video=0))) == 24
    with pytest.raises(FileExistsError): export_film(data, path)
    for bad, why in ((dict(path=tmp_path / "a.avi"), "gif or .mp4"), (dict(episodes=[9]), "episodes 0 to 7"),
                     (dict(fps=0), "1 to 50")):
        with pytest.raises(DatasetError, match=why): export_film(data, **dict(path=tmp_path / "b.gif") | bad)
    assert left_in(tmp_path) == [f"film.{suffix}"]


def test_open_minari_shows_what_from_minari_would_make(tmp_path):
    pytest.importorskip("minari")
    from worldmodels_nb.data.minari import open_minari, to_minari
    data = sample_dataset()
    opened = open_minari(to_minari(data, tmp_path / "export"))
    assert opened.lengths.tolist() == data.lengths.tolist() and opened.picture == (64, 64, 3)
    assert np.array_equal(opened.episode(3, 64, False).frames, data.episode(3).frames)
    assert open_dataset(data.folder).hash == data.hash
