"""How many operations a computation takes: a multiplication and an addition count as two."""
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Operations(TorchDispatchMode):
    """Counts the operations of the convolutions, matrix products and attention inside it: `total`,
    by PyTorch's formulas. What is done for each value alone is not counted. PyTorch's own
    FlopCounterMode replaces some functions by others, whose last bits differ, so that a counted
    step would not be the step that is not counted."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Called by PyTorch for each function."""
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
