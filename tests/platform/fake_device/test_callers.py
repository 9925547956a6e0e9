from pathlib import Path

import megatron.core

import megatron_vlm
from megatron_vlm.platform.fake_device.callers import caller

HOME = Path(megatron_vlm.__file__).parent
CORE = Path(megatron.core.__file__).parent


def call_in(place, function, line=1):
    """Call the function from a line of the file at `place`."""
    names = {"function": function}
    code = "\n" * (line - 1) + "def call():\n return function()"
    exec(compile(code, str(place), "exec"), names)
    return names["call"]()


def test_place_is_a_line_of_the_package():
    assert call_in(HOME / "models" / "vlm.py", caller, line=7) == "megatron_vlm/models/vlm.py:8"


def test_place_in_another_package_names_its_caller_too():
    found = call_in(HOME / "models" / "vlm.py", lambda: call_in(CORE / "a" / "b.py", caller))
    assert found == "megatron/core/a/b.py:2 from megatron_vlm/models/vlm.py:2"


def test_what_watches_is_no_place():
    assert call_in(HOME / "platform" / "fake_device" / "watch.py", caller) == "?"
