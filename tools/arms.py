"""Run arms of an experiment over several seeds, and print what each of them changed.

    python -m tools.arms run ours likelihood_off --root runs/arms --seeds 0 1 2 --steps 40
    python -m tools.arms table --root runs/arms --json docs/data/NAME.json
    python -m tools.arms table --from docs/data/NAME.json

An arm is a name and its flags of train.py: `ARMS`. `run` trains ROOT/SEED/ARM from ROOT/SEED/sft
(made by train.py --mode sft --seed SEED --out ROOT/SEED/sft), or from --init. Flags that it does
not know (--tflop, for equal budgets) go to train.py, before the arm's own, so that those count. An
arm that is done (it has a file `done`) is left as it is, and one that was stopped goes on. Then
evaluate.py compares all arms of the seed that are done with what they started from, in
ROOT/SEED/evaluation.
`table` prints the mean and, unless all are equal, the standard deviation over the seeds: of the
start, and of the change that each arm makes. "beyond" (with --frontier) is the distance from the
start's frontier itself. docs/data keeps the numbers, a value for each seed. A document marks a
table by the line
`<!-- tools.arms table docs/data/NAME.json -->` above it.
"""
import argparse
import json
import subprocess
import sys
from itertools import repeat
from pathlib import Path
from statistics import mean, stdev

from settings import METHODS
from support.cli import RewardFiles, UserError, add_flags, run_main, settings_fields

FULL = "lrpo --own_steps 0 --batch_size 8 --lr 1e-4"    # a rollout costs eight times as much
PAPER = "lrpo --recipe paper --rewards default --lpips_net squeeze --batch_size 8"
ARMS = {        # name: mode and flags
    "sft_longer": "sft --steps 1000000",        # the baseline that others must beat: give --tflop
    "ours": "lrpo", "credit_0": "lrpo --credit 0", "margin_0": "lrpo --fidelity_margin 0",
    "offline": "lrpo --rewards offline",                                                # strategy 1
    "lpips_alone": "lrpo --rewards lpips=1", "face_alone": "lrpo --rewards face=1",
    "likelihood_off": "lrpo --gt_weight 0", "margin_half": "lrpo --fidelity_margin .5",
    "likelihood_alone": "lrpo --pg_weight 0 --gt_weight 7",                             # strategy 2
    "full": FULL, "full_unweighted": f"{FULL} --noise_level_weights off",               # strategy 3
    "paper": PAPER, "paper_fast": f"{PAPER} --ddim_steps 5 --lr 1e-4",
    "group_2": "lrpo --group 2 --batch_size 128", "group_16": "lrpo --group 16 --batch_size 16",
    "refl": "refl", "refl_fixed": "refl --frm_update_every 0",
    "refl_offline": "refl --rewards offline",
    "refl_paper": "refl --recipe paper --lpips_net squeeze --ddim_steps 5 --lr 1e-4",
    "darl": "darl", "darl_half": "darl --blend .5", "darl_rl": "darl --blend 1",
    "darl_hard": "darl --blend hard", "darl_easy": "darl --blend easy",
    "darl_gt": "darl --rewards ssim=.3,dwt=.7", "darl_kl": "darl --kl_weight .1"}
FILES = settings_fields(RewardFiles)


def call(*command):
    """Run a program of the project; if it fails, this one ends with its exit code."""
    if status := subprocess.run([sys.executable, *map(str, command)]).returncode:
        sys.exit(status)


def run(args, words: list[str]):
    """Train the arms of each seed that are not done, and compare them. `words`: the flags for
    train.py."""
    files = [word for name in FILES if name in args for word in (f"--{name}", getattr(args, name))]
    for seed in args.seeds:
        home = args.root / str(seed)
        start = args.init or home / "sft" / "last.pt"
        for arm in args.arms:
            out, (mode, *own) = home / arm, ARMS[arm].split()
            if not (out / "done").exists():
                call("train.py", "--mode", mode, "--seed", seed, "--out", out, "--init", start,
                     *words, *files * METHODS[mode].rewarded, *own,
                     *["--resume"] * (out / "last.pt").exists())
                (out / "done").touch()
        done = [home / arm / "last.pt" for arm in ARMS if (home / arm / "done").exists()]
        judge = ["--judge_weights", args.judge_weights] if args.judge_weights else []
        call("evaluate.py", "--out", home / "evaluation", "--rewards", "default", *files, *judge,
             *["--frontier"] * args.frontier, "--ckpt", start, *done)


def collect(root: Path) -> dict[str, dict[str, list[float]]]:
    """{row: {column: its value for each seed}} of each ROOT/SEED/evaluation/metrics.json, for the
    rows that every seed has; the start is the first. Raises UserError if there is none."""
    files = sorted(root.glob("*/evaluation/metrics.json"))
    found = [json.loads(path.read_text()) for path in files]
    if not found:
        raise UserError(f"--root {root}: has no SEED/evaluation/metrics.json; run arms first")
    for facts in found:
        for name, places in facts.get("beyond", {}).items():
            for label, (distance, _) in places.items():
                facts["rows"][label][f"beyond, {name}"] = distance
    return {label: {column: [float(f"{facts['rows'][label][column]:.6g}") for facts in found]
                    for column in found[0]["rows"][label]}
            for label in found[0]["ckpt"] if all(label in facts["ckpt"] for facts in found)}


def table(data: dict[str, dict[str, list[float]]]) -> str:
    """The markdown table of what `collect` returns; an arrow says what is better, more or less. A
    term of the reward that has a column of its own (ssim, lpips) is left out."""
    first = next(iter(data.values()))
    columns = [name for name in list(data.values())[-1] if name.removeprefix("r_") not in first
               or not name.startswith("r_")]
    titles = [f"{name} {'↓' if name.startswith('lpips') else '↑'}" for name in columns]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for label, row in data.items():
        lines.append(f"| {label} ")
        for name in columns:
            base = first.get(name, repeat(0)) if row is not first else repeat(0)
            values = [v - b for v, b in zip(row.get(name, ()), base)]
            sign = "" if row is first else "+"
            lines[-1] += "| " + (f"{mean(values):{sign}.4f} " if values else "")
            lines[-1] += f"±{stdev(values):.4f} " if len({*values}) > 1 else ""
        lines[-1] += "|"
    return "\n".join(lines) + "\n"


def main(argv=None):
    p = argparse.ArgumentParser(description="Arms of an experiment, over seeds.")
    commands = p.add_subparsers(dest="command", required=True)
    run_ = commands.add_parser("run", allow_abbrev=False, help="train and compare; flags that are "
                               "not listed here go to train.py")
    run_.add_argument("arms", nargs="+", metavar="ARM", choices=ARMS, help=", ".join(ARMS))
    run_.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    run_.add_argument("--frontier", action="store_true", help="as of evaluate.py")
    run_.add_argument("--init", help="restorer to start from; left out: ROOT/SEED/sft/last.pt")
    run_.add_argument("--judge_weights", help="as of evaluate.py")
    add_flags(run_, FILES, only_given=True)
    table_ = commands.add_parser("table", allow_abbrev=False, help="print the table")
    table_.add_argument("--json", type=Path, help="also write the numbers to this file")
    table_.add_argument("--columns", nargs="+", help="these only (all)")
    table_.add_argument("--from", dest="file", type=Path, help="take them from such a file")
    for q in (run_, table_):
        q.add_argument("--root", type=Path, default=Path("runs/arms"), help="(runs/arms)")
    args, words = p.parse_known_args(argv)
    if args.command == "run":
        return run(args, words)
    if words:
        p.error(f"{words[0]}: table has no such flag")
    data = json.loads(args.file.read_text()) if args.file else collect(args.root)
    if args.columns:
        data = {row: {k: v[k] for k in args.columns if k in v} for row, v in data.items()}
    if args.json:
        args.json.write_text(json.dumps(data).replace("}, ", "},\n ") + "\n")
    print(table(data), end="")


if __name__ == "__main__":
    run_main(main)
