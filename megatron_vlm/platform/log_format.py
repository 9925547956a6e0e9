"""Log lines of a job: the time and, in a job of several processes, the rank."""

import logging
import re
import sys
import warnings
from collections.abc import Collection

_PACKAGE = "megatron_vlm"
_FOREIGN = ("megatron", "torch", "py.warnings", "transformer_engine")
HARMLESS = (
    # The launcher says what a missing transformer-engine means; the rest of these is for developers of megatron-core.
    (r"(Transformer Engine and )?Apex (is|are) not installed", "optional packages"),
    (r"full scope is deprecated", "megatron-core's own default for CUDA graphs, which are off"),
    (r"If you are using transformer_engine .*'core_attn' to recompute", "training.recompute is the user's choice"),
    (r"The \.grad attribute of a Tensor that is not a leaf", "megatron-core looks whether it has a gradient"),
    (r"WARNING: there is no optimizer on RANK", "a rank whose parts are all frozen"),
    (r".*torch\.distributed\._(all_gather|reduce_scatter)_base", "names of torch that megatron-core uses"),
    (r".*(reduce_scatter_tensor|all_gather_into_tensor)", "names of torch that megatron-core uses"),
    (r".*(ShardedTensor|_sharded_tensor)", "a class of torch that its checkpoints use"),
    (r".*`(load|save)_state_dict` is deprecated", "names of torch that megatron-core uses"),
    (r".*TypedStorage is deprecated", "a class of torch that its checkpoints use"),
    (r".*torch\.distributed\.checkpoint.*deprecated", "names of torch that megatron-core uses"),
)
"""The warnings of torch and megatron-core that are not shown: how each begins, and why nobody needs to act on it."""


class RankFormatter(logging.Formatter):
    """`2026-01-31 11:07:22 rank 3 | message`; the level appears from WARNING on, the rank only in a job of several."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self._place = f" rank {rank}" if world_size > 1 else ""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, followed by the traceback if the record has one."""
        level = f" {record.levelname.lower()}" if record.levelno >= logging.WARNING else ""
        message = record.getMessage()
        if record.name == "py.warnings":
            message = message.partition("\n")[0]  # without the line of code that warns
        line = f"{self.formatTime(record, self.datefmt)}{self._place}{level} | {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class ForeignFilter(logging.Filter):
    """Passes a warning of torch or megatron-core once for each place in their code, and harmless ones not at all."""

    def __init__(self) -> None:
        super().__init__()
        self._harmless = [re.compile(pattern, re.IGNORECASE) for pattern, _ in HARMLESS]
        self._told: set[tuple[str, int]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is shown."""
        if record.name.split(".")[0] not in _FOREIGN and record.name not in _FOREIGN:
            return True
        if any(pattern.match(record.getMessage()) for pattern in self._harmless):
            return False
        place = (record.pathname, record.lineno)
        is_new = record.name == "py.warnings" or place not in self._told  # Python shows a warning once per place itself
        self._told.add(place)
        return is_new


def silence_harmless_warnings() -> None:
    """Have Python ignore the warnings in `HARMLESS`; all others are shown."""
    for message, _ in HARMLESS:
        warnings.filterwarnings("ignore", message=message)


def setup_logging(rank: int = 0, world_size: int = 1, speaking_ranks: Collection[int] = (0,)) -> None:
    """Send log lines and Python's warnings to stderr.

    Args:
        rank: of this process.
        world_size: processes of the job.
        speaking_ranks: ranks that log INFO lines; the others log only warnings and errors.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RankFormatter(rank, world_size))
    handler.addFilter(ForeignFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(_PACKAGE).setLevel(logging.INFO if rank in speaking_ranks else logging.WARNING)
    logging.captureWarnings(True)
