"""Workers of a loader start, tell what goes wrong, and end."""

import mmap
import multiprocessing
import os
import time
from multiprocessing import resource_sharer
from multiprocessing.connection import Client

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from megatron_vlm.config import DataError
from megatron_vlm.data.loading import workers
from megatron_vlm.data.loading.workers import LoaderWorkers, start_loading


class Squares(Dataset):
    def __getitem__(self, position):
        return torch.tensor(position**2)


@pytest.fixture
def let_hang(monkeypatch, tmp_path):
    """Return a function that has the first worker of so many attempts hang, as if a lock was held at its fork."""
    prepare = workers._prepare

    def let_hang(attempts):
        def prepare_or_hang(parent, folder, started, worker):
            if worker == 0 and len(list(tmp_path.iterdir())) < attempts:
                (tmp_path / str(os.getpid())).touch()
                time.sleep(1000)
            prepare(parent, folder, started, worker)

        monkeypatch.setattr(workers, "_prepare", prepare_or_hang)

    yield let_hang
    assert not [name for name in os.listdir(tmp_path) if psutil.pid_exists(int(name))]


def test_workers_of_which_one_hangs_since_its_fork_are_started_again(let_hang, monkeypatch, caplog):
    monkeypatch.setattr(workers, "_START_SECONDS", 2.0)
    let_hang(1)
    items, end = start_loading(Squares(), range(5, 9), LoaderWorkers(num_workers=2))
    assert [int(item) for item in items] == [25, 36, 49, 64]
    end()
    assert [record.getMessage() for record in caplog.records] == [
        "a data loader worker did not start in 2 s; all are started again"
    ]


def test_workers_that_never_start_are_an_error(let_hang, monkeypatch):
    monkeypatch.setattr(workers, "_START_SECONDS", 0.05)
    let_hang(99)
    with pytest.raises(DataError, match="workers do not start, after 4 attempts .*; fix: lower data.num_workers"):
        start_loading(Squares(), range(3), LoaderWorkers(num_workers=1))


def _hand_over(pipe, folder):
    workers._prepare(os.getppid(), folder, mmap.mmap(-1, 1), 0)
    pipe.send(resource_sharer.DupFd(1)._id)
    pipe.recv()


def test_worker_tells_errors_but_not_that_the_trainer_went_away(capfd, short_folder):
    context = multiprocessing.get_context("fork")
    pipe, theirs = context.Pipe()
    worker = context.Process(target=_hand_over, args=(theirs, short_folder))
    worker.start()
    address, _ = pipe.recv()
    key = multiprocessing.current_process().authkey
    Client(address, authkey=key).close()  # a trainer that is killed before it asks for the tensor
    for _ in range(2):  # once the second is answered, the first is told
        asking = Client(address, authkey=key)
        asking.send(("no such tensor", os.getpid()))
        with pytest.raises(EOFError):
            asking.recv()
    pipe.send(None)
    worker.join()
    errors = capfd.readouterr().err
    assert "KeyError: 'no such tensor'" in errors
    assert "EOFError" not in errors
