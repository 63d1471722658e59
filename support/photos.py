"""Photos on disk: where they are, and each as a small square of sRGB bytes.

Whatever a file holds is shown as a viewer would show it, upright and in its own colours, or it is
refused in one sentence; no picture is read wrongly without a word.
"""
import io
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor

from support.cli import UserError

MAX_PIXELS = 64_000_000     # ours: 8,000 x 8,000, which takes less than 1 GB to read
Image.MAX_IMAGE_PIXELS = 4 * MAX_PIXELS     # Pillow refuses twice that; its own is too low for JPEG
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY      # texts need not fit in 1 MB


def find_photos(folder, flag="--data", but=None) -> list[Path]:
    """Photos in and below a folder, sorted by path, which gives the same order on every system.
    Links are followed, and each folder is read once (a link may lead back), the folder `but` never.
    Hidden files (macOS leaves ._x.jpg) are skipped; other files are counted on stderr. Raises
    UserError if there is no photo, or a folder cannot be read."""
    def stop(error):
        raise UserError(f"{flag} {error.filename}: cannot be searched ({error.strerror})")
    folder, files = Path(folder), []
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    seen = {but and os.path.realpath(but)}
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        new = os.path.realpath(place) not in seen
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if new and name[0] != ".")
        files += [path for name in names if new and name[0] != "." for path in [Path(place, name)]
                  if path.is_file() or path.is_symlink()]       # no pipe, but a broken link
    photos = [path for path in files if path.suffix.lower() in known]
    other = Counter(path.suffix for path in files if path.suffix.lower() not in known)
    if other:
        print(f"{flag} {folder}: no photos that Pillow reads:", ", ".join(
            f"{n} {suffix or 'without suffix'}" for suffix, n in other.items()), file=sys.stderr)
    if not photos:
        raise UserError(f"{flag} {folder}: no photo in it, such as .jpg, .png, .webp or .tif")
    return sorted(photos, key=Path.as_posix)


def read_photo(path, size: int) -> Tensor:
    """Read a photo as uint8 (3, size, size), sRGB: upright, transparency on white, cut to the
    centre square, resized by an antialiased Lanczos filter. A JPEG is decoded at 1/2, 1/4 or 1/8
    where that leaves four times `size`. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as im:
            im.draft("RGB", (4 * size, 4 * size))       # of a JPEG only
            if im.width * im.height > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS:,} pixels")
            profile = im.info.get("icc_profile")
            ImageOps.exif_transpose(im, in_place=True)      # first: convert() may lose the EXIF tag
            im = to_8_bits(im)
            grey = "L" if im.mode in ("1", "L", "LA") else "RGB"
            im = im.convert("RGBA" if im.has_transparency_data else
                            "CMYK" if im.mode == "CMYK" else grey)
            im = ImageOps.fit(im, (size, size), Image.Resampling.LANCZOS)
            if im.mode == "RGBA":
                white = Image.new("RGBA", im.size, "white")
                im = Image.alpha_composite(white, im).convert(grey)
            im = to_srgb(im, profile) if profile else im.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:      # Pillow raises a dozen unrelated kinds, SyntaxError among them
        raise UserError(f"{path}: cannot be read as a photo ({error})") from error
    return torch.from_numpy(np.array(im)).permute(2, 0, 1)


def to_8_bits(im: Image.Image) -> Image.Image:
    """A picture of 12 or 16 bits as one of 8, and any other as it is. Raises ValueError for numbers
    whose black and white are not known: signed, of 32 bits, or not whole."""
    tags = getattr(im, "tag_v2", {})        # of a TIFF: 339 SampleFormat, 258 bits, 262 photometric
    wide = im.mode == "F" or im.mode == "I" and im.format not in ("PNG", "PPM")
    if wide or set(tags.get(339, [1])) != {1} or im.mode[0] == "I" and "transparency" in im.info:
        raise ValueError("signed, 32-bit or fractional numbers, or 16 bits with transparency")
    if im.mode[0] != "I":
        return im
    top = 2 ** tags.get(258, [16])[0] - 1
    table = (np.arange(top + 1) * 255 / top).round().astype(np.uint8)
    step = -1 if tags.get(262) == 0 else 1      # 0: white is zero
    return Image.fromarray(table[::step][np.asarray(im)])


def to_srgb(im: Image.Image, profile: bytes) -> Image.Image:
    """A picture (L, RGB or CMYK) from its own colour profile to sRGB. Raises ImageCms.PyCMSError if
    the profile is damaged, or one for other pictures."""
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if own.profile.xcolor_space.strip() == "RGB":       # many a grey photo has one, too
        im = im.convert("RGB")
    return ImageCms.profileToProfile(im, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
