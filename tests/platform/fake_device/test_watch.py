from tests.platform.fake_device import programs


def test_host_reads_the_values_that_it_gave(fake_process):
    before, lengths, last, after, changed, unknown = fake_process.run(programs.read_values)
    assert (before, after) == ({}, {"read": 2})
    assert (lengths, last) == ([3, 7], 10)
    # After a change in place nothing is known.
    assert (changed, unknown) == ([1, 1, 1], 1.0)


def test_every_wait_is_counted_once(fake_process):
    seen = fake_process.run(programs.wait_in_all_ways)
    one_read, one_copy, one_synchronisation = {"read": 1}, {"copy": 1}, {"synchronize": 1}
    assert seen[:6] == [one_read] * 5 + [{"read": 2}]
    assert seen[6:9] == [one_synchronisation] * 3
    assert seen[9:12] == [one_copy] * 3
    assert seen[12:] == [{}] * 3


def test_tensors_of_the_host_stay_real(fake_process):
    total, total_by_numpy, waits, peak = fake_process.run(programs.stay_real_on_host)
    assert (total, total_by_numpy) == (9 + 45, 45)
    assert (waits, peak) == ({}, 0)
