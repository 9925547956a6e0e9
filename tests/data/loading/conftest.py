"""What the tests of loading share."""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def short_folder():
    with tempfile.TemporaryDirectory(prefix="mv-") as folder:  # its path is short enough for sockets
        yield Path(folder)
