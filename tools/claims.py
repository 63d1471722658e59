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
The numbers behind table and picture go to ROOT/MODE.json. Those of docs/results.md are in
docs/data, and `python -m tools.tables` prints them.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
from itertools import product
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
    "LRPO as shipped": "--steps 80 --minutes 600",       # the last one of two equal flags counts
    "LRPO, margin .5": "--fidelity_margin .5 --steps 80 --minutes 600",
    "LRPO, offline rewards": "--rewards offline --steps 80 --minutes 600",
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


def collect(root: Path, mode: str, seeds: list[int]) -> dict[str, dict[str, list[float]]]:
    """{arm: {column: its change against SFT, for each seed}} from each metrics.json. The column
    "beyond" is the distance from SFT's frontier in LPIPS."""
    found = [json.loads((root / str(seed) / f"claims_{mode}" / "metrics.json").read_text())
             for seed in seeds]
    names = {folder(f"{LONGER} {mode}"): LONGER, **{folder(arm): arm for arm in ARMS[mode]},
             "sft, best of 8": "SFT, best of 8 by reward"}
    return {arm: {column: [f["rows"][name][column] - f["rows"]["sft"][column] for f in found]
                  for column in COLUMNS}
            | {"beyond": [f["beyond"]["lpips"][name][0] for f in found]}
            for name, arm in names.items()}


def lay_out(first: str, columns: dict[str, str], rows: dict[str, dict], cell) -> str:
    """A markdown table. `first` heads the column of names; columns {key: title}; rows {name: {key:
    numbers}}; cell(key, *numbers) is the text of a cell, and a missing key leaves it empty."""
    line = lambda cells: "|" + "|".join(f" {text} " if text else " " for text in cells) + "|\n"
    return "".join([line([first, *columns.values()]), "|---" * (len(columns) + 1) + "|\n"] + [
        line([name, *(cell(key, *row[key]) if key in row else "" for key in columns)])
        for name, row in rows.items()])


def as_table(arms: dict[str, dict[str, list[float]]]) -> str:
    """The markdown table of mean and standard deviation over the seeds, from `collect`."""
    return lay_out("arm", COLUMNS | {"beyond": "beyond"}, arms, lambda _, *values: (
        f"{statistics.mean(values):+.4f}"
        + (f" ±{statistics.stdev(values):.4f}" if len(values) > 1 else "")))


def history(root: Path, seeds: list[int], arms, columns) -> dict:
    """{arm: {seed: {column: its measurements}}} for the columns of metrics.csv, without `heldout_`,
    and for "step"."""
    found = {arm: {} for arm in arms}
    for arm, seed in product(arms, seeds):
        log = Log(root / str(seed) / folder(arm) / "metrics.csv")
        rows = [row for row in log.rows if row["heldout_psnr"]]
        found[arm][str(seed)] = {"step": [int(row["step"]) for row in rows]} | {
            column: [float(row[f"heldout_{column}"]) for row in rows] for column in columns}
    return found


def change(values: list[float]) -> list[float]:
    """The change since the first measurement."""
    return [value - values[0] for value in values]


def rounded(data):
    """Numbers with six significant digits, so that no table of four is rounded twice."""
    if isinstance(data, dict):
        return {name: rounded(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [rounded(value) for value in data]
    return float(f"{data:.6g}") if isinstance(data, float) else data


def write_data(path: Path, data: dict):
    """Write a small data file, as in docs/data: JSON with a line for each entry of each part."""
    part = lambda value: "{\n" + ",\n".join(
        f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "}"
    path.write_text("{\n" + ",\n".join(
        f" {json.dumps(k)}: {part(v) if isinstance(v, dict) else json.dumps(v)}"
        for k, v in rounded(data).items()) + "\n}\n")


def curves(data: dict, path: Path):
    """lrpo.png: change of held-out reward against that of PSNR, a line for each seed and arm.
    data: "history" of the arms in `DRAWN`, and "arms"."""
    fig = Figure(figsize=(6, 4.5))
    ax = fig.subplots()
    for arm, color in DRAWN.items():
        for i, seed in enumerate(data["history"][arm].values()):
            ax.plot(change(seed["psnr"]), change(seed["reward"]), ".-", color=color, ms=4, lw=1,
                    label=None if i else arm.removeprefix("strategy 2 off: "))
    ax.plot(data["arms"][LONGER]["psnr"], data["arms"][LONGER]["reward"], "ks", label="SFT longer")
    ax.axvline(0, color=".8", lw=.8, zorder=0)
    ax.axhline(0, color=".8", lw=.8, zorder=0)
    ax.set(xlabel="change of held-out PSNR, dB", ylabel="change of held-out reward")
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=90)


def over_time(data: dict, path: Path):
    """long.png: held-out reward, LPIPS and PSNR of one arm against the rollout. data: "history"."""
    (seeds,) = data["history"].values()
    names = {"reward": "reward", "r_lpips": "1 - LPIPS", "psnr": "PSNR, dB"}
    fig = Figure(figsize=(11, 3))
    for ax, (column, name) in zip(fig.subplots(1, 3), names.items()):
        for seed, values in seeds.items():
            ax.plot(values["step"], change(values[column]), ".-", label=f"seed {seed}")
        ax.axhline(0, color=".8", lw=.8, zorder=0)
        ax.set(xlabel="rollout", title=f"change of held-out {name}")
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=80)


def save(root: Path, mode: str, seeds: list[int]):
    """Write the data of a mode as ROOT/MODE.json, and from them its table and picture."""
    data = {} if mode == "long" else {"arms": collect(root, mode, seeds)}
    if mode == "lrpo":
        data["history"] = history(root, seeds, DRAWN, ["psnr", "reward"])
        curves(data, root / "lrpo.png")
    if mode == "long":
        data["history"] = history(root, seeds, LONG, ["psnr", "reward", "r_lpips"])
        over_time(data, root / "long.png")
    else:
        (root / f"{mode}.md").write_text(as_table(data["arms"]))
        print(as_table(data["arms"]))
    write_data(root / f"{mode}.json", data)


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
    save(args.root, args.mode, args.seeds)


if __name__ == "__main__":
    main()
