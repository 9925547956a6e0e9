from tests.platform.fake_device import programs

GIB = programs.GIB


def test_storage_counts_once_from_its_birth_to_its_death(fake_process):
    (held, after_more, after_all), peaks = fake_process.run(programs.hold_and_release)
    assert (held, after_more, after_all) == (GIB, GIB, 0)
    # Two tensors of 2 bytes an element live while the sum is made.
    assert peaks == {"start": GIB, "step": 5 * GIB}
