import logging
import subprocess
import sys

from megatron_vlm.platform.log_format import RankFormatter

SCRIPT = """
import logging, sys
from megatron_vlm.platform.log_format import setup_logging
setup_logging(int(sys.argv[1]), 4, speaking_ranks={0, 2})
logging.getLogger("megatron_vlm.training").info("step")
logging.getLogger("megatron_vlm.training").warning("slow")
logging.getLogger("megatron.core").warning("apex is not installed")
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


def test_speaking_rank_shows_our_information_and_all_warnings_but_the_unactionable():
    assert lines_of(2) == ["step", "slow", "heed this"]


def test_other_rank_shows_warnings_only():
    assert lines_of(1) == ["slow", "heed this"]
