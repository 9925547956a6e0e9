from tests.platform.fake_device import programs

ALL, PAIR = ("all ranks", (0, 1, 2, 3)), ("tensor model parallel", (1, 3))


def test_calls_are_recorded_in_order_with_group_sizes_and_peer(fake_process):
    calls, gathered = fake_process.run(programs.call_collectives)
    assert calls == [
        ("allreduce", *ALL, "float32", (6,), None),
        ("allgather", *PAIR, "float32", (6,), None),
        ("reduce_scatter", *PAIR, "float32", (12,), None),
        ("broadcast", *PAIR, "float32", (6,), 3),
        ("send", *ALL, "float32", (6,), 3),
        ("recv", *ALL, "float32", (12,), 0),
        ("allreduce", *PAIR, "float32", (6,), None),
        ("all_gather_object", *ALL, "object", (), None),
    ]
    assert gathered == ["mine"] * 4
