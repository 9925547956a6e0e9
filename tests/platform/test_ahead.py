import gc
import threading
import weakref

import pytest

from megatron_vlm.platform.ahead import ahead


def test_items_come_in_their_order_and_an_empty_iteration_ends():
    assert list(ahead(range(20))) == list(range(20))
    assert list(ahead([])) == []


def test_next_item_is_made_while_the_caller_uses_one_but_not_the_one_after():
    made, second = [], threading.Event()

    def items():
        for number in range(5):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    found = ahead(items())
    assert next(found) == 0
    assert second.wait(10)
    assert made == [0, 1]
    found.close()


def test_error_comes_up_in_the_place_of_its_item():
    def items():
        yield 1
        raise OSError("disk")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="disk"):
        next(found)


def test_an_item_that_the_caller_has_dropped_is_not_kept():
    class Item:
        pass

    kept = []
    for item in ahead(Item() for _ in range(3)):
        gc.collect()
        assert [one() for one in kept] == [None] * len(kept)
        kept.append(weakref.ref(item))
        del item
