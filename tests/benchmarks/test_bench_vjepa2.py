"Stage 2 of V-JEPA 2: reading cached tokens, and a cache against none. Run: pytest --benchmark-only."

import time

import numpy as np
import pytest
import torch
from bench_tools import Watch

from worldmodels_nb.data.datasets import Windows, open_dataset
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec, Episode, EpisodeWriter
from worldmodels_nb.models.action_conditioned import WorldModelTransformer, normalize
from worldmodels_nb.settings import ActionSettings, load_settings
from worldmodels_nb.training.fit import fit

SPEC = DataSpec((3, 8, 8), ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0]), [], [])
TOKENS, WIDTH, STEPS = 64, 96, 12  # of each kind


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    "Windows of 1,980 frames with 49 MB of cached tokens, memory-mapped."
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("bench")
    with EpisodeWriter(folder / "set", SPEC, {}) as writer:
        for _ in range(60):
            writer.add(
                Episode(
                    rng.integers(0, 256, (33, 3, 8, 8), np.uint8),
                    rng.uniform(-1, 1, (32, 2)).astype(np.float32),
                    np.zeros(32, np.float32),
                    False,
                    None,
                )
            )
    data = open_dataset(folder / "set")
    latents = np.lib.format.open_memmap(
        folder / "latents.npy", "w+", np.float32, (len(data.frames), TOKENS, WIDTH)
    )
    latents[:] = rng.standard_normal(latents.shape, np.float32)
    latents.flush()
    return Windows(
        data,
        np.arange(len(data)),
        ActionSettings().window_steps,
        latents=np.load(folder / "latents.npy", mmap_mode="r"),
    )


def test_a_step_on_cached_tokens_costs_at_most_a_twentieth_more_than_on_one_preloaded_batch(
    benchmark, cached
):
    "Every third step reads from the cache, the two between not; how far those come out apart is granted."
    recipe, watch = (
        load_settings().recipe("vjepa2.action").model_copy(update={"steps": 3 * STEPS + 6, "batch_size": 8}),
        Watch(),
    )
    loaded = cached.sample(recipe.batch_size, 0, 0)
    torch.manual_seed(0)
    model = WorldModelTransformer(WIDTH, (8, 8), SPEC.action, ActionSettings())
    benchmark.pedantic(
        lambda: fit(
            model,
            lambda step: loaded if step % 3 else cached.sample(recipe.batch_size, 0, step),
            recipe,
            [watch],
        ),
        rounds=1,
    )
    judged, *plain = (np.median(np.diff(watch.marks)[6 + kind :: 3]) for kind in range(3))
    ratio, blur = judged / np.mean(plain), max(plain) / min(plain)
    benchmark.extra_info |= dict(
        ratio=round(ratio, 3), blur=round(blur, 3), milliseconds=round(1000 * judged, 1)
    )
    assert ratio <= 1.05 * blur


@pytest.mark.parametrize("batch", [1, 16])
@torch.no_grad()
def test_sixteen_steps_with_a_cache_are_four_times_as_fast_as_without(benchmark, batch):
    "64 tokens of width 96, the default transformer with a context of all 16 steps, one step of history."
    torch.manual_seed(0)
    model = WorldModelTransformer(
        WIDTH, (8, 8), SPEC.action, ActionSettings(window_steps=16, context_length=16)
    ).eval()
    z, actions = normalize(torch.randn(batch, 1, TOKENS, WIDTH)), torch.rand(batch, 16, 2) * 2 - 1

    def again(z):
        for t in range(1, 17):
            z = torch.cat([z, model.step(z, actions[:, :t])[0][:, -1:]], 1)

    spent = {"cache": [], "none": []}

    def turns():
        for _ in range(4):
            for name, call in (("cache", lambda: model.rollout(z, actions)), ("none", lambda: again(z))):
                began = time.perf_counter()
                call()
                spent[name].append(time.perf_counter() - began)

    benchmark.pedantic(turns, rounds=1)
    quick, slow = (np.median(spent[name][1:]) for name in ("cache", "none"))
    benchmark.extra_info |= dict(
        times=round(slow / quick, 1), milliseconds=round(1000 * quick, 1), without=round(1000 * slow, 1)
    )
    assert slow >= 4 * quick
