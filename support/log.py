"""The metrics of a run: metrics.csv, one row for each step, and the curves drawn from it."""
import csv
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from support.checkpoint import replacing
from support.cli import UserError, read_table
from support.distributed import gather


class NotFinite(UserError):
    """A metric of a training step is NaN or infinite."""


def check_finite(metrics: dict[str, float]):
    """Raises NotFinite with the names of those metrics that are not finite."""
    if names := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise NotFinite(f"{', '.join(names)}: not finite")


def to_floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as plain numbers, the mean over the ranks (for a name in _max the largest). One
    transfer serves all: it is the one time that a step waits for the device. Raises NotFinite."""
    rows = gather(torch.stack([v.float() for v in metrics.values()])[None]).tolist()    # of ranks
    numbers = {name: max(column) if name.endswith("_max") else sum(column) / len(column)
               for name, column in zip(metrics, zip(*rows))}
    check_finite(numbers)
    return numbers


class Log:
    """The rows of metrics.csv. It is written before each checkpoint, so that it never lacks a row
    that the checkpoint counts; later rows are dropped when a run goes on."""

    def __init__(self, path: Path, start: float = math.inf):
        """Reads the rows up to step `start` of a run that goes on; none for start = 0. Raises
        UserError if the file is there, but holds something else than numbers."""
        self.path, self.rows = path, []
        if start and path.exists():
            try:
                rows, _ = read_table(path)
                [float(cell) for row in rows for cell in row.values() if cell]
                self.rows = [row for row in rows if int(row["step"]) <= start]
            except (KeyError, TypeError, ValueError, csv.Error) as error:
                raise UserError(f"{path}: not as the run wrote it ({error}); delete it, and the "
                                "run goes on with a new one") from None

    def names(self) -> list[str]:
        """Every column, in the order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def write(self):
        """Write all rows. A column that a row lacks stays empty there."""
        with replacing(self.path) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.names(), restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    def curves(self, path: Path):
        """A small panel for each column, against the step."""
        names = self.names()[2:]                # all but step and seconds
        lines = -(-len(names) // 4)
        fig = Figure(figsize=(14, 2.4 * lines))
        axes = fig.subplots(lines, 4, squeeze=False)
        for ax in axes.flat[len(names):]:
            ax.axis("off")
        for ax, name in zip(axes.flat, names):
            rows = [row for row in self.rows if row.get(name) not in (None, "")]
            points = [(int(row["step"]), float(row[name])) for row in rows]
            ax.plot(*zip(*points), marker="." if len(points) < 30 else "")
            ax.set_title(name, fontsize=9)
        fig.tight_layout()
        with replacing(path) as part:
            fig.savefig(part, dpi=70, format="png")


COLLAPSE = 1.0      # ours: dB of held-out PSNR below the start; no method at its defaults loses .5


def warn_of_collapse(log: Log, out: Path):
    """One line when the held-out PSNR is far below the start for two measurements."""
    psnr = [float(row["heldout_psnr"]) for row in log.rows if row.get("heldout_psnr")]
    low = [value < psnr[0] - COLLAPSE for value in psnr]
    if low[-2:] == [True, True] and not all(low[-3:-2]):
        reward = [float(row["heldout_reward"]) for row in log.rows if row.get("heldout_reward")]
        tqdm.write(f"held-out PSNR is more than {COLLAPSE} dB below the start, twice: " + (
            f"--lr is too high, and {out / 'best.pt'} is from before" if reward[-1] < reward[0] else
            "the reward is being hacked, and best.pt with it; give the likelihood more weight "
            "(lrpo: --gt_weight auto, or a lower --fidelity_margin)"))


def plan(run, net, photos: int, start: int) -> str:
    """What a run will do, in one line."""
    size = sum(p.numel() for p in net.parameters()) / 1e6
    text = (f"{run.mode}: {photos:,} training photos of {run.size} px, {size:.2f} M parameters, "
            f"from step {start} to {run.steps:,}, {run.batch_size} images each")
    if hasattr(run, "group"):
        text += f" x {run.group} restorations of {run.ddim_steps} DDIM steps"
    if hasattr(run, "rewards"):
        text += f"; rewards {run.rewards}"
    limit = "" if run.tflop is None else f"; at most {run.tflop:.3g} TFLOP"
    return f"{text}{limit}; to {run.out}"
