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


def play_skipping_empty_shares(config, world_size, ranks):
    """Play a model in which a rank without images calls neither tower nor projection."""
    from tests.support.old_behaviour import skipping_empty_shares

    with skipping_empty_shares():
        return play(config, world_size, ranks)
