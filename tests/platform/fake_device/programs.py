"""What tests run on the fake device; each function returns plain values."""

from collections import Counter

import torch

GIB = 2**30


def waits(watch):
    """Return how often the host waited, by kind."""
    counts = Counter()
    for (wait, _), count in watch.waits.items():
        counts[wait.kind] += count
    return dict(counts)


def hold_and_release():
    from megatron_vlm.platform.fake_device.device import fake_device

    with fake_device() as watch:
        held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
        with_view = held[10:], held.view(2, -1)
        sizes = [watch.memory.now]
        with watch.memory.during("step"):
            more = torch.empty(GIB, dtype=torch.bfloat16, device="cuda") + 1
            del more
        sizes.append(watch.memory.now)
        del held, with_view
        sizes.append(watch.memory.now)
        return sizes, watch.memory.peaks


def keep_for_backward(name):
    """Return the bytes that an operation adds for each element of its input, and keeps until the backward pass."""
    from megatron_vlm.platform.fake_device.device import fake_device

    with fake_device() as watch:
        x = torch.zeros(1, 16, 512, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.ones(64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        before = watch.memory.now
        operations = {
            "rms_norm": lambda: torch.nn.functional.rms_norm(x, (64,), weight, 1e-5),
            "attention": lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x),
            "causal": lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
        }
        out = operations[name]()
        kept = watch.memory.now - before
        out.sum().backward()
        return kept / x.numel(), tuple(x.grad.shape), str(x.grad.device)


def read_values():
    from megatron_vlm.platform.fake_device.device import fake_device, on_host

    with fake_device() as watch:
        with on_host():
            borders = torch.tensor([0, 3, 10], dtype=torch.int32)
        on_device = borders.to("cuda", non_blocking=True)
        found = [waits(watch), on_device.diff().tolist(), int(on_device[-1]), waits(watch)]
        on_device += 1
        return [*found, on_device.tolist(), torch.zeros(2, device="cuda").sum().item()]


def wait_in_all_ways():
    from megatron_vlm.platform.fake_device.device import fake_device

    with fake_device() as watch:
        x = torch.zeros(3, device="cuda")
        seen = []
        for wait in (
            lambda: x.sum().item(),
            lambda: bool(x.any()),
            lambda: float(x[0]),
            lambda: x.tolist(),
            lambda: torch.equal(x, x),
            lambda: torch.tensor([x[0], x[1]]),
            lambda: torch.cuda.synchronize(),
            lambda: torch.cuda.Event().synchronize(),
            lambda: torch.cuda.current_stream().synchronize(),
            lambda: x.cpu(),
            lambda: torch.tensor([1.0, 2.0], device="cuda"),
            lambda: torch.empty(3).copy_(x),
            lambda: x.to("cpu", non_blocking=True),
            lambda: torch.zeros(3, device="cuda") + x.mul(2),
            lambda: torch.full((), 3, device="cuda"),
        ):
            watch.start_recording()
            wait()
            seen.append(waits(watch))
        return seen


def convert_modules():
    from megatron_vlm.platform.fake_device.device import fake_device

    with fake_device():
        first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        second.weight = first.weight
        first.weight.mark = "kept"
        both = torch.nn.Sequential(first, second, torch.nn.BatchNorm1d(4)).cuda().bfloat16()
        weight = both[0].weight
        return (
            str(weight.device),
            str(weight.dtype),
            weight is both[1].weight,
            weight.mark,
            weight.requires_grad,
            str(both[2].running_mean.device),
            weight.type(),
        )


def stay_real_on_host():
    from megatron_vlm.platform.fake_device.device import fake_device, on_host

    with on_host():
        ids = torch.arange(10)
    with fake_device() as watch:
        total = int((ids != 3).cumsum(0)[-1] + torch.cat([ids, ids.new_zeros(2)]).sum())
        return total, ids.numpy().sum().item(), waits(watch), watch.memory.peak


def call_collectives():
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_vlm.platform.fake_device.device import fake_device

    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        pair = distributed.new_group([1, 3], group_desc="TENSOR_MODEL_PARALLEL_GROUP")
        with fake_device() as watch:
            x, two = torch.zeros(6, device="cuda"), torch.zeros(12, device="cuda")
            distributed.all_reduce(x)
            distributed.all_gather_into_tensor(two, x, group=pair)
            distributed.reduce_scatter_tensor(x, two, group=pair)
            distributed.broadcast(x, src=3, group=pair)
            for work in distributed.batch_isend_irecv(
                [distributed.P2POp(distributed.isend, x, 3), distributed.P2POp(distributed.irecv, two, 0)]
            ):
                work.wait()
            with distributed._coalescing_manager(pair):
                distributed.all_reduce(x, group=pair)
            gathered = [None] * 4
            distributed.all_gather_object(gathered, "mine")
            calls = [(c.op, c.group.name, c.group.ranks, c.dtype, c.sizes, c.peer) for c in watch.collectives.calls]
        return calls, gathered
    finally:
        distributed.destroy_process_group()
