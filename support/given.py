"""Pictures that exist already, in folders: those of one name in all folders belong together.

A name is the path inside the folder without its suffix: lq/a/7.png belongs to gt/a/7.jpg. Each
picture is read at the model's size, so that their own sizes may differ, but not their shapes: all
of one name are cut to the centre square alike.
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from support.cli import UserError
from support.photos import find_photos, read_photo

SHOWN = 10      # ours: names in one message


def by_name(flag: str, folder) -> dict[str, Path]:
    """The pictures in and below a folder, which `flag` gave, by name. Raises UserError if there is
    none, or if two have one name."""
    paths = find_photos(folder, flag)
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    if twice := {*paths} - {*found.values()}:
        raise UserError(f"{flag} {folder}: another picture has the name of {min(twice)}, but for "
                        "the suffix; rename one, or take it away")
    return found


def read_alike(paths: list[Path], size: int) -> list[Tensor]:
    """As `read_photo`, of pictures of one name. Raises UserError if one cannot be read, or has
    another shape than the first, by more than the sides' rounding to whole pixels."""
    pictures = [read_photo(path, size) for path in paths]
    (w, h), *others = [ImageOps.exif_transpose(Image.open(path)).size for path in paths]
    for path, (a, b) in zip(paths[1:], others):
        if abs(a * h - b * w) > max(a, b, w, h):
            raise UserError(f"{path}: has another shape, {a} x {b}, than {paths[0]}, {w} x {h}")
    return pictures


def read_given(folders: list[tuple[str, str]], size: int, limit: int) -> list[Tensor]:
    """The pictures that all `folders`, [(flag, folder), ...], have: uint8 (N, 3, S, S) of each, for
    the first `limit` names. What lacks a partner, cannot be read or has another shape is named on
    stderr and left out. Raises UserError if nothing is left."""
    files, rows = [by_name(*place) for place in folders], []
    names = sorted({*files[0]}.intersection(*files))
    for own in files:
        alone = sorted(str(own[name]) for name in own.keys() - {*names})
        if alone:
            print("left out, as another folder has no picture of this name:",
                  ", ".join(alone[:SHOWN] + ["..."] * (len(alone) > SHOWN)), file=sys.stderr)
    for name in names[:limit]:
        try:
            rows.append(read_alike([own[name] for own in files], size))
        except UserError as error:
            print(f"left out {error}", file=sys.stderr)
    if not rows:
        raise UserError(f"--lq {folders[0][1]}: none of its pictures can be compared")
    return [torch.stack(column) for column in zip(*rows)]
