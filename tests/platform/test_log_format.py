import logging
import re
import subprocess
import sys

import pytest

from megatron_vlm.platform.log_format import HARMLESS, RankFormatter

SCRIPT = """
import logging, sys
from megatron_vlm.platform.log_format import setup_logging
setup_logging(int(sys.argv[1]), 4, speaking_ranks={0, 2})
logging.getLogger("megatron_vlm.training").info("step")
logging.getLogger("megatron_vlm.training").warning("slow")
logging.getLogger("megatron.core").warning("Apex is not installed. Falling back to Torch Norm")
logging.getLogger("other").warning("heed this")
logging.getLogger("other").info("chatter")
"""


def record(level, message="text", exc_info=None):
    return logging.LogRecord("megatron_vlm.x", level, __file__, 1, message, (), exc_info)


def lines_of(rank):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(rank)], capture_output=True, text=True, check=True)
    return [line.split(" | ")[1] for line in done.stderr.splitlines()]


def test_rank_is_named_in_a_job_of_several():
    assert RankFormatter(3, 4).format(record(logging.INFO)).endswith(" rank 3 | text")


def test_rank_is_left_out_in_a_job_of_one():
    assert "rank" not in RankFormatter(0, 1).format(record(logging.INFO))


def test_level_is_named_from_warning_on():
    assert " warning | text" in RankFormatter(0, 1).format(record(logging.WARNING))
    assert "info" not in RankFormatter(0, 1).format(record(logging.INFO))


def test_traceback_follows_the_line():
    try:
        raise KeyError("x")
    except KeyError:
        text = RankFormatter(0, 1).format(record(logging.ERROR, exc_info=sys.exc_info()))
    assert text.splitlines()[-1] == "KeyError: 'x'"


def test_speaking_rank_shows_our_information_and_all_warnings_but_the_harmless():
    assert lines_of(2) == ["step", "slow", "heed this"]


def test_other_rank_shows_warnings_only():
    assert lines_of(1) == ["slow", "heed this"]


FOREIGN = """
import logging, warnings
from megatron_vlm.platform.device import prepare_process
from megatron_vlm.platform.log_format import setup_logging
setup_logging(3, 4)
prepare_process()
import megatron.core.distributed, megatron.core.optimizer, megatron.core.models.gpt
for name in ("decoder.a", "decoder.b"):
    logging.getLogger("megatron.core.optimizer.distrib_optimizer").warning(
        f"'{name}' param range exceeds unpadded buffer. It will be padded with zeros which can lead to data corruption."
    )
for _ in range(2):
    warnings.warn_explicit("bucket 3 is dispatched", UserWarning, "megatron/core/x.py", 7, "megatron.core.x", registry)
"""


def test_warning_of_megatron_core_that_nobody_knows_is_shown_once_with_its_rank():
    script = FOREIGN.replace("for _ in", "registry = {}\nfor _ in")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    corruption, dispatched = done.stderr.splitlines()  # and nothing of what it says when it is imported
    assert " rank 3 warning | 'decoder.a' param range" in corruption
    assert dispatched.endswith(" rank 3 warning | megatron/core/x.py:7: UserWarning: bucket 3 is dispatched")


@pytest.mark.parametrize(("pattern", "reason"), HARMLESS)
def test_every_silenced_warning_has_a_reason_and_a_message_of_its_own(pattern, reason):
    assert reason
    assert not re.match(pattern, "It will be padded with zeros which can lead to data corruption.", re.IGNORECASE)
    assert not re.match(pattern, "Rank 3 common state dict differs from rank 0", re.IGNORECASE)
