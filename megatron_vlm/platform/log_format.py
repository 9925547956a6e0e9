"""Log lines of a job: the time and, in a job of several processes, the rank."""

import logging
import sys
from collections.abc import Collection

_PACKAGE = "megatron_vlm"
# On import, they announce missing packages and deprecations, which users of this package cannot act on.
_QUIET_LOGGERS = ("megatron", "torch.distributed", "torch.distributed.checkpoint", "torch.utils.tensorboard")


class RankFormatter(logging.Formatter):
    """`2026-01-31 11:07:22 rank 3 | message`; the level appears from WARNING on, the rank only in a job of several."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self._place = f" rank {rank}" if world_size > 1 else ""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, followed by the traceback if the record has one."""
        level = f" {record.levelname.lower()}" if record.levelno >= logging.WARNING else ""
        line = f"{self.formatTime(record, self.datefmt)}{self._place}{level} | {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def setup_logging(rank: int = 0, world_size: int = 1, speaking_ranks: Collection[int] = (0,)) -> None:
    """Send log lines to stderr.

    Args:
        rank: of this process.
        world_size: processes of the job.
        speaking_ranks: ranks that log INFO lines; the others log only warnings and errors.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RankFormatter(rank, world_size))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(_PACKAGE).setLevel(logging.INFO if rank in speaking_ranks else logging.WARNING)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
