import pytest

from tests.support.fake_device import FakeDeviceProcess


@pytest.fixture(scope="session")
def fake_process():
    """A process on the fake device."""
    process = FakeDeviceProcess()
    yield process
    process.close()
