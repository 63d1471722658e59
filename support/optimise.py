"""One optimiser step that every method takes in the same way."""
import math

import torch
from torch import Tensor

from support.distributed import average


def optimiser_step(optimizer, max_norm: float = math.inf) -> Tensor:
    """Average the gradient over the ranks, clip it to the norm `max_norm` and take a step. Returns
    the norm before clipping, (). Nothing waits for the device: a gradient that is not finite is
    found when the metrics are read (`support.log.to_floats`), and then nothing is saved."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average([p.grad for p in parameters if p.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return norm
