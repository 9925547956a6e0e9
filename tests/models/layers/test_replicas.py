from collections import Counter
from math import prod

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_vlm.checkpoint.sharded_state import SHARDING_METADATA
from megatron_vlm.config import ParallelConfig
from megatron_vlm.config.patterns import matches_any
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.replicas import mark_replicated
from megatron_vlm.parallel.groups import build_groups
from tests.support.configs import tiny_model
from tests.support.vision_towers import tiny_models


def test_gradients_of_a_replicated_module_are_averaged_and_counted_once():
    module = torch.nn.Linear(2, 3)
    mark_replicated(module)
    for parameter in module.parameters():
        assert parameter.is_replicated
        assert not parameter.tensor_model_parallel
        assert not parameter.sequence_parallel


def test_vision_parts_are_replicated_and_the_decoder_is_not(one_rank):
    (chunk,) = build_model(tiny_model(), ParallelConfig(), Computation())
    for name, parameter in chunk.named_parameters():
        is_marked = hasattr(parameter, "is_replicated")
        assert is_marked == name.startswith(("vision_model.", "vision_projection.")), name


def test_checkpoint_has_every_tensor_of_the_vision_parts_whole(one_rank):
    (chunk,) = build_model(tiny_model(), ParallelConfig(), Computation())
    sharded = chunk.sharded_state_dict()
    for name, parameter in chunk.named_parameters():
        if not name.startswith("language_model."):
            entry = sharded[name]
            assert entry.local_shape == tuple(parameter.shape), name
            assert entry.replica_id in (0, (0, 0, 0)), name


def split_towers() -> list[tuple[set[str], dict[str, int], dict[str, tuple[int, ...]], dict[str, int]]]:
    """Return of each tower on this rank: what is split, sizes, whole shapes in a checkpoint, and numbers written."""
    parallel, found = ParallelConfig(tensor_model_parallel_size=2, vision_tensor_parallel=True), []
    build_groups(parallel)
    for model in tiny_models():
        (chunk,) = build_model(model, parallel, Computation())
        assert all(parameter.is_replicated for parameter in chunk.vision_projection.parameters())
        parameters = dict(chunk.vision_model.named_parameters())
        split = {name for name, parameter in parameters.items() if parameter.tensor_model_parallel}
        assert split == {name for name, parameter in parameters.items() if not hasattr(parameter, "is_replicated")}
        state = nested_values(chunk.vision_model.sharded_state_dict(metadata=dict(SHARDING_METADATA)))
        parts = [
            nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value] for value in state
        ]
        tensors = [tensor for part in parts for tensor in part if isinstance(tensor, ShardedTensor)]
        written: Counter = Counter()
        for tensor in tensors:
            written[tensor.key] += prod(tensor.local_shape) * (not any(tensor.replica_id))
        shapes = {tensor.key: tensor.global_shape for tensor in tensors}
        found.append((split, {name: value.numel() for name, value in parameters.items()}, shapes, dict(written)))
    return found


@pytest.mark.distributed
def test_split_tower_has_the_parts_that_its_settings_name_and_the_checkpoint_of_a_whole_one(workers):
    ranks = workers.run("tests.models.layers.test_replicas:split_towers", 2)
    for model, first, second in zip(tiny_models(), *ranks, strict=True):
        sizes, patterns = model.vision.parameter_sizes, model.vision.split_parameters
        named = {name for name in sizes if matches_any(patterns, name)}
        for split, counted, shapes, _ in (first, second):
            assert split == named
            assert counted == {name: size // 2 if name in named else size for name, size in sizes.items()}
            assert sum(map(prod, shapes.values())) == sum(sizes.values())
        for key, shape in first[2].items():
            assert first[3][key] + second[3][key] == prod(shape), key
