"""Restore a photo, or every photo below a folder.

    python sample.py --ckpt runs/lrpo/last.pt --input photos/ --output restored/

A photo of any size is cut to its centre square and resized to the model's size, and the result is
written at that size, as a PNG of the same name (a.jpg becomes a.png). The network saw faces that
fill the picture: crop to the head first. Each photo's noise is drawn from --seed anew, so
its result does not depend on the others. --sheet writes input | result pairs in one picture.
"""
import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import UserError, find_photos, has_file, read_photo, run_main, sheet, to_float
from evaluate import EVAL_ETA, positive, restore, share, whole
from model import load_restorer, pick_device

SHEET_SIDE = 128        # pixels that each picture of the sheet has at least


def outputs(source: Path, output: Path, overwrite: bool = False) -> dict[Path, Path]:
    """Each input photo and where its restoration goes. UserError where a file would be lost: two
    inputs of one output, an output that is an input, or one that exists without `overwrite`."""
    source, output = source.resolve(), output.resolve()     # one file, one name
    if has_file(output):
        raise UserError(f"--output {output}: is a file, or below one; name a folder")
    photos = {source: output / f"{source.stem}.png"} if source.is_file() else {
        path: output / path.relative_to(source).with_suffix(".png")
        for path in find_photos(source, "--input")}
    seen = {}
    for path, target in photos.items():
        if target in seen:
            raise UserError(f"--input: {seen[target]} and {path} would both become {target}; "
                            "rename one of them")
        if target in photos or target.exists() and not overwrite:
            raise UserError(f"--output {output}: {target} is there already and would be lost; "
                            "choose another folder, or --overwrite for results of before")
        seen[target] = path
    return photos


def check_sheet(path: Path, overwrite: bool):
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"--sheet {path}: name a .png file in a folder that exists")
    if path.exists() and not overwrite:
        raise UserError(f"--sheet {path}: is there already; choose another name, or --overwrite")


def main(args):
    device = pick_device(args.device)
    if args.sheet:
        check_sheet(Path(args.sheet), args.overwrite)
    net, state = load_restorer(args.ckpt, device)
    K = args.ddim_steps or state["args"]["ddim_steps"]
    photos, pairs, skipped = outputs(Path(args.input), Path(args.output), args.overwrite), [], 0
    for path, target in tqdm(photos.items(), "restoring", disable=None):
        try:
            lq = to_float(read_photo(path, net.config.size))[None].to(device)   # (1, 3, S, S)
        except UserError as error:
            print(f"skipped {error}", file=sys.stderr)
            skipped += 1
            continue
        restored = restore(net, lq, K, args.eta, args.seed)
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet([restored]).save(target)
        pairs.append((lq.cpu(), restored.cpu()))
    if not pairs:
        raise UserError(f"--input {args.input}: none of its {skipped} photos can be read")
    if args.sheet:
        columns = [torch.cat(column) for column in zip(*pairs)]
        sheet(columns, max(1, SHEET_SIDE // net.config.size)).save(args.sheet)
    print(f"restored {len(pairs)} photos at {net.config.size} px to {args.output}"
          + (f"; skipped {skipped}" if skipped else ""))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Restore a face photo, or a folder of them.")
    p.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    p.add_argument("--input", required=True, help="a photo, or a folder (searched recursively)")
    p.add_argument("--output", required=True, help="folder for the restored PNGs")
    p.add_argument("--overwrite", action="store_true", help="replace restorations of before")
    p.add_argument("--sheet", help="also write input | restored side by side to this file")
    p.add_argument("--ddim_steps", type=positive, help="K, sampling steps (default: as trained)")
    p.add_argument("--eta", type=share, default=EVAL_ETA,
                   help=f"0: no noise along the way, 1: as in training (default {EVAL_ETA})")
    p.add_argument("--seed", type=whole, default=0, help="of the noise")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    return p


if __name__ == "__main__":
    run_main(lambda: main(parser().parse_args()))
