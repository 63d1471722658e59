"""The open assignment: the score of a checkpoint on faces that nobody has seen, and the table.

Steps    1. Draw new faces of a seed that the instructor keeps to himself.       `score`
         2. Let evaluate.py place the checkpoint against the frontier of the SFT sampler that all
            start from: the score is its distance beyond it in LPIPS, at equal PSNR.
         3. Write an entry, and print entries as a table, the best first.        `leaderboard`
An entry is a JSON file: name (text), score and error (of LPIPS, the error over the faces), psnr
(dB), lpips, images, size (px), seed.
"""
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import evaluate
from support.checkpoint import load_run
from support.cli import UserError, make_folder
from support.data import Photos, sheet, to_float

FIELDS = {"name": str, "score": float, "error": float, "psnr": float, "lpips": float,
          "images": int, "size": int, "seed": int}


def score(args):
    """Measure a checkpoint, print the result and write its entry. Raises UserError if it is another
    network than that of --sft."""
    config, base = (load_run(path, flag)["config"] for path, flag in ((args.ckpt, "score"),
                                                                      (args.sft, "--sft")))
    if config != base:
        raise UserError(f"score {args.ckpt}: another network than that of --sft {args.sft}; train "
                        "one that starts from it")
    with TemporaryDirectory() as folder:
        photos = Photos.drawn(10 * args.n, args.seed, config["size"], "train")  # a tenth is used
        for i, image in enumerate(photos.images):
            sheet([to_float(image[None])]).save(f"{folder}/{i:06}.png")
        flags = ["--data", folder, "--n", str(args.n), "--rewards", "lpips=1", "--frontier",
                 "--out", f"{folder}/evaluation", "--seed", str(args.seed)]
        flags += [text for name in ("lpips_net", "lpips_weights", "device")
                  if getattr(args, name) for text in (f"--{name}", getattr(args, name))]
        evaluate.compare(evaluate.parser().parse_args(["--ckpt", args.sft, args.ckpt, *flags]))
        found = json.loads(Path(folder, "evaluation", "metrics.json").read_text())
    (label, (distance, error)), = found["beyond"]["lpips"].items()
    entry = {"name": args.name, "score": distance, "error": error, "images": found["images"],
             **{key: found["rows"][label][key] for key in ("psnr", "lpips")},
             "size": config["size"], "seed": args.seed}
    out = Path(args.json or Path(args.ckpt).parent / "entry.json")
    make_folder(out.parent, "--json")
    out.write_text(json.dumps(entry, indent=1) + "\n")
    print(f"score: {distance:+.4f} ± {error:.4f}\n{out}")


def leaderboard(args):
    """Print entries as a markdown table. Raises UserError for a file of another form."""
    entries = []
    for path in args.entries:
        try:
            entry = json.loads(Path(path).read_text())
            entries.append({key: kind(entry[key]) for key, kind in FIELDS.items()})
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"leaderboard {path}: not an entry written by score") from None
    if len({(entry["seed"], entry["images"], entry["size"]) for entry in entries}) > 1:
        raise UserError("leaderboard: the entries were measured on different faces; score them "
                        "all with one --seed and --n")
    print("| | name | score | PSNR, dB | LPIPS |\n|---|---|---|---|---|")
    for place, e in enumerate(sorted(entries, key=lambda e: -e["score"]), 1):
        name = e["name"].replace("|", "/")
        print(f"| {place} | {name} | {e['score']:+.4f} ± {e['error']:.4f} | {e['psnr']:.2f} | "
              f"{e['lpips']:.4f} |")
