"""One optimiser step that every method takes in the same way."""
import math

import torch
from torch import Tensor

from support.cli import UserError
from support.distributed import average


class NotFinite(UserError):
    """A quantity of a training step is NaN or infinite."""


def optimiser_step(optimizer, metrics: dict[str, Tensor], max_norm: float = math.inf) -> Tensor:
    """Average the gradient over the ranks, clip it to the norm `max_norm` and take a step. Returns
    the norm before clipping, ().

    Raises NotFinite, and changes nothing, if the gradient or one of `metrics`, of any shape, is not
    finite. The message names those that are not: there it began."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average([p.grad for p in parameters if p.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    total = norm + sum(value.detach().float().mean() for value in metrics.values())
    if not total.isfinite():        # one wait for the device serves all
        check_finite(metrics)
        raise NotFinite("the gradient is not finite")
    optimizer.step()
    return norm


def check_finite(metrics: dict[str, Tensor]):
    """Raises NotFinite with the names of those metrics, of any shape, that are not finite."""
    names = [name for name, value in metrics.items() if not value.isfinite().all()]
    if names:
        raise NotFinite(f"{', '.join(names)}: not finite")
