"""Whether this machine can play ranks on a fake device."""

import pytest
import torch

from megatron_vlm.config import ConfigError
from megatron_vlm.platform.fake_device import guard

HAS_GUARD = torch.version.cuda is not None
"""Whether torch has a guard for CUDA devices of its own."""


def can_play() -> bool:
    """Return whether ranks can be played: torch's CPU build needs a compiler for it."""
    try:
        return HAS_GUARD or bool(guard._find_compiler(torch.__version__))
    except ConfigError:
        return False


CANNOT_PLAY = "torch's CPU build needs a C++ compiler to play ranks"
needs_fake_device = pytest.mark.skipif(not can_play(), reason=CANNOT_PLAY)
