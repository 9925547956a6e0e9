"""GPUs that a run can be planned for, with the figures of their data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU in a server of eight; what it reaches in practice is less."""

    peak_flops: float
    """Dense BF16 matrix products [FLOP/s]."""
    memory: int
    """[bytes]"""
    bandwidth: float
    """Of its memory [bytes/s]."""
    nvlink: float
    """To the other GPUs of its node, in each direction [bytes/s]."""
    infiniband: float
    """To other nodes, in each direction, with one network card per GPU as in NVIDIA's DGX servers [bytes/s]."""


GPUS = {
    "A100": Gpu(peak_flops=312e12, memory=80 * 10**9, bandwidth=2.04e12, nvlink=300e9, infiniband=25e9),
    "H100": Gpu(peak_flops=989e12, memory=80 * 10**9, bandwidth=3.35e12, nvlink=450e9, infiniband=50e9),
    "H200": Gpu(peak_flops=989e12, memory=141 * 10**9, bandwidth=4.8e12, nvlink=450e9, infiniband=50e9),
}
"""By a substring of the device name. Source: NVIDIA's data sheets of the SXM modules (A100 with 80 GB), and of DGX A100
(one HDR InfiniBand port per GPU) and DGX H100 and H200 (one NDR port per GPU)."""
