"""Layouts of the matrix, the rows that they train on, and the runs over them."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.checkpoint.tensors import list_tensors, read_tensor
from megatron_vlm.config import TrainConfig
from megatron_vlm.config.adapters.visual_expert import Config as ExpertConfig
from tests.support.configs import SEQ_LENGTH, tiny_model, tiny_run
from tests.support.jobs import Steps, starting_from
from tests.support.lora_runs import ADAPTER, FROZEN
from tests.support.overlap import OVERLAP
from tests.support.pool import WorkerPool
from tests.support.samples import make_samples, pack_in_order, sample_length

NUM_STEPS, STEPS_AFTER = 5, 2
MAX_IMAGES, NUM_SAMPLES = 6, 130
# Two, three and four data-parallel ranks, and two micro-batches for each stage of a virtual pipeline.
ROWS_PER_STEP = 12
NUM_PROCESSES = 8

_ADAPTERS = {"lora": ADAPTER, "expert": ExpertConfig()}
_FROZEN = {"lora": FROZEN, "expert": FROZEN, "frozen": ("vision_model",)}
_SIZES = {"tp": "tensor_model", "pp": "pipeline_model", "vpp": "virtual_pipeline_model", "cp": "context"}
_SWITCHES: dict[str, dict[str, Any]] = {
    "sp": {"sequence_parallel": True},
    "vtp": {"vision_tensor_parallel": True},
    "plain": {"use_distributed_optimizer": False},
    "overlap": OVERLAP,
    "uneven": {"num_layers_in_first_pipeline_stage": 1},
}

LAYOUTS = (
    "dp1_full",
    "dp1_selective",
    "dp1_micro2",
    "tp2",
    "tp2_vtp",
    "tp2_sp",
    "tp2_sp_vtp",
    "tp4_sp",
    "tp4_sp_vtp_full",
    "tp2_sp_selective",
    "tp2_dp2_plain",
    "tp2_vtp_dp2_plain",
    "tp2_sp_dp2_overlap",
    "tp2_sp_vtp_dp2_overlap",
    "pp2",
    "pp4",
    "pp2_uneven",
    "pp2_layers31",
    "pp2_full",
    "pp3_layers121",
    "pp2_vpp2_layers1201",
    "pp2_vpp2",
    "pp3_layers022",
    "pp2_dp2_overlap",
    "pp4_layers0220_full",
    "pp2_dp2_layers31_overlap",
    "pp2_dp3",
    "pp2_vpp2_dp3_overlap",
    "pp2_vpp2_dp2_layers2101_overlap",
    "tp2_pp2",
    "tp2_vtp_pp2",
    "tp2_sp_pp2",
    "tp2_sp_pp2_layers13",
    "tp2_sp_pp2_full",
    "dp2",
    "dp3",
    "dp2_plain",
    "dp2_overlap",
    "dp3_overlap",
    "dp4_overlap_full",
    "cp2",
    "cp4",
    "cp2_full",
    "cp2_selective",
    "cp2_micro2",
    "cp2_dp2",
    "cp2_dp2_overlap",
    "cp2_dp3_plain",
    "cp2_tp2",
    "cp2_tp2_vtp",
    "cp2_tp2_sp",
    "cp2_pp2",
    "cp2_pp2_uneven",
    "cp2_pp2_layers31_selective",
    "cp2_pp2_vpp2",
    "cp4_tp2_sp",
    "cp2_tp2_sp_pp2",
    "cp2_tp2_sp_vtp_pp2",
    "cp2_tp2_pp2_full",
    "pp2_vpp2_layers1210_full",
    "cp2_tp2_sp_dp2_overlap",
    "cp2_tp2_sp_vtp_dp2_overlap",
    "cp2_pp2_dp2_overlap",
    "tp2_frozen",
    "tp2_vtp_frozen",
    "tp2_sp_vtp_dp2_overlap_frozen",
    "tp2_sp_lora",
    "pp2_lora",
    "pp3_layers022_lora",
    "dp3_overlap_lora",
    "cp2_lora",
    "cp2_tp2_sp_pp2_lora",
    "tp2_vtp_lora",
    "tp2_sp_expert",
    "dp2_overlap_expert",
    "cp2_expert",
    "cp2_tp2_sp_dp2_overlap_expert",
    "cp2_pp2_vpp2_expert",
    "pp2_vpp2_layers1201_expert",
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the name of a layout says."""

    world_size: int
    parallel: dict[str, Any]
    training: dict[str, Any]
    variant: str
    """What learns: an adapter with what is not `_FROZEN`, or all but the tower, or `all`; each has its reference."""

    @classmethod
    def named(cls, name: str) -> "Layout":
        """Return it; every word is a size (`tp2`), a switch (`overlap`), a recomputation or a variant."""
        parallel: dict[str, Any] = {}
        training: dict[str, Any] = {}
        world_size, variant = 1, "all"
        for word in name.split("_"):
            kind, size = re.fullmatch(r"([a-z]+)(\d*)", word).groups()  # type: ignore[union-attr]
            if kind in _SIZES:
                parallel[f"{_SIZES[kind]}_parallel_size"] = int(size)
            if kind in ("tp", "pp", "cp", "dp"):
                world_size *= int(size)
            elif kind == "vpp":
                parallel["overlap_p2p_comm"] = True
            elif kind == "layers":
                # The layers of each model chunk; the layout also says how many of them a stage has.
                parallel["pipeline_model_parallel_layout"] = f"E{'|'.join(f't*{count}' for count in size)}L"
                parallel.pop("virtual_pipeline_model_parallel_size", None)
            elif kind == "micro":
                training["micro_batch_size"] = int(size)
            elif word in ("full", "selective"):
                training["recompute"] = word
            elif word in _FROZEN:
                variant = word
            else:
                parallel.update(_SWITCHES[word])
        return cls(world_size, parallel, training, variant)


def rows_of(num_steps: int, image_tokens: int = 16) -> list[list[int]]:
    """Return the rows of so many steps: each has rows with images, one with text only, and one without a sample.

    Args:
        num_steps: the steps.
        image_tokens: positions of a picture, at least 16.
    """
    samples = [placed.sample for placed in make_samples(NUM_SAMPLES, max_images=MAX_IMAGES)]
    lengths = [sample_length(sample, image_tokens) for sample in samples]
    # Text takes at most 6 positions beside each picture and 14 at the ends.
    text = [index for index, length in enumerate(lengths) if length < 16]
    pictures = [index for index in range(NUM_SAMPLES) if index not in text]
    full = [[pictures[i] for i in row] for row in pack_in_order([lengths[i] for i in pictures], SEQ_LENGTH)]
    rows = []
    for step in range(num_steps):
        first = step * (ROWS_PER_STEP - 2)
        mine = [full[(first + index) % len(full)] for index in range(ROWS_PER_STEP - 2)]
        rows += [*mine[: step + 1], text[2 * step : 2 * step + 2], *mine[step + 1 :], []]
    return rows


class Runs:
    """Runs over the layouts, each done once: five steps from the same weights, and a checkpoint behind them.

    Args:
        pool: its processes.
        folder: of all runs.
    """

    def __init__(self, pool: WorkerPool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self._done: dict[str, Steps] = {}

    def path(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.folder / name

    def config(self, name: str, run_dir: Path) -> TrainConfig:
        """Return the settings of a run."""
        layout, model = Layout.named(name), tiny_model()
        vision = dataclasses.replace(model.vision, num_attention_heads=4)  # a head for each tensor-parallel rank
        freeze = _FROZEN.get(layout.variant, ())
        return tiny_run(
            str(run_dir),
            model=dataclasses.replace(model, vision=vision, adapter=_ADAPTERS.get(layout.variant)),
            parallel=layout.parallel,
            training={"global_batch_size": ROWS_PER_STEP, "freeze": freeze, **layout.training},
            # Where a gradient is all rounding, as at the biases of keys, Adam would make a whole step of it.
            optimizer={"adam_eps": 1e-5},
        )

    def steps(self, name: str, *, num_steps: int = NUM_STEPS, run_dir: Path | None = None, start: str = "") -> Steps:
        """Do steps and save; start at `start` or, where `run_dir` holds a checkpoint, behind it."""
        config = self.config(name, run_dir or self.path(name))
        if start:
            config = starting_from(config, str(self.path(start)))
        return self.pool.run(
            "tests.support.jobs:train_steps",
            Layout.named(name).world_size,
            timeout=1200.0,
            config=config,
            rows=rows_of(NUM_STEPS + STEPS_AFTER),
            num_samples=NUM_SAMPLES,
            num_steps=num_steps,
            max_images=MAX_IMAGES,
            save=run_dir is None,
        )[0]

    def trained(self, name: str) -> Steps:
        """Return the five steps of a layout; the checkpoint behind them is at its path."""
        if name not in self._done:
            self._done[name] = self.steps(name, start=self._initial(Layout.named(name).variant))
        return self._done[name]

    def reference(self, variant: str) -> Steps:
        """Return seven steps of one process; a checkpoint behind the fifth is at the path `one_process(variant)`."""
        name = one_process(variant)
        key = f"{name} to its end"
        if key not in self._done:
            first = self.trained(name)
            rest = self.steps(name, num_steps=STEPS_AFTER, run_dir=self.path(name))
            joined = {
                field.name: getattr(first, field.name) + getattr(rest, field.name)
                for field in dataclasses.fields(Steps)
            }
            self._done[key] = Steps(**joined)
        return self._done[key]

    def _initial(self, variant: str) -> str:
        """Return the name of the checkpoint that all runs with an adapter, or all without one, start from."""
        variant = variant if variant in _ADAPTERS else "all"
        name = f"initial_{variant}"
        if not self.path(name).exists():
            config = self.config(one_process(variant), self.path(name))
            if variant != "all":
                config = starting_from(config, str(self.path(self._initial("all"))))
            self.pool.run("tests.support.jobs:save_initial", 1, config=config)
        return name


def one_process(variant: str) -> str:
    """Return the name of the layout whose runs are the reference of a variant."""
    return "dp1" if variant == "all" else f"dp1_{variant}"


def largest_difference(run: Path, other: Path) -> tuple[float, str]:
    """Return by how much a number of any parameter differs at most between two checkpoints, and whose it is."""
    ours, theirs = find_checkpoint(run), find_checkpoint(other)
    assert list_tensors(ours) == list_tensors(theirs)
    differences = []
    for key in list_tensors(ours):
        difference = read_tensor(ours, key).double() - read_tensor(theirs, key).double()
        differences.append((float(difference.abs().max()), key))
    return max(differences)
