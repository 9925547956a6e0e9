"""A cluster of GPUs, and how long it takes to compute, to read memory and to send.

Data sheets say what a GPU could reach. What it reaches is assumed here, in one place: nothing of it has been measured
with this code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlm.platform.gpus import GPUS, Gpu

# Fractions of the data sheet. NVIDIA's libraries reach about these on large BF16 products; H100 is held back by its
# power limit. Flash attention on samples of some hundred tokens, and a tower of narrow layers, reach less.
_PRODUCTS = {"A100": 0.75, "H100": 0.65, "H200": 0.65}
_ATTENTION = {"A100": 0.45, "H100": 0.40, "H200": 0.40}
_TOWER = {"A100": 0.45, "H100": 0.35, "H200": 0.35}
_MEMORY = 0.80
_LINKS = 0.75
# A product loses d / (d + 128) in each of its three dimensions: the tiles of a kernel have sides of about 128.
_TILE = 128
LATENCY = 20e-6
"""Of a collective or a message, including its launch [s]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """GPUs of one kind in equal nodes."""

    gpu_name: str
    """Key of `GPUS`."""
    gpus_per_node: int = 8
    nvlink: float | None = None
    """Per GPU and direction; None for the data sheet's [bytes/s]."""
    infiniband: float | None = None
    """Per GPU and direction; None for the data sheet's [bytes/s]."""

    @property
    def gpu(self) -> Gpu:
        """Figures of the data sheet."""
        return GPUS[self.gpu_name]

    def product_seconds(self, rows: float, inputs: float, outputs: float) -> float:
        """Return the time of a matrix product [rows, inputs] x [inputs, outputs]."""
        if not rows:
            return 0.0
        fraction = _PRODUCTS[self.gpu_name]
        for size in (rows, inputs, outputs):
            fraction *= size / (size + _TILE)
        return 2 * rows * inputs * outputs / (self.gpu.peak_flops * fraction)

    def attention_seconds(self, flops: float) -> float:
        """Return the time of flash attention with so many operations."""
        return flops / (self.gpu.peak_flops * _ATTENTION[self.gpu_name])

    def tower_seconds(self, flops: float) -> float:
        """Return the time of tower and projection, with all that is bound by memory in them."""
        return flops / (self.gpu.peak_flops * _TOWER[self.gpu_name])

    def memory_seconds(self, size: float) -> float:
        """Return the time to read and write `size` bytes in all."""
        return size / (self.gpu.bandwidth * _MEMORY)

    def exchange_seconds(self, size: float, ranks: int, *, stride: int) -> float:
        """Return the time of an all-gather or a reduce-scatter in a ring.

        Args:
            size: of the whole tensor [bytes].
            ranks: of the group.
            stride: distance between neighbours of the group, in ranks of the job.
        """
        if ranks == 1:
            return 0.0
        inside = max(1, min(ranks, self.gpus_per_node // stride))
        # A ring enters and leaves a node through the network cards of all its members there.
        speed = self._nvlink if inside == ranks else min(self._nvlink, inside * self._infiniband)
        return LATENCY + size * (ranks - 1) / ranks / (speed * _LINKS)

    def message_seconds(self, size: float, *, stride: int) -> float:
        """Return the time of a message to the rank that is `stride` ranks away."""
        speed = self._nvlink if stride < self.gpus_per_node else self._infiniband
        return LATENCY + size / (speed * _LINKS)

    @property
    def _nvlink(self) -> float:
        return self.gpu.nvlink if self.nvlink is None else self.nvlink

    @property
    def _infiniband(self) -> float:
        return self.gpu.infiniband if self.infiniband is None else self.infiniband

    def assumptions(self) -> Sequence[str]:
        """Return what the times rest on, as lines for the user."""
        name, gpu = self.gpu_name, self.gpu
        return (
            f"{name}: {gpu.peak_flops / 1e12:.0f} TFLOP/s, {gpu.memory / 1e9:.0f} GB at {gpu.bandwidth / 1e9:.0f} "
            f"GB/s, NVLink {self._nvlink / 1e9:g} and InfiniBand {self._infiniband / 1e9:g} GB/s per GPU and "
            f"direction, {self.gpus_per_node} GPUs a node",
            f"of these, matrix products reach {_PRODUCTS[name]:.0%} (less if a side is small: d / (d + {_TILE})), "
            f"attention {_ATTENTION[name]:.0%}, the tower {_TOWER[name]:.0%}, memory {_MEMORY:.0%}, links {_LINKS:.0%}",
        )
