import json

from megatron_vlm.training.metrics import MetricsWriter, log_line

RECORD = {
    "iteration": 3,
    "consumed_samples": 12,
    "seconds": 0.5,
    "tokens_per_s": 4000.0,
    "learning_rate": 1e-3,
    "loss": 2.5,
    "grad_norm": 1.25,
    "padding": 0.05,
    "loss/coyo": 2.0,
}


def write(run_dir, resumed, iterations):
    writer = MetricsWriter(run_dir, resumed)
    for iteration in iterations:
        writer.write({"iteration": iteration, "loss": 1.0, "run": resumed})
    writer.close()


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_resumed_iteration_are_replaced(tmp_path):
    write(tmp_path, 0, range(1, 6))
    write(tmp_path, 3, range(4, 7))
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["run"] for line in lines(tmp_path)] == [0, 0, 0, 3, 3, 3]


def test_a_line_cut_short_by_a_kill_goes(tmp_path):
    write(tmp_path, 0, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"iteration": 4, "lo')
    write(tmp_path, 3, [4])
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_log_line_is_in_megatrons_form_and_names_each_source():
    line = log_line(RECORD, 10)
    assert line.startswith("iteration        3/      10 | consumed samples:         12 | ")
    assert "lm loss: 2.500000E+00 |" in line
    assert line.endswith("loss/coyo: 2.0000 |")
