"""The picture that compares restorations: titled columns of faces, and one detail enlarged."""
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from support.data import to_uint8

FACES, CELL, GAP = 6, 256, 4        # ours: rows of faces; side of a cell and space around it, px
WINDOW = 4                          # ours: the detail is a quarter of the face's side


def detail(methods: Tensor) -> tuple[int, int, int, int]:
    """Where restorations (M, N, 3, H, W) differ most: the number of the face, and top, left and
    side of the window with the largest standard deviation over the methods."""
    side = methods.shape[-1] // WINDOW
    spread = F.avg_pool2d(methods.std(dim=0).mean(dim=1), side, stride=1)       # (N, h, w)
    n, top, left = (int(i) for i in torch.unravel_index(spread.argmax(), spread.shape))
    return n, top, left, side


def cell(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [-1, 1], enlarged to a cell without smoothing."""
    picture = Image.fromarray(to_uint8(image.float().cpu()).permute(1, 2, 0).numpy())
    return picture.resize((CELL, CELL), Image.Resampling.NEAREST)


def comparison(columns: dict[str, Tensor]) -> Image.Image:
    """A column of faces under each title, (N, 3, H, W) each, and a last row with the detail in
    which all but "LQ" and "ground truth" differ most."""
    columns = {title: images[:FACES] for title, images in columns.items()}
    between = torch.stack([images.float().cpu() for title, images in columns.items()
                           if title not in ("LQ", "ground truth")])
    n, top, left, side = detail(between if len(between) > 1 else torch.cat([between, between * 0]))
    rows = 1 + max(map(len, columns.values()))
    picture = Image.new("RGB", (len(columns) * (CELL + GAP), rows * (CELL + GAP) + 30), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=20)
    for c, (title, images) in enumerate(columns.items()):
        x = c * (CELL + GAP)
        draw.text((x + CELL // 2, 15), title, "black", font, anchor="mm")
        crop = images[n][:, top:top + side, left:left + side]
        for r, image in enumerate([*images, crop]):
            picture.paste(cell(image), (x, 30 + r * (CELL + GAP)))
        k, y = CELL / images.shape[-1], 30 + n * (CELL + GAP)
        draw.rectangle((x + left * k, y + top * k, x + (left + side) * k, y + (top + side) * k),
                       outline="white")
    return picture
