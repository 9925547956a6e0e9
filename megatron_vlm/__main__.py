"""Let `python -m megatron_vlm` be the same as `megatron-vlm`."""

import sys

from megatron_vlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
