import pytest

from tests.support.runs import write_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Two prepared datasets and a tokenizer file."""
    return write_shards(tmp_path_factory.mktemp("shards"))
