"""What the metrics of LRPO look like in a healthy run and in four runs that go wrong.

    python -m tools.symptoms --root runs [--lpips_weights FILE]
    python -m tools.symptoms                    the picture again, from docs/data/symptoms.json

The first command trains the five short runs in `RUNS` from ROOT/sft, one after the other, in
ROOT/healthy and so on (drawn faces, about a minute each). Finished runs are not trained again. Both
draw OUT/symptoms.png: a column of panels for each run, with the healthy run in grey.
docs/metrics.md explains it.
"""
import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from support.cli import UserError, make_folder, run_main
from support.log import Log
from tools.claims import ROOT, call, change, folder, write_data

STEPS, EVERY = 30, 5
RUNS = {        # title of the panels: the flags of train.py --mode lrpo
    "healthy": "",
    "reward hacking": "--gt_weight 0",
    "collapse": "--lr 1e-2",
    "clip never acts": "--updates 1",
    "no spread": "--eta .01",
}
PANELS = {      # column of metrics.csv: its label, and whether the axis is logarithmic
    "heldout_reward": ("change of held-\nout reward", False),
    "heldout_psnr": ("change of held-\nout PSNR, dB", False),
    "reward_std": ("reward_std", True),
    "ratio_mean": ("ratio_mean", False),
    "clip_fraction": ("clip_fraction", False),
    "grad_norm": ("grad_norm", True),
}
OTHERS = ("reward", "ratio_max", "equal_groups", "approx_kl", "gt_loss", "gt_weight",
          "fidelity_gap", "heldout_r_face", "heldout_r_lpips", "heldout_ssim")      # kept as well


def train(root: Path, weights: list[str] | None):
    """Train each run that is not done, with the flags `weights`. Raises UserError if ROOT has no
    sft to start from."""
    if not (root / "sft" / "last.pt").exists():
        raise UserError(f"--root {root}: has no sft/last.pt; train.py --mode sft --out {root}/sft")
    for name, flags in RUNS.items():
        out = root / folder(name)
        if not (out / "done").exists():
            call("train.py", "--mode", "lrpo", "--out", out, "--overwrite", "--steps", STEPS,
                 "--every", EVERY, *flags.split(), *weights or ())
            (out / "done").touch()


def collect(root: Path) -> dict:
    """{run: {column: [[step, value], ...]}} of the columns that are drawn or quoted."""
    found = {}
    for name in RUNS:
        rows = Log(root / folder(name) / "metrics.csv").rows
        found[name] = {column: [[int(row["step"]), float(row[column])] for row in rows
                                if row.get(column)] for column in (*PANELS, *OTHERS)}
    return found


def draw(data: dict, path: Path):
    """A line of panels for each metric, a column of them for each run."""
    fig = Figure(figsize=(2 * len(RUNS), 1.15 * len(PANELS)))
    grid = fig.subplots(len(PANELS), len(RUNS), sharex=True)
    for line, (column, (label, log)) in zip(grid, PANELS.items()):
        held_out = column.startswith("heldout")     # drawn as the change, each on its own axis
        for ax, run in zip(line, RUNS):
            if not held_out and ax is not line[0]:
                ax.sharey(line[0])
            for name, color in (("healthy", ".65"), (run, "C2" if run == "healthy" else "C3")):
                steps, values = zip(*data[name][column])
                values = change(values) if held_out else values
                ax.plot(steps, values, color=color, lw=1.4)
            ax.tick_params(labelsize=7)
            ax.set_yscale("log" if log else "linear")
        line[0].set_ylabel(label, fontsize=8)
    for top, bottom, run in zip(grid[0], grid[-1], RUNS):
        top.set_title(run, fontsize=9)
        bottom.set_xlabel("rollout", fontsize=8)
    fig.align_ylabels()
    fig.tight_layout(pad=.6)
    fig.savefig(path, dpi=90)


def main():
    p = argparse.ArgumentParser(description="A healthy run of LRPO and four that go wrong.")
    p.add_argument("--root", type=Path, help="with the runs sft and frm; left out: no training")
    p.add_argument("--out", type=Path, default=ROOT / "docs", help="for symptoms.png (docs)")
    p.add_argument("--lpips_weights", help="file of the LPIPS backbone (default: fetched)")
    args = p.parse_args()
    file = make_folder(args.out / "data") / "symptoms.json"
    if args.root:
        train(args.root.resolve(), args.lpips_weights and ["--lpips_weights", args.lpips_weights])
        write_data(file, collect(args.root))
    elif not file.exists():
        raise UserError(f"--out {args.out}: has no data/symptoms.json to draw; give --root")
    draw(json.loads(file.read_text()), args.out / "symptoms.png")
    print(args.out / "symptoms.png")


if __name__ == "__main__":
    run_main(main)
