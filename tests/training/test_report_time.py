from megatron_vlm.training.goodput import TimeSpent
from megatron_vlm.training.report_time import phases_card, time_card
from megatron_vlm.training.run_records import RunRecords


def run_of(metrics=(), time_spent=None):
    return RunRecords(
        run_dir="run",
        metrics=metrics,
        unreadable_lines=0,
        config_text="",
        events=[],
        time_spent=time_spent,
        end=None,
    )


def test_where_the_time_went_is_shown():
    page = time_card(run_of(time_spent=TimeSpent(steps=12.0, start=5.0, save=2.0, lost_steps=1.0)))
    assert "<p>20 s from the first start" in page
    assert "steps that count</td><td>12 s</td><td>60.0%</td>" in page
    assert "lost steps</td><td>1 s</td><td>5.0%</td>" in page
    assert "start</td><td>5 s</td><td>25.0%</td>" in page
    assert "saves</td><td>2 s</td><td>10.0%</td>" in page
    assert '<i class="steps" style="width:60.000%"></i>' in page


def test_phases_of_a_step_are_shown():
    record = {"iteration": 1, "seconds": 0.5, "seconds/data": 0.1, "seconds/forward_backward": 0.3}
    page = phases_card(run_of([record, {**record, "iteration": 2, "seconds/data": 0.2}]))
    assert "<td>forward backward</td><td>0.3 s</td><td>60.0%</td>" in page
    assert "<td>data</td><td>0.15 s</td><td>30.0%</td>" in page


def test_phases_are_parts_of_the_steps_that_have_them():
    records = [{"iteration": 1, "seconds": 9.0}, {"iteration": 2, "seconds": 0.5, "seconds/data": 0.1}]
    assert "<td>data</td><td>0.1 s</td><td>20.0%</td>" in phases_card(run_of(records))


def test_what_is_not_known_is_not_shown():
    assert time_card(run_of()) == time_card(run_of(time_spent=TimeSpent())) == ""
    assert phases_card(run_of([{"iteration": 1, "seconds": 0.5}])) == ""
