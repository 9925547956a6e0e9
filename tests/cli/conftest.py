import pytest

from tests.support.project import make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny project; every test uses a run_dir of its own."""
    return make_project(tmp_path_factory.mktemp("project"))
