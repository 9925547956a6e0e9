"""metrics.jsonl is read as far as it is whole."""

from megatron_vlm.platform.files.metrics import read_metrics, read_records


def test_a_repeated_iteration_counts_once_and_half_a_line_not_at_all(tmp_path):
    lines = [
        '{"iteration": 1, "loss": 3.0}',
        '{"iteration": 2, "loss": 2.0}',
        "[5]",
        '{"iteration": 2, "loss": 2.5}',
        '{"iteration": 2, "validation_loss": 2.75}',
        '{"iteration": 3, "los',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    assert read_metrics(tmp_path) == [
        {"iteration": 1, "loss": 3.0},
        {"iteration": 2, "loss": 2.5, "validation_loss": 2.75},
    ]
    assert read_records(tmp_path)[1] == 2


def test_a_run_without_records_has_none(tmp_path):
    assert read_metrics(tmp_path) == []
