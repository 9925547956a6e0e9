"""The position of this node in a SLURM job that starts one launcher per node."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_vlm.config import ConfigError

# Below Linux's ephemeral ports (from 32768) and above the services of a typical compute node.
_FIRST_PORT, _NUM_PORTS = 15000, 8500
_HOST = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")
_BRACKET = re.compile(r"\[([^\[\],-]+)[^\[\]]*\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmNode:
    """This node of a SLURM job step."""

    job_id: int
    launch_id: str
    """Differs between starts, including those of a requeued job and several in one allocation of one node; the same
    on all nodes."""
    num_nodes: int
    node_rank: int
    master_address: str
    """First node of the step."""
    master_port: int
    """Derived from the job and step ids, so that all nodes agree without communication."""
    launcher_port: int
    """Where the launchers meet; likewise."""
    num_gpus: int | None
    """GPUs of the job on this node; None if SLURM does not say."""


def read_slurm_node(environment: Mapping[str, str]) -> SlurmNode | None:
    """Read SLURM's variables; None outside a SLURM job.

    The variables of the step (`srun`) take precedence over those of the whole allocation.

    Raises:
        ConfigError: a variable is missing or malformed, srun started several launchers on a node, or there are
            several nodes and this launcher was not started by srun.
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    num_nodes = _read_int(environment, ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"), default=1)
    num_tasks = _read_int(environment, ("SLURM_STEP_NUM_TASKS",), default=num_nodes)
    if num_tasks != num_nodes:
        raise ConfigError(
            f"srun started {num_tasks} tasks on {num_nodes} nodes, but one task per node starts all its ranks",
            fix="use srun --ntasks-per-node=1",
        )
    if num_nodes > 1 and "SLURM_STEP_ID" not in environment:
        raise ConfigError(
            f"the job has {num_nodes} nodes, but srun did not start this launcher: nobody starts the others",
            fix="start it with srun --ntasks-per-node=1, or set SLURM_NNODES=1 to use this node only",
        )
    job_id = _read_int(environment, ("SLURM_JOB_ID",))
    step_id = _read_int(environment, ("SLURM_STEP_ID",), default=0)
    node_rank = _read_int(environment, ("SLURM_NODEID",), default=0 if num_nodes == 1 else None)
    # A launcher that needs no others is the only one of its start; in a shell of salloc, or in a loop of a batch
    # script, SLURM's variables are the same for all starts.
    start = f"-{os.getpid()}" if num_nodes == 1 else ""
    port = _FIRST_PORT + (7 * job_id + step_id) % _NUM_PORTS
    return SlurmNode(
        job_id=job_id,
        launch_id=f"slurm-{job_id}-{step_id}-{environment.get('SLURM_RESTART_COUNT', '0')}{start}",
        num_nodes=num_nodes,
        node_rank=node_rank,
        master_address="127.0.0.1" if num_nodes == 1 else first_host(_node_list(environment)),
        master_port=port,
        launcher_port=port + _NUM_PORTS,
        num_gpus=_read_int(environment, ("SLURM_GPUS_ON_NODE",), default=0) or None,
    )


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM host list, e.g. `gpu003` for `gpu[003-010,12],fat7`.

    Raises:
        ConfigError: the text is not a host list.
    """
    text = node_list.strip()
    first = _HOST.match(text)
    host = _BRACKET.sub(r"\1", first.group()) if first else ""
    is_whole = first is not None and text[first.end() : first.end() + 1] in ("", ",")
    if not is_whole or not re.fullmatch(r"[\w.-]+", host):
        raise ConfigError(
            f"{node_list!r} is not a SLURM host list", where="SLURM_JOB_NODELIST", fix="start the launcher with srun"
        )
    return host


def _node_list(environment: Mapping[str, str]) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environment.get(name):
            return environment[name]
    raise ConfigError("SLURM_JOB_NODELIST is not set", fix="start the launcher with srun, once per node")


def _read_int(environment: Mapping[str, str], names: tuple[str, ...], default: int | None = None) -> int:
    """Return the value of the first variable that is set."""
    for name in names:
        text = environment.get(name)
        if text is None:
            continue
        if not text.isdecimal():
            raise ConfigError(f"{name}={text!r} is not a number", fix="start the launcher with srun, once per node")
        return int(text)
    if default is None:
        raise ConfigError(f"{names[0]} is not set", fix="start the launcher with srun, once per node")
    return default
