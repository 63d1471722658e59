"""The claims of LRPO's and DARL's papers, put to the test: each idea is switched off in turn.

    python -m tools.claims lrpo --root runs --minutes 1 --lpips_weights FILE

--root holds a folder for each seed, 0, 1, 2, with the sft and frm runs of that seed (`train.py
--mode sft --seed S --out ROOT/S/sft`, the same with frm). An arm is one command: `train.py --mode
lrpo --out ROOT/S/ARM` (or darl) with its flags in `ARMS` and --minutes. Finished arms are not
trained again.
    lrpo   every arm for the same time. Writes ROOT/lrpo.md: the change against SFT, mean and
           standard deviation over the seeds, and the distance from SFT's frontier in LPIPS; and
           ROOT/lrpo.png: reward against PSNR over training, for the arms in `DRAWN`
    darl   the same for DARL, without the picture
    demo   80 rollouts as in the demo, with other margins and rewards; --minutes is for SFT
    long   four times the rollouts at margin 0: ROOT/long.png
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from support.log import Log

ROOT = Path(__file__).parents[1]
PLAIN = "--branch off --batch_size 8 --lr 1e-4"     # full trajectories cost eight times as much
PAPER = "--recipe paper --rewards default --lpips_net squeeze --batch_size 8"
LRPO = {
    "ours": "",
    "strategy 1 off: LPIPS alone": "--rewards lpips=1",
    "strategy 1 off: face alone": "--rewards face=1",
    "strategy 2 off: policy gradient alone": "--gt_weight 0",
    "likelihood alone": "--pg_weight 0 --gt_weight 7",
    "weight fixed at 7": "--gt_weight 7",
    "full trajectories": PLAIN,
    "full trajectories, strategy 3 off": f"{PLAIN} --noise_level_weights off",
    "the paper's recipe": PAPER,
    "the paper's recipe, K = 5, lr 1e-4": f"{PAPER} --ddim_steps 5 --lr 1e-4",
    "G = 2": "--group 2 --batch_size 128",
    "G = 4": "--group 4 --batch_size 64",
    "G = 16": "--group 16 --batch_size 16",
    "standard deviation of the batch": "--adv_std batch",
    "K = 3": "--ddim_steps 3",
    "K = 10": "--ddim_steps 10",
    "supervised loss instead": "--mode darl --rewards default --blend .5 --sft_weight 2 --lr 3e-4",
}
DARL = {
    "adaptive": "",
    "half RL for all": "--blend .5",
    "RL on the hard": "--blend hard",
    "RL on the easy": "--blend easy",
    "RL alone": "--blend 1",
    "reward with ground truth": "--rewards ssim=.3,dwt=.7",
    "KL": "--kl_weight .1",
}
DEMO = {
    "as shipped": "--steps 80 --minutes 600",       # the last one of two equal flags counts
    "margin .5": "--fidelity_margin .5 --steps 80 --minutes 600",
    "offline rewards": "--rewards offline --steps 80 --minutes 600",
}
LONG = {"four times the rollouts": "--fidelity_margin 0 --steps 320 --every 20 --minutes 600"}
ARMS = {"lrpo": LRPO, "darl": DARL, "demo": DEMO, "long": LONG}
LONGER = "SFT trained on"       # the baseline: supervised training for the same time
DRAWN = {"strategy 2 off: policy gradient alone": "C3", "likelihood alone": "C0", "ours": "C2"}
COLUMNS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "reward": "reward",
           "r_face": "face", "r_dwt": "low-pass"}


def folder(arm: str) -> str:
    """The name of an arm's run folder."""
    return "".join(c if c.isalnum() else "_" for c in arm)


def call(*command):
    """Run a program of the project. If it fails, this program ends with the same exit code."""
    status = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
    if status:
        sys.exit(status)


def run_seed(root: Path, mode: str, seed: int, minutes: float, weights: list[str]):
    """Train every arm of a seed that is not done, and measure all of them at once."""
    home = root / str(seed)
    for arm, flags in ARMS[mode].items():
        out = home / folder(arm)
        if not (out / "done").exists():         # last.pt may be that of a stopped run
            call("train.py", "--mode", "darl" if mode == "darl" else "lrpo", "--seed", seed,
                 "--out", out, "--steps", 100_000, "--minutes", minutes, "--every", 5,
                 "--overwrite", *flags.split(), *weights)
            (out / "done").touch()
    if mode == "long":
        return
    longer = home / folder(f"{LONGER} {mode}")
    if not (longer / "done").exists():
        shutil.copytree(home / "sft", longer, dirs_exist_ok=True)
        call("train.py", "--mode", "sft", "--seed", seed, "--out", longer, "--resume", "--steps",
             100_000, "--minutes", minutes)
        (longer / "done").touch()
    names = ["sft", longer.name, *map(folder, ARMS[mode])]
    ckpts = [home / name / "last.pt" for name in names]
    call("evaluate.py", "--frontier", "--best_of", 8, "--out", home / f"claims_{mode}", "--rewards",
         "default", *weights, "--ckpt", *ckpts)


def table(root: Path, mode: str, seeds: list[int]) -> str:
    """The markdown table over the seeds, from each metrics.json."""
    found = [json.loads((root / str(seed) / f"claims_{mode}" / "metrics.json").read_text())
             for seed in seeds]
    lines = ["| arm | " + " | ".join([*COLUMNS.values(), "beyond"]) + " |",
             "|---" * (len(COLUMNS) + 2) + "|"]
    names = {folder(arm): arm for arm in [f"{LONGER} {mode}", *ARMS[mode]]}
    names["sft, best of 8"] = "SFT, best of 8 by reward"
    for name, arm in names.items():
        cells = []
        for column in COLUMNS:
            cells.append([f["rows"][name][column] - f["rows"]["sft"][column] for f in found])
        cells.append([f["beyond"]["lpips"][name][0] for f in found])
        lines.append(f"| {arm} | " + " | ".join(
            f"{statistics.mean(c):+.4f}" + (f" ±{statistics.stdev(c):.4f}" if len(c) > 1 else "")
            for c in cells) + " |")
    return "\n".join(lines) + "\n"


def measurements(root: Path, seed: int, arm: str) -> list[dict]:
    """The rows of an arm's metrics.csv that hold a measurement."""
    return [row for row in Log(root / str(seed) / folder(arm) / "metrics.csv").rows
            if row["heldout_psnr"]]


def changes(rows: list[dict], column: str) -> list[float]:
    """The change of a column since the first row."""
    return [float(row[column]) - float(rows[0][column]) for row in rows]


def curves(root: Path, seeds: list[int]):
    """lrpo.png: change of held-out reward against that of PSNR, a line for each seed and arm."""
    fig = Figure(figsize=(6, 4.5))
    ax = fig.subplots()
    for seed in seeds:
        for arm, color in DRAWN.items():
            rows = measurements(root, seed, arm)
            x, y = (changes(rows, k) for k in ("heldout_psnr", "heldout_reward"))
            ax.plot(x, y, ".-", color=color, ms=4, lw=1, label=arm if seed == seeds[0] else None)
        rows = json.loads((root / str(seed) / "claims_lrpo" / "metrics.json").read_text())["rows"]
        x, y = (rows[folder(f"{LONGER} lrpo")][k] - rows["sft"][k] for k in ("psnr", "reward"))
        ax.plot(x, y, "ks", label=LONGER if seed == seeds[0] else None)
    ax.axvline(0, color=".8", lw=.8, zorder=0)
    ax.axhline(0, color=".8", lw=.8, zorder=0)
    ax.set(xlabel="change of held-out PSNR, dB", ylabel="change of held-out reward")
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(root / "lrpo.png", dpi=90)


def over_time(root: Path, seeds: list[int], arm: str):
    """long.png: held-out reward, LPIPS and PSNR of one arm against the rollout."""
    names = {"heldout_reward": "reward", "heldout_r_lpips": "1 - LPIPS", "heldout_psnr": "PSNR, dB"}
    fig = Figure(figsize=(11, 3))
    for ax, (column, name) in zip(fig.subplots(1, 3), names.items()):
        for seed in seeds:
            rows = measurements(root, seed, arm)
            ax.plot([int(row["step"]) for row in rows], changes(rows, column), ".-",
                    label=f"seed {seed}")
        ax.axhline(0, color=".8", lw=.8, zorder=0)
        ax.set(xlabel="rollout", title=f"change of held-out {name}")
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(root / "long.png", dpi=80)


def main():
    p = argparse.ArgumentParser(description="A method's ideas switched off in turn, over seeds.")
    p.add_argument("mode", choices=list(ARMS))
    p.add_argument("--root", type=Path, default=Path("runs"), help="a folder for each seed (runs)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--minutes", type=float, default=1.0, help="of training for each arm (1)")
    p.add_argument("--lpips_weights", help="file of the LPIPS backbone (default: fetched)")
    args = p.parse_args()
    weights = ["--lpips_weights", args.lpips_weights] if args.lpips_weights else []
    for seed in args.seeds:
        run_seed(args.root.resolve(), args.mode, seed, args.minutes, weights)
    if args.mode == "long":
        return over_time(args.root, args.seeds, next(iter(LONG)))
    if args.mode == "lrpo":
        curves(args.root, args.seeds)
    text = table(args.root, args.mode, args.seeds)
    (args.root / f"{args.mode}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
