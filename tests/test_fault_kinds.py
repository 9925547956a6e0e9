import re
from pathlib import Path

import pytest

from tests.support.fault_kinds import KINDS, NAMES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_test_of_a_kind_is_there(name):
    file, _, function = name.partition("::")
    assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_every_kind_has_a_test_and_every_test_is_run_with_the_faults(request):
    assert all(KINDS.values())
    collected = {item.nodeid.partition("[")[0]: item for item in request.session.items}
    for name in NAMES & collected.keys():
        assert collected[name].get_closest_marker("fault_kind")
