"""The open assignment: the score of a checkpoint on faces that nobody has seen, and the table.

Steps    1. Draw new faces of a seed that the instructor keeps to himself.       `score`
         2. Restore them, and measure by the judges of evaluate.py, which no reward may contain.
         3. Place the checkpoint against the frontier of the restorer that all start from: the score
            is its distance beyond it in LPIPS with AlexNet, at equal PSNR (support/frontier.py).
         4. Write an entry, and print entries as a table, the best first.        `leaderboard`
An entry is a JSON file: name (text), judge (what measured), score and error (above 0 is better, the
error over the faces), psnr (dB), value (of the judge), images, size (px), seed.
"""
import json
from functools import partial
from pathlib import Path

import evaluate
from model import EVAL_ETA, restore
from rewards import CompositeReward
from support.checkpoint import pick_device
from support.cli import UserError, make_folder
from support.data import Photos, pairs
from support.frontier import distances_beyond, sampler_points
from support.table import means

FIELDS = {"name": str, "judge": str, "score": float, "error": float, "psnr": float, "value": float,
          "images": int, "size": int, "seed": int}


def score(args):
    """Measure a checkpoint, print the result and write its entry. Raises UserError if it is another
    network than that of --sft, or was trained on the judge."""
    out, device = Path(args.json or Path(args.ckpt).parent / "entry.json"), pick_device(args.device)
    args.ckpt, args.judge_net, args.images = [args.sft, args.ckpt], "alex", []
    (base, net), states, _ = evaluate.load(args, device)
    if net.config != base.config:
        raise UserError(f"score {args.ckpt[1]}: another network than that of --sft {args.sft}; "
                        "train one that starts from it")
    evaluate.rewards_of(states, args)       # refuses one that was trained on the judge
    judges, size = evaluate.load_judges(args, device), net.config.size
    photos = Photos.drawn(args.n, args.seed, size, "train")
    lq, gt = (u.to(device) for u in pairs(photos, range(args.n), args.seed, epoch=0))

    def measured(net, K, eta):
        return evaluate.measure(restore(net, lq, K, eta, args.seed), gt,
                                CompositeReward({"ssim": 1.0}), judges)
    K, judge = states[1]["args"]["ddim_steps"], [*judges][-1]
    rows = {args.name: measured(net, K, EVAL_ETA)}
    points = sampler_points(partial(measured, base), [K], EVAL_ETA)
    distance, error = distances_beyond(rows, points, judge)[args.name]
    mean = means(rows)[args.name]
    entry = dict(zip(FIELDS, (args.name, judge, distance, error, mean["psnr"], mean[judge],
                              args.n, size, args.seed)))
    make_folder(out.parent, "--json")
    out.write_text(json.dumps(entry, indent=1) + "\n")
    print(f"score: {distance:+.4f} ± {error:.4f} in {judge}\n{out}")


def leaderboard(args):
    """Print entries as a markdown table. Raises UserError for a file of another form."""
    entries = []
    for path in args.entries:
        try:
            entry = json.loads(Path(path).read_text())
            entries.append({key: kind(entry[key]) for key, kind in FIELDS.items()})
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"leaderboard {path}: not an entry written by score") from None
    if len({tuple(e[key] for key in ("judge", "images", "size", "seed")) for e in entries}) > 1:
        raise UserError("leaderboard: the entries were measured on different faces, or by other "
                        "judges; score them all in the same way")
    print(f"| | name | score | PSNR, dB | {entries[0]['judge']} |\n|---|---|---|---|---|")
    for place, e in enumerate(sorted(entries, key=lambda e: -e["score"]), 1):
        name = e["name"].replace("|", "/")
        print(f"| {place} | {name} | {e['score']:+.4f} ± {e['error']:.4f} | {e['psnr']:.2f} | "
              f"{e['value']:.4f} |")
