"""Restore a photo, or every photo below a folder.

    python sample.py --ckpt runs/lrpo/last.pt --input photos/ --output restored/

A photo of any size is cut to its centre square and resized to the model's size. The result is
written at that size, as a PNG of the same name (a.jpg becomes a.png). One that is there already is
kept, so that a stopped command can be given again. The network was trained on
faces that fill the picture, so crop to the head first. The noise of each photo is drawn from --seed
again, so its result does not depend on the others. --sheet writes all pairs in one picture.
"""
import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from model import EVAL_ETA, load_restorer, restore
from support.checkpoint import pick_device, replacing
from support.cli import UserError, is_blocked, make_folder, positive, run_main, seed_number, share
from support.data import find_photos, read_photo, sheet, to_float

SHEET_SIDE = 128        # ours: the least side of each picture in the sheet, in pixels


def outputs(source: Path, output: Path) -> dict[Path, Path]:
    """Each input photo and the path of its restoration, no two of them the same. Raises UserError
    if a restoration would replace an input."""
    source, output = source.resolve(), output.resolve()
    if is_blocked(output):
        raise UserError(f"--output {output}: is a file, or below one; name a folder")
    names = {source: Path(source.name)} if source.is_file() else {
        path: path.relative_to(source) for path in find_photos(source, "--input")}
    count = Counter(name.with_suffix(".png") for name in names.values())
    targets = {}
    for path, name in names.items():        # a.jpg -> a.png, but a.jpg.png if there is an a.tif too
        alone = count[name.with_suffix(".png")] == 1
        targets[path] = output / (name.with_suffix(".png") if alone else f"{name}.png")
        if targets[path] in names:
            raise UserError(f"--output {output}: would replace the photo {targets[path]}; choose "
                            "another folder")
    return targets


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
    if not state["args"]["data"]:
        print(f"--ckpt {args.ckpt}: trained on drawn faces, so that it paints drawn eyes; for "
              "photos use one trained with --data")
    K = args.ddim_steps or state["args"]["ddim_steps"]
    photos, pairs, skipped = outputs(Path(args.input), Path(args.output)), [], 0
    rest = {path: target for path, target in photos.items()
            if args.overwrite or not target.exists()}
    for path, target in tqdm(rest.items(), "restoring", disable=None):
        try:
            lq = to_float(read_photo(path, net.config.size))[None].to(device)   # (1, 3, S, S)
        except UserError as error:
            print(f"skipped {error}", file=sys.stderr)
            skipped += 1
            continue
        restored = restore(net, lq, K, args.eta, args.seed)
        make_folder(target.parent, "--output")
        with replacing(target) as part:
            sheet([restored]).save(part, "PNG")
        pairs.append((lq.cpu(), restored.cpu()))
    if rest and not pairs:
        raise UserError(f"--input {args.input}: none of its {skipped} photos can be read")
    if args.sheet and pairs:
        columns = [torch.cat(column) for column in zip(*pairs)]
        sheet(columns, max(1, SHEET_SIDE // net.config.size)).save(args.sheet)
    print(f"restored {len(pairs)} photos at {net.config.size} px to {args.output}"
          + (f"; skipped {skipped}" if skipped else "")
          + (f"; kept {len(photos) - len(rest)} that were there already (--overwrite restores them "
             "again)" if len(rest) < len(photos) else ""))


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
