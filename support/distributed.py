"""Several processes on one run, as torchrun starts them: each takes an equal share of every batch.

Steps    1. Every rank draws the random numbers of the whole batch, and keeps its rows.
                                                               `gaussian`, `uniform`
         2. Each rank computes the gradient of its rows. The gradients are averaged, so that all
            ranks take the same optimiser step.                           `average`
         3. What needs the whole batch gets the rows of all ranks.        `gather`
         4. Rank 0 alone measures, prints and writes.                     `is_first`
So any number of ranks trains what one process trains, up to the order of summation.

DistributedDataParallel would average after every backward pass. A step of LRPO has one for each
sampling step, and needs a single average: `average`.
"""
import atexit
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from support.cli import UserError

_alone = False      # whether this process works for itself, see `alone`


def join():
    """Meet the other processes of torchrun, if there are any. Ranks above 0 print errors only."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
        if not is_first():
            sys.stdout = open(os.devnull, "w")


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def place() -> tuple[int, int]:
    """The number of this rank and how many there are: (0, 1) for a single process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not _alone \
        else (0, 1)


@contextmanager
def alone(when: bool = True):
    """Inside, every rank does the whole work by itself, and nothing is shared."""
    global _alone
    before, _alone = _alone, _alone or when
    try:
        yield
    finally:
        _alone = before


def own_rows(rows: Tensor) -> Tensor:
    """This rank's rows (N, ...) of those of the whole batch (ranks * N, ...)."""
    rank, ranks = place()
    return rows if ranks == 1 else rows.chunk(ranks)[rank]


def gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise with the shape, dtype and device of `like` (N, ...). It is drawn on the
    CPU, so that it is the same on every device."""
    noise = torch.randn(len(like) * place()[1], *like.shape[1:], generator=generator,
                        dtype=like.dtype, pin_memory=like.is_cuda)
    return own_rows(noise).to(like.device, non_blocking=True)


def uniform_integers(high: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """An integer 0 .. high-1 for each row of `like` (N, ...), int64 (N,) on its device."""
    drawn = torch.randint(high, (len(like) * place()[1],), generator=generator,
                          pin_memory=like.is_cuda)
    return own_rows(drawn).to(like.device, non_blocking=True)


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """A number from [0, 1) for each row of `like` (N, ...), float32 (N,) on its device."""
    drawn = torch.rand(len(like) * place()[1], generator=generator, pin_memory=like.is_cuda)
    return own_rows(drawn).to(like.device, non_blocking=True)


def gather(rows: Tensor) -> Tensor:
    """The rows of the whole batch (ranks * N, ...) from each rank's (N, ...): undoes `own_rows`."""
    _, ranks = place()
    if ranks == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def average(tensors: list[Tensor]):
    """Replace each tensor by its mean over the ranks, in one message."""
    _, ranks = place()
    if ranks > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / ranks).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


def maximum(*values: int) -> list[int]:
    """The maximum of each value over the ranks: if one must stop, all stop at the same step."""
    _, ranks = place()
    if ranks == 1:
        return list(values)
    both = torch.tensor(values)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return both.tolist()


def wait():
    """Wait until every rank is here: a file that rank 0 wrote before it is there for all."""
    if dist.is_initialized():
        dist.barrier()


def check_batch(batch_size: int):
    """Raises UserError if a batch has no equal shares."""
    if batch_size % place()[1]:
        raise UserError(f"--batch_size {batch_size}: must be a multiple of the {place()[1]} "
                        "processes of torchrun")
