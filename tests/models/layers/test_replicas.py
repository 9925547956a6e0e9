import torch

from megatron_vlm.config import ParallelConfig
from megatron_vlm.models.build import build_model
from megatron_vlm.models.computation import Computation
from megatron_vlm.models.layers.replicas import mark_replicated
from tests.support.configs import tiny_model


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
