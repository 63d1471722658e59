"""Write pairs of restorations for a person to label (frm.py, support/labels.py).

    python -m tools.label_pairs --ckpt runs/sft/last.pt --out pairs --n 100
    python train.py --mode frm --labels pairs/pairs.csv     # once the column preferred is filled in

Each photo is degraded twice and restored. NNNN.png shows the two restorations side by side.
"""
import argparse
import csv
from pathlib import Path

from frm import FRMSettings, unknown_pairs
from model import load_restorer
from support.checkpoint import pick_device
from support.cli import UserError, is_blocked, positive, run_main, seed_number
from support.data import Photos, sheet
from support.labels import COLUMNS


def write_pairs(args):
    """Write the pairs, the photos and pairs.csv. Raises UserError if --out may hold labels
    already."""
    out = Path(args.out)
    if is_blocked(out) or (out / "pairs.csv").exists():
        raise UserError(f"--out {out}: is a file, or its pairs.csv may hold labels already; choose "
                        "another")
    net, state = load_restorer(args.ckpt, pick_device(args.device))
    saved, size = state["args"], net.config.size
    photos = Photos.load(args.data or saved["data"], size, "train", saved["faces"], saved["seed"])
    trios = unknown_pairs(net, photos, args.n, saved["ddim_steps"], FRMSettings.eta, args.seed)
    out.mkdir(parents=True, exist_ok=True)
    rows = [COLUMNS]
    for i, trio in enumerate(zip(*(u.split(1) for u in trios))):
        sheet(trio[:2], max(1, 256 // size)).save(out / f"{i:04}.png")
        names = [f"{i:04}_{letter}.png" for letter in ("a", "b", "gt")]
        for name, x in zip(names, trio):
            sheet([x]).save(out / name)
        rows.append([names[0], names[1], "", names[2]])
    with open(out / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    print(f"{len(rows) - 1} pairs: look at {out}/0000.png and on, write a (left) or b (right) into "
          f"the column preferred of {out}/pairs.csv; then train.py --mode frm --labels with it")


def parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    p = argparse.ArgumentParser(description="Write pairs of restorations for a person to label.")
    p.add_argument("--ckpt", required=True, help="the restorer")
    p.add_argument("--data", help="folder of photos (default: as trained)")
    p.add_argument("--out", default="pairs", help="a new folder (pairs)")
    p.add_argument("--n", type=positive, default=100, help="how many pairs (100)")
    p.add_argument("--seed", type=seed_number, default=1, help="of photos and degradations (1)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p


if __name__ == "__main__":
    run_main(lambda: write_pairs(parser().parse_args()))
