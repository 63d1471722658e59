"""LPIPS as a reward: 1 - LPIPS, through its authors' package.

Paper    LPIPS (Zhang et al. 2018, arXiv 1801.03924). The `lpips` package holds the linear layers;
         the ImageNet backbone is fetched by torchvision or read from a file.
"""
import warnings

from torch import Tensor, nn

from support.checkpoint import load_tensors
from support.cli import UserError

LPIPS_MIN_SIDE = {"alex": 31, "vgg": 16, "squeeze": 17}     # in a smaller image a pool is empty


class LPIPS(nn.Module):
    """1 - LPIPS with a backbone `net` (squeeze, alex or vgg).

    `weights` is a file of the backbone's ImageNet features; without it torchvision fetches one.
    Raises UserError if the file is not that backbone's, or if nothing can be fetched.
    """

    def __init__(self, net: str = "squeeze", weights: str = None):
        super().__init__()
        import lpips        # slow to import, so it is imported only when it is needed
        self.min_side = LPIPS_MIN_SIDE[net]
        with warnings.catch_warnings():     # the package calls torchvision by its old names
            warnings.simplefilter("ignore")
            try:
                self.lpips = lpips.LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
            except OSError:
                raise UserError(f"LPIPS: its {net} backbone could not be fetched; give the file "
                                "with --lpips_weights FILE, or use --rewards offline") from None
        if weights is not None:
            load_backbone(self.lpips.net, weights, net)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        """Stays in evaluation mode, so that its dropout never acts."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two images (B, 3, H, W) in [-1, 1] -> (B,), at most 1. Raises UserError if they are
        small."""
        if min(x.shape[-2:]) < self.min_side:
            raise UserError(f"LPIPS: this backbone needs images of {self.min_side} px or more")
        return 1 - self.lpips(x, y).flatten()                           # (B, 1, 1, 1) -> (B,)


def load_backbone(net: nn.Module, path: str, name: str):
    """Copy the tensors of a file into a backbone, in order: torchvision's names differ from those
    of lpips. Raises UserError if the shapes differ."""
    source, target = (load_tensors(path, "--lpips_weights", "without it the backbone is fetched"),
                      list(net.state_dict().values()))
    if isinstance(source, dict):
        source = [v for k, v in source.items() if not k.startswith("classifier")]
    if [getattr(v, "shape", None) for v in source] != [v.shape for v in target]:
        raise UserError(f"--lpips_weights {path}: these are not the features of {name}; "
                        "--lpips_net says which backbone is meant")
    for mine, theirs in zip(target, source):
        mine.copy_(theirs)
