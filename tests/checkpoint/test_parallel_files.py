"""Each byte of a checkpoint is written by one rank, and read by one of each group of data-parallel ranks."""

import pytest

from tests.support.configs import tiny_run

pytestmark = pytest.mark.distributed
LAYOUTS = {
    "dp2": (2, {}),
    "dp2_plain_optimizer": (2, {"use_distributed_optimizer": False}),
    "tp2_dp2": (4, {"tensor_model_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_is_written_once_and_read_once_by_data_parallel_ranks(workers, tmp_path, layout):
    world_size, parallel = LAYOUTS[layout]
    config = tiny_run(str(tmp_path), parallel=parallel, training={"precision": "bf16"})
    ranks = workers.run("tests.support.file_jobs:save_and_read", world_size, config=config)
    assert sum(rank.num_written for rank in ranks) == ranks[0].num_in_all
    num_read = sum(rank.num_read for rank in ranks)
    if "tensor_model_parallel_size" in parallel:
        # Both groups of data-parallel ranks read the tower.
        assert ranks[0].num_stored < num_read < 2 * ranks[0].num_stored
    else:
        assert num_read == ranks[0].num_stored
    assert all(rank.num_announced >= rank.num_written - rank.largest for rank in ranks)
    # The first ranks hold an even share; on the others of TP 2 the tower leaves one with more than that.
    assert ranks[0].num_announced == pytest.approx(ranks[0].num_written, abs=ranks[0].largest)
    assert max(r.num_announced for r in ranks) == pytest.approx(max(r.num_written for r in ranks), abs=ranks[0].largest)
    if layout.startswith("dp2"):
        assert ranks[0].num_written == pytest.approx(ranks[1].num_written, abs=ranks[0].largest)
