import pytest

from tests.support.project import make_project
from tests.support.training_jobs import started_jobs


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny project; every test uses a run_dir of its own."""
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def start(project):
    """Start `megatron-vlm train` and return the process; it is ended after the test."""
    with started_jobs(project) as start_process:
        yield start_process
