"""Let go of the models of a finished test."""

import gc

from megatron.core.distributed import DistributedDataParallel


def release_models() -> None:
    """Free models and their process groups.

    megatron-core's gradient hooks and the autograd nodes they hang on hold each other, out of the garbage collector's
    sight, and with them the wrapped model; it is emptied, since every gloo group that it knows has threads that poll.
    """
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel):
            vars(thing).clear()
    gc.collect()
