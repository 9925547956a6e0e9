"""One process at a time at a folder."""

import errno
import fcntl
import logging
from typing import IO

logger = logging.getLogger(__name__)

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def try_lock(file: IO) -> bool:
    """Lock an open file until it is closed; the kernel lets go of it however this process ends.

    Where the file system has no locks, this warns and goes on.

    Returns:
        False if another process holds it.

    Raises:
        OSError: the file system failed.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s: this file system has no locks; start no second command on this folder", file.name)
    return True
