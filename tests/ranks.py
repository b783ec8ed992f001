"""A function of a test on several ranks, which are forks of it."""

import pickle

import torch
import torch.multiprocessing as mp


def _rank(rank, size, folder, task):
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{size}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    (folder / f"{rank}-of-{size}").write_bytes(pickle.dumps(task(rank, size)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_ranks(size, folder, task) -> list:
    """What task(rank, size) returns on each of several ranks. folder: an empty one, for a size."""
    mp.start_processes(_rank, (size, folder, task), nprocs=size, start_method="fork")
    return [pickle.loads((folder / f"{rank}-of-{size}").read_bytes()) for rank in range(size)]
