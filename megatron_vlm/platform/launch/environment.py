"""Environment variables that CUDA's libraries read when they start."""

from collections.abc import Mapping

from megatron_vlm.config import TrainingConfig

# The second name is the one before torch 2.9.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# transformer-engine pickles the state of the recipe "delayed" into checkpoints, and reads it back only if allowed to.
_PICKLED_STATE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
_DETERMINISTIC = {
    # cuBLAS otherwise splits a product by the memory that happens to be free.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # A fixed order of additions; NVLink SHARP and the tree depend on what arrives first or on measured speeds.
    "NCCL_ALGO": "Ring",
}


def library_environment(environment: Mapping[str, str], training: TrainingConfig) -> dict[str, str]:
    """Return the variables to set before torch is imported; what the user has set stays.

    Args:
        environment: of this process.
        training: says whether every run gives the same bits, and how FP8 is scaled.
    """
    wanted: dict[str, str] = {}
    if not any(name in environment for name in _ALLOCATOR):
        # The number of images varies from batch to batch; blocks that can grow leave no gaps between them.
        wanted |= dict.fromkeys(_ALLOCATOR, "expandable_segments:True")
    if training.fp8 is not None and training.fp8_recipe == "delayed" and _PICKLED_STATE not in environment:
        wanted[_PICKLED_STATE] = "1"
    if training.deterministic:
        wanted |= {name: value for name, value in _DETERMINISTIC.items() if name not in environment}
        wanted["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # megatron-core refuses another value in this mode
    return wanted
