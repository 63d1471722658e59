"""Restore a photo, or every photo below a folder.

    python sample.py --ckpt runs/lrpo/last.pt --input photos/ --output restored/

A photo of any size is cut to its centre square and resized to the model's size. The result is
written at that size, as a PNG of the same name (a.jpg becomes a.png). The network was trained on
faces that fill the picture, so crop to the head first. The noise of each photo is drawn from --seed
again, so its result does not depend on the others. --sheet writes all pairs in one picture.
"""
import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from model import EVAL_ETA, load_restorer, restore
from support.checkpoint import pick_device
from support.cli import UserError, is_blocked, positive, run_main, seed_number, share
from support.data import find_photos, read_photo, sheet, to_float

SHEET_SIDE = 128        # ours: the least side of each picture in the sheet, in pixels


def outputs(source: Path, output: Path, overwrite: bool = False) -> dict[Path, Path]:
    """Each input photo and the path of its restoration. Raises UserError where a file would be
    lost: two inputs with one output, an output that is an input, or one that exists without
    `overwrite`."""
    source, output = source.resolve(), output.resolve()
    if is_blocked(output):
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
                            "choose another folder, or --overwrite for earlier results")
        seen[target] = path
    return photos


def check_sheet(path: Path, overwrite: bool):
    """Raises UserError if the sheet cannot be written to `path`."""
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"--sheet {path}: name a .png file in a folder that exists")
    if path.exists() and not overwrite:
        raise UserError(f"--sheet {path}: is there already; choose another name, or --overwrite")


def main(args):
    """Restore every photo; those that cannot be read are skipped with a line on stderr."""
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
    """The flags of sample.py."""
    p = argparse.ArgumentParser(description="Restore a face photo, or a folder of them.")
    p.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    p.add_argument("--input", required=True, help="a photo, or a folder (searched recursively)")
    p.add_argument("--output", required=True, help="folder for the restored PNGs")
    p.add_argument("--overwrite", action="store_true", help="replace earlier restorations")
    p.add_argument("--sheet", help="also write input | restored, side by side, to this file")
    p.add_argument("--ddim_steps", type=positive, help="K, sampling steps (default: as trained)")
    p.add_argument("--eta", type=share, default=EVAL_ETA,
                   help=f"0: no noise along the way, 1: as in training (default {EVAL_ETA})")
    p.add_argument("--seed", type=seed_number, default=0, help="of the noise (0)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p


if __name__ == "__main__":
    run_main(lambda: main(parser().parse_args()))
