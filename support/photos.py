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
MAX_JPEG = 4 * MAX_PIXELS   # ours: phones make 200 million; a JPEG is read at a smaller size
Image.MAX_IMAGE_PIXELS = MAX_JPEG   # Pillow warns above it, and refuses twice as many unread
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY      # texts need not fit in 1 MB
UNSIGNED, WHITE_IS_ZERO = 1, 0      # TIFF's SampleFormat (tag 339) and photometric (tag 262)


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
        files += [Path(place, name) for name in names if new and name[0] != "."]
    files = [path for path in files if path.is_file() or path.is_symlink()]     # no pipes
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
            limit = MAX_JPEG if im.format in ("JPEG", "MPO") else MAX_PIXELS
            if im.width * im.height > limit:
                raise ValueError(f"more than {limit:,} pixels")
            im.draft("RGB", (4 * size, 4 * size))
            profile = im.info.get("icc_profile")
            ImageOps.exif_transpose(im, in_place=True)      # first: convert() may lose the EXIF tag
            im = to_8_bits(im)
            grey = im.mode in ("1", "L", "LA")
            if im.has_transparency_data:
                im = im.convert("RGBA")
            elif im.mode not in ("L", "CMYK"):
                im = im.convert("RGB")
            im = ImageOps.fit(im, (size, size), Image.Resampling.LANCZOS)
            if im.mode == "RGBA":
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
                im = im.convert("L" if grey else "RGB")
            im = to_srgb(im, profile) if profile else im.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:      # Pillow raises a dozen unrelated kinds, SyntaxError among them
        raise UserError(f"{path}: cannot be read as a photo ({error})") from error
    return torch.from_numpy(np.array(im)).permute(2, 0, 1)


def to_8_bits(im: Image.Image) -> Image.Image:
    """A picture of more than 8 bits as one of 8, any other as it is. Raises ValueError for numbers
    whose black and white are not known: signed, of 32 bits, or not whole."""
    tags = getattr(im, "tag_v2", {})        # of a TIFF
    wide = im.mode == "I" and im.format not in ("PNG", "PPM")       # these two have 16 bits there
    if im.mode == "F" or wide or {*tags.get(339, [UNSIGNED])} != {UNSIGNED}:
        raise ValueError("signed, 32-bit or fractional numbers; save it with 8 or 16 bits")
    if im.mode[0] != "I":
        return im
    top = 2 ** tags.get(258, [16])[0] - 1       # BitsPerSample: 16, or 12
    table = (np.arange(top + 1) * 255 / top).round().astype(np.uint8)
    if tags.get(262) == WHITE_IS_ZERO:
        table = table[::-1]
    grey = Image.fromarray(table[np.asarray(im)])
    if "transparency" in im.info:       # the grey of a PNG that stands for nothing
        grey.putalpha(Image.fromarray(np.uint8(np.asarray(im) != im.info["transparency"]) * 255))
    return grey


def to_srgb(im: Image.Image, profile: bytes) -> Image.Image:
    """A picture (L, RGB or CMYK) from its own colour profile to sRGB. Raises ImageCms.PyCMSError if
    the profile is damaged, or one for other pictures."""
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if own.profile.xcolor_space.strip() == "RGB":       # many a grey photo has one, too
        im = im.convert("RGB")
    return ImageCms.profileToProfile(im, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
