"""A run from its settings to its last checkpoint: what a worker process does."""

import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from megatron_vlm.config import ConfigError, TrainConfig, derive_layout, save_config
from megatron_vlm.data.batch import ImageShare
from megatron_vlm.data.ledger import Ledger, hash_sample_ids
from megatron_vlm.data.loader import BatchLoader
from megatron_vlm.data.plan import Plan, PlanSettings, build_plan, open_plan
from megatron_vlm.data.shards import ShardedDataset
from megatron_vlm.parallel.groups import RankLayout, start_distributed, stop_distributed
from megatron_vlm.platform.device import prepare_process
from megatron_vlm.training.hooks import SIGNALLED, Hook, LogHook, save_hook, stop_hook
from megatron_vlm.training.loop import train
from megatron_vlm.training.metrics import MetricsWriter
from megatron_vlm.training.setup import build_state
from megatron_vlm.training.state import TrainState

logger = logging.getLogger(__name__)

PLAN_FOLDER = "plan"
CONFIG_NAME = "config.yaml"
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
