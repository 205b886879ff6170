"Fixtures for all tests: the committed sample, and settings small enough for seconds."
import pytest

from worldmodels_nb.data.datasets import sample_dataset


@pytest.fixture(scope="session")
def sample():
    "The committed sample dataset: a few episodes of Two Rooms."
    return sample_dataset()
