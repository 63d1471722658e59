"""Restore a photo, or every photo below a folder.

    python sample.py --ckpt runs/lrpo/last.pt --input photos/ --output restored/

A photo of any size is cut to its centre square and resized to the model's size. The result is
written at that size, as a PNG of the same name (a.jpg becomes a.png). One that is there already is
kept, so that a stopped command can be given again. No photo is replaced, and none shares its result
with another. The network was trained on faces that fill the picture, so crop to the head first. The
noise of each photo is drawn from --seed again, so its result does not depend on the others. --sheet
writes all pairs in one picture.
"""
import argparse
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from model import EVAL_ETA, load_restorer, restore
from support.checkpoint import pick_device, replacing
from support.cli import (UserError, is_blocked, make_folder, not_empty, positive, run_main,
                         seed_number, share)
from support.data import sheet, to_float, to_uint8
from support.photos import find_photos, read_photo

SHEET_SIDE = 128        # ours: the least side of each picture in the sheet, in pixels


def outputs(source: Path, output: Path) -> dict[Path, Path]:
    """Each input photo and the path of its restoration. Raises UserError if a restoration would
    replace an input or another restoration, or would be restored itself the next time."""
    given, source, output = source.name, source.resolve(), output.resolve()
    if not (source.is_file() or source.is_dir()):
        raise UserError(f"--input {source}: no such photo or folder")
    if is_blocked(output):
        raise UserError(f"--output {output}: is a file, or below one; name a folder")
    if source.is_dir() and output.is_relative_to(source):
        raise UserError(f"--output {output}: lies in --input, where the next call would take "
                        "restorations for photos; name a folder outside of it")
    names = {source: Path(given)} if source.is_file() else {
        path: path.relative_to(source) for path in find_photos(source, "--input", but=output)}
    plain = {path: name.with_suffix(".png") for path, name in names.items()}    # a.jpg -> a.png
    count = Counter(map(same_file, plain.values()))     # but a.jpg.png if there is an a.tif, too
    targets = {path: output / (name if count[same_file(name)] == 1 else f"{names[path]}.png")
               for path, name in plain.items()}
    taken = {same_file(target): path for path, target in targets.items()}
    taken |= {same_file(path.resolve()): "a photo" for path in names}
    for path, target in targets.items():
        for place in (target, *target.parents):     # a.jpg, and b.jpg in a folder a.png
            other = taken.get(same_file(place), path)
            if other != path:
                raise UserError(f"--output {output}: {path} needs {place}, which is that of {other}"
                                "; choose another folder, or rename one")
    return targets


def same_file(path: Path) -> str:
    """A name that two paths share if some system takes them for one: upper case is lower case."""
    return path.as_posix().casefold()


def check_sheet(path: Path, source: Path, targets, overwrite: bool):
    """Raises UserError if the sheet cannot be written to `path`, or would be taken for a photo of
    `source` or one of the restorations `targets`."""
    if (path.suffix.lower() != ".png" or is_blocked(path.parent) or path.resolve() in targets
            or path.resolve().is_relative_to(source.resolve())):
        raise UserError(f"--sheet {path}: name a .png file beside the photos and restorations")
    if path.exists() and not overwrite:
        raise UserError(f"--sheet {path}: is there already; choose another name, or --overwrite")


def main(args):
    """Restore every photo; those that cannot be read are skipped with a line on stderr."""
    device = pick_device(args.device)
    net, state = load_restorer(args.ckpt, device)
    if not state["args"]["data"]:
        print(f"--ckpt {args.ckpt}: trained on drawn faces, so that it paints drawn eyes; for "
              "photos use one trained with --data")
    K, size = args.ddim_steps or state["args"]["ddim_steps"], net.config.size
    photos = outputs(Path(args.input), Path(args.output))
    if args.sheet:
        check_sheet(Path(args.sheet), Path(args.input), photos.values(), args.overwrite)
    rest = {path: target for path, target in photos.items()     # isfile: False for too long a name
            if args.overwrite or not os.path.isfile(target)}
    lines, restored, skipped = [], 0, 0     # of the sheet, two uint8 (3, S, S) each
    for path in tqdm(photos if args.sheet else rest, "restoring", disable=None):
        try:
            lq = read_photo(path, size)                                         # (3, S, S)
            line = [lq] if path in rest else [lq, read_photo(photos[path], size)]
        except UserError as error:
            print(f"skipped {error}", file=sys.stderr)
            skipped += 1
            continue
        if path in rest:        # in a stream: only the sheet's small pictures are kept
            x = restore(net, to_float(lq)[None].to(device), K, args.eta, args.seed)
            line.append(to_uint8(x)[0].cpu())
            make_folder(photos[path].parent, "--output")
            write(photos[path], sheet([x]))
            restored += 1
        lines += [line] if args.sheet else []
    if rest and not restored:
        raise UserError(f"--input {args.input}: none of its {len(rest)} photos can be read")
    if lines:
        make_folder(Path(args.sheet).parent, "--sheet")
        write(args.sheet, sheet([to_float(torch.stack(column)) for column in zip(*lines)],
                                max(1, SHEET_SIDE // size)))
    print(f"restored {restored} photos at {size} px to {args.output}"
          + (f"; skipped {skipped}" if skipped else "")
          + (f"; kept {len(photos) - len(rest)} that were there already (--overwrite restores them "
             "again)" if len(rest) < len(photos) else ""))


def write(path, picture):
    """Save a picture as a PNG, whole or not at all."""
    with replacing(path) as part:
        picture.save(part, "PNG")


def parser() -> argparse.ArgumentParser:
    """The flags of sample.py."""
    p = argparse.ArgumentParser(description="Restore a face photo, or a folder of them.")
    p.add_argument("--ckpt", type=not_empty, required=True, help="checkpoint of train.py")
    p.add_argument("--input", type=not_empty, required=True, help="a photo, or a folder of them")
    p.add_argument("--output", type=not_empty, required=True, help="folder for the restored PNGs")
    p.add_argument("--overwrite", action="store_true", help="replace earlier restorations")
    p.add_argument("--sheet", type=not_empty, help="also write all, input | restored, to this PNG")
    p.add_argument("--ddim_steps", type=positive, help="K, sampling steps (default: as trained)")
    p.add_argument("--eta", type=share, default=EVAL_ETA,
                   help=f"0: no noise along the way, 1: as in training (default {EVAL_ETA})")
    p.add_argument("--seed", type=seed_number, default=0, help="of the noise (0)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p


if __name__ == "__main__":
    run_main(lambda: main(parser().parse_args()))
