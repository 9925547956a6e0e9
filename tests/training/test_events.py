from megatron_vlm.platform.files.events import SPIKE, read_events
from megatron_vlm.training.events import note_event
from tests.support.states import make_state


def test_the_reporting_rank_records_the_iteration(tmp_path):
    note_event(make_state(tmp_path, 7), SPIKE, "loss 9.1 after 2.0", samples=[3, 4])
    (event,) = read_events(tmp_path)[0]
    found = (event.kind, event.iteration, event.what, event.details)
    assert found == ("spike", 7, "loss 9.1 after 2.0", {"samples": [3, 4]})


def test_other_ranks_record_nothing(tmp_path):
    note_event(make_state(tmp_path, 7, is_reporter=False), SPIKE, "loss 9.1 after 2.0")
    assert not list(tmp_path.iterdir())
