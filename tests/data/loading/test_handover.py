"""What a worker hands over arrives as it was, in memory without a name."""

import errno
import multiprocessing
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from megatron_vlm.config import DataError
from megatron_vlm.data.loading.handover import Parcel
from megatron_vlm.data.loading.workers import LoaderWorkers, start_loading

NAME = "/memfd:micro-batch"


@dataclass(frozen=True)
class Item:
    name: str
    tensors: dict
    more: "Item | None" = None


def make_item():
    whole = torch.arange(24).reshape(2, 3, 4)
    tensors = {
        "whole": whole,
        "transposed": whole.transpose(0, 2),
        "part": whole[:, 1:, ::2],
        "uint8": torch.full((1, 3, 5, 7), 255, dtype=torch.uint8),
        "float": torch.tensor([float("nan"), -0.0, float("inf")]),
        "bool": torch.tensor([True, False]),
        "one": torch.tensor(7, dtype=torch.int32),
        "empty": torch.zeros(0, 3, dtype=torch.int64),
    }
    return Item("a", tensors, Item("nothing to map", {"none": torch.zeros(0)}))


def send(pipe, items):
    for item in items:
        pipe.send(Parcel(item))
    pipe.recv()


@pytest.fixture
def receive(monkeypatch, short_folder):
    """Return a function that receives items from another process."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(short_folder))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    processes = []

    def receive(*items):
        processes.append(context.Process(target=send, args=(theirs, items)))
        processes[0].start()
        return [ours.recv() for _ in items]

    yield receive
    ours.send(None)
    processes[0].join()


def maps():
    return Path("/proc/self/maps").read_text().count(NAME)


def assert_same(found, expected):
    assert found.name == expected.name
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        other = found.tensors[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        assert other.numpy().tobytes() == tensor.numpy().tobytes(), name


def test_values_arrive_as_they_were_and_may_be_changed(receive):
    first, second = receive(make_item(), make_item())
    first.tensors["whole"].zero_()
    assert_same(second, make_item())
    assert_same(second.more, make_item().more)


def test_where_memory_has_names_a_file_has_none(receive, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    (found,) = receive(make_item())
    assert_same(found, make_item())


def test_memory_is_free_once_the_tensors_are_gone(receive):
    before = maps()
    first, second = receive(make_item(), make_item())
    kept = first.tensors["one"]
    assert maps() > before
    del first, second
    assert int(kept) == 7
    del kept
    assert maps() == before


class Pictures(Dataset):
    def __getitem__(self, position):
        return torch.full((3, 64, 64), position, dtype=torch.uint8)


def test_what_workers_keep_ready_has_no_name():
    items, end = start_loading(Pictures(), range(10), LoaderWorkers(num_workers=1, prefetch_factor=4))
    assert int(next(items).max()) == 0
    assert int(next(items).max()) == 1
    (worker,) = items._workers
    links = []
    while not any(link.startswith(NAME) for link in links):  # until one is ready
        for one in Path(f"/proc/{worker.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                links.append(os.readlink(one))
    end()
    assert not [link for link in links if link.startswith("/dev/shm/torch")]


def test_memory_that_is_not_to_be_had_is_an_error_of_one_line(monkeypatch):
    def refuse(name):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    create, at_first = os.memfd_create, [True]
    monkeypatch.setattr(os, "memfd_create", lambda name: refuse(name) if at_first and at_first.pop() else create(name))
    items, end = start_loading(Pictures(), range(2), LoaderWorkers(num_workers=1))
    error = next(items)
    end()
    assert isinstance(error, DataError)
    assert "cannot be handed to the trainer: Too many open files (data loader worker); fix: lower" in str(error)
