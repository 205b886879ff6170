"Runs that several tests look at; nobody changes them."
import pytest
from run_tools import DROPPY, go, inside, one_thread, read_csv, small

from worldmodels_nb.runs.report import write_report


@pytest.fixture(scope="package", autouse=True)
def single():
    "One thread: as fast for networks this small, and the same numbers everywhere."
    with one_thread(): yield


@pytest.fixture(scope="package")
def smoke(tmp_path_factory):
    "One run of the smoke preset with its report."
    session = go("first", inside(tmp_path_factory.mktemp("smoke")))
    write_report(session.folder.path)
    return session


@pytest.fixture(scope="package")
def comparison(smoke):
    "The table of that run."
    return read_csv(smoke.folder.path / "comparison.csv")


@pytest.fixture(scope="package")
def undisturbed(tmp_path_factory):
    "The folder of a small run with dropout, never interrupted."
    settings = small(tmp_path_factory.mktemp("undisturbed"), DROPPY, models=["jepa", "encdec"])
    return go("mine", settings).folder.path


@pytest.fixture(scope="package")
def trained(tmp_path_factory):
    "A small run of one model, to load weights from."
    return go("first", small(tmp_path_factory.mktemp("trained")))
