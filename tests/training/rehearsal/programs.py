"""Rehearsals that tests play in a process on the fake device."""

from megatron_vlm.config import derive_layout
from megatron_vlm.training.rehearsal.job import Rehearsal, micro_batches_to_play, play_rank, playable


def play(config, world_size, ranks, *, num_micro_batches=None, iterations=2):
    """Return what the ranks did on made-up rows."""
    layout = derive_layout(config, world_size)
    rehearsal = Rehearsal(
        config=playable(config, "unused"),
        layout=layout,
        iterations=iterations,
        num_micro_batches=num_micro_batches or micro_batches_to_play(config, layout),
        has_data=False,
    )
    return [play_rank(rehearsal, rank) for rank in ranks]


def play_without_blank_images(config, world_size, ranks):
    """Play a model in which a rank without images calls neither tower nor projection, and gives them zero gradients."""
    from megatron_vlm.models.vlm import VisionLanguageModel

    encode = VisionLanguageModel._encode_share

    def skip_if_empty(self, pixel_values):
        if pixel_values.size(0):
            return encode(self, pixel_values)
        weights = [p for p in self.vision_projection.parameters() if p.requires_grad]
        nothing = sum(p.flatten()[:1].sum() * 0 for p in weights)
        num_tokens = (self.image_size // self.vision_model.vision_config.patch_size) ** 2
        return pixel_values.new_zeros((0, num_tokens, self.config.hidden_size), dtype=weights[0].dtype) + nothing

    VisionLanguageModel._encode_share = skip_if_empty
    try:
        return play(config, world_size, ranks)
    finally:
        VisionLanguageModel._encode_share = encode
