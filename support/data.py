"""A folder of face photos, the blind degradation, and (LQ, GT) pairs.

Papers   GFPGAN (arXiv 2101.04061): the order of the degradation. A good photo (GT) is blurred,
         shrunk (bilinear), given noise, saved as JPEG and enlarged (bilinear); the result is LQ.
         DiffBIR (arXiv 2308.15070): the ranges, of its face settings, which are for 512 px.
Departs  - The upper ends of blur and downsampling are multiplied by (size / 512)^(2/3). With power
           1 there is little damage at 32 px (blur below .75 px); with 1/2 little is left of a face.
         - Kernels reach 3 sigma (published: 41 px in all). LQ has 8 bits, as a photo from disk has.
         - Pair n depends on (seed, epoch, n) alone: it is the same in any batch and after a resume.
"""
import hashlib
import io
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.cli import UserError
from support.distributed import place
from support.faces import draw_faces
from support.photos import find_photos, read_photo

READERS = 4             # ours: photos read at a time, each in at most 1 GB
MAX_WORKERS = 16        # ours: more than the presets can use on any GPU
MAX_HELD_OUT = 500      # ours: a steady mean, evaluated in minutes
MAX_DRAWN = 1_000_000   # ours: drawn faces are held out from this number on
BLUR_SIGMA, DOWN_FACTOR = (.1, 12.), (1., 12.)      # DiffBIR; sigma in pixels, both at 512 px
NOISE_SIGMA, JPEG_QUALITY = (0., 15.), (100, 30)    # DiffBIR; sigma of 255. All go mild to heavy
SIZE_POWER = 2 / 3      # ours: see above
GRADED = 2 ** 32        # in a random seed, in the place of a photo's number


@dataclass
class Photos:
    """Square photos, read once and kept as bytes."""
    images: Tensor          # uint8 (N, 3, S, S)
    names: list[str]        # N

    def __len__(self):
        return len(self.names)

    def digest(self) -> dict[str, int | str]:
        """What tells these photos from any others, in words for `checkpoint.check_resume`."""
        names = "\n".join(self.names).encode("utf-8", "surrogatepass")
        return {"number": len(self), "names": hashlib.sha256(names).hexdigest(),
                "pixels": hashlib.sha256(self.images.numpy()).hexdigest()}

    @classmethod
    def from_folder(cls, folder, size: int, split: str, limit: int = None):
        """The split "train" or "heldout" of a folder, or only its first `limit` files. The last
        tenth of the files by name, 1 to 500, is held out (by file, not by person). The split is
        made before reading, so that an unreadable file does not change the split of the others.
        Raises UserError if no file can be read."""
        files = find_photos(folder)
        if len(files) < 2:
            raise UserError(f"--data {folder}: a single photo cannot be split, 2 is the least")
        held_out = max(1, min(MAX_HELD_OUT, len(files) // 10))
        files = {"train": files[:-held_out], "heldout": files[-held_out:]}[split][:limit]

        images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

        def attempt(i):
            try:
                images[i] = read_photo(files[i], size)
            except UserError as error:
                return error
        with ThreadPoolExecutor(READERS) as pool:
            errors = list(tqdm(pool.map(attempt, range(len(files))), "photos", len(files),
                               disable=None))
        good = [i for i, error in enumerate(errors) if error is None]
        errors = [error for error in errors if error]
        if errors:
            print(f"{folder}: {len(errors)} of {len(files)} {split} photos are left out:",
                  *errors[:10], *["..."] * (len(errors) > 10), sep="\n  ", file=sys.stderr)
        if not good:
            raise UserError(f"--data {folder}: none of its {split} photos can be read")
        return cls(images[good] if errors else images,
                   [files[i].relative_to(folder).as_posix() for i in good])

    @classmethod
    def drawn(cls, n: int, seed: int, size: int, split: str, workers: int = 0):
        """n drawn faces: "train" is 0 .. n-1 of `seed`, "heldout" is the same for every seed.
        `workers` processes draw them, or this one for 0; the faces are the same. Raises UserError
        for a number above a million, or a size that cannot be drawn."""
        if not 1 <= n <= MAX_DRAWN:
            raise UserError(f"--faces: choose 1 to {MAX_DRAWN} drawn faces, not {n}")
        first, seed = {"train": (0, seed), "heldout": (MAX_DRAWN, 0)}[split]
        numbers = torch.arange(first, first + n)
        try:
            draw_faces(numbers[:1], seed, size)
        except ValueError as error:
            raise UserError(f"--size or --seed: {error}") from None
        faces = DataLoader(Drawing(numbers, seed, size), batch_size=None, num_workers=workers,
                           worker_init_fn=ignore_interrupt, generator=torch.Generator())
        return cls(torch.cat(list(faces)), [f"face {i}" for i in numbers.tolist()])

    @classmethod
    def load(cls, folder, size: int, split: str, faces: int, seed: int = 0, workers: int = 0):
        """`from_folder`, or without a folder `faces` drawn faces."""
        return (cls.from_folder(folder, size, split) if folder
                else cls.drawn(faces, seed, size, split, workers))


class Drawing(Dataset):
    """Drawn faces as bytes, 256 in each item."""

    def __init__(self, numbers: Tensor, seed: int, size: int):
        self.parts, self.seed, self.size = numbers.split(256), seed, size

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, i: int) -> Tensor:
        """uint8 (256, 3, S, S), or fewer in the last item."""
        return to_uint8(draw_faces(self.parts[i], self.seed, self.size))


def draw_degradation(rng, size: int, lo=0., hi=1.) -> dict:
    """Arguments of `degrade`, uniform between the fractions lo and hi of their ranges, which go
    from mild to heavy."""
    def draw(mild, heavy):
        return mild + (heavy - mild) * rng.uniform(lo, hi)
    scale = (size / 512) ** SIZE_POWER
    sigma_x, sigma_y = [draw(BLUR_SIGMA[0], BLUR_SIGMA[1] * scale) for _ in range(2)]
    sigma_y = sigma_x if rng.random() < .5 else sigma_y     # half of them isotropic (GFPGAN)
    return dict(sigma_x=sigma_x, sigma_y=sigma_y, angle=rng.uniform(-math.pi, math.pi),
                factor=draw(DOWN_FACTOR[0], max(1., DOWN_FACTOR[1] * scale)),
                noise=draw(*NOISE_SIGMA), quality=round(draw(*JPEG_QUALITY)))


def blur(x: Tensor, sigma_x: float, sigma_y: float, angle: float) -> Tensor:
    """x (3, S, S) convolved with a rotated Gaussian, edges reflected: (3, S, S). By FFT, because
    conv2d is far slower."""
    size, radius = x.shape[-1], math.ceil(3 * max(sigma_x, sigma_y))
    offset, c, s = torch.arange(-radius, radius + 1.), math.cos(angle), math.sin(angle)
    u, v = c * offset + s * offset[:, None], c * offset[:, None] - s * offset
    kernel = torch.exp(-((u / sigma_x) ** 2 + (v / sigma_y) ** 2) / 2)      # (2 r + 1, 2 r + 1)
    x = F.pad(x, [radius] * 4, mode="reflect")                              # (3, S + 2 r, S + 2 r)
    n = 16 * math.ceil((size + 2 * radius) / 16)        # a length with a fast transform
    x = torch.fft.rfft2(x, s=(n, n)) * torch.fft.rfft2(kernel / kernel.sum(), s=(n, n))
    return torch.fft.irfft2(x, s=(n, n))[:, 2 * radius:, 2 * radius:][:, :size, :size]


def jpeg(x: Tensor, quality: int) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, H, W), through a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def degrade(photo: Tensor, d: dict, rng) -> Tensor:
    """uint8 (3, S, S) -> uint8 (3, S, S), by the arguments d of draw_degradation; rng draws the
    noise."""
    size = photo.shape[-1]
    x = blur(photo.float(), d["sigma_x"], d["sigma_y"], d["angle"])         # (3, S, S)
    x = F.interpolate(x[None], size=int(size // d["factor"]), mode="bilinear")[0]   # (3, s, s)
    x = x + d["noise"] * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    x = jpeg(x.clamp(0, 255).round().byte(), d["quality"])                  # (3, s, s)
    return F.interpolate(x[None].float(), size=size, mode="bilinear")[0].round().byte()


def pairs(photos: Photos, index, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """(lq, gt) of the photos with numbers `index` (B,): float32 (B, 3, S, S) in [-1, 1] each."""
    gt, lq = photos.images[torch.as_tensor(index)], []
    for photo, n in zip(gt, index):
        rng = np.random.default_rng([seed, epoch, int(n)])
        lq.append(degrade(photo, draw_degradation(rng, photo.shape[-1]), rng))
    return to_float(torch.stack(lq)), to_float(gt)


def graded(gt: Tensor, rng) -> tuple[Tensor, Tensor]:
    """Two degradations of the photos gt (B, 3, S, S), one from the milder and one from the heavier
    half of the ranges: (B, 3, S, S) each."""
    photos, size = to_uint8(gt).cpu(), gt.shape[-1]
    return tuple(to_float(torch.stack([degrade(photo, draw_degradation(rng, size, lo, hi), rng)
                                       for photo in photos])).to(gt.device)
                 for lo, hi in ((0.0, 0.5), (0.5, 1.0)))


def batch_index(n: int, batch_size: int, seed: int, step: int):
    """(epoch, index (B,)) of batch `step`; the n photos are shuffled in every epoch. An incomplete
    last batch is left out; fewer photos than a batch are repeated."""
    epoch, batch = divmod(step, max(1, n // batch_size))
    # [seed, epoch] would be the generator of pair 0 (numpy pads with zeros); no pair has number n.
    order = np.random.default_rng([seed, epoch, n]).permutation(n)
    return epoch, order[np.arange(batch * batch_size, (batch + 1) * batch_size) % n]


def train_batch(photos: Photos, batch_size: int, seed: int, step: int, rank=0, ranks=1):
    """(lq, gt) of batch `step`, or one of `ranks` equal shares of it: as `pairs`."""
    epoch, index = batch_index(len(photos), batch_size, seed, step)
    return pairs(photos, np.split(index, ranks)[rank], seed, epoch)


class Batches(Dataset):
    """The training batches of a run. Item `step` is this rank's share of batch `step`, whichever
    worker makes it. `with_graded` adds the pictures of `graded`."""

    def __init__(self, photos: Photos, batch_size: int, seed: int, with_graded: bool):
        self.photos, self.batch_size, self.seed, self.place = photos, batch_size, seed, place()
        self.with_graded = with_graded

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        """As `train_batch`: (lq, gt), or (lq, gt, milder, heavier), (B, 3, S, S) each."""
        lq, gt = train_batch(self.photos, self.batch_size, self.seed, step, *self.place)
        rng = np.random.default_rng([self.seed, step, GRADED])
        return (lq, gt, *graded(gt, rng)) if self.with_graded else (lq, gt)


def spare_cores(device) -> int:
    """How many processes make the batches, if nobody says it: on a GPU those cores that this rank's
    main process leaves, on a CPU none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_WORKERS, max(0, cores // place()[1] - 1)) if device.type == "cuda" else 0


def ignore_interrupt(worker: int):
    """Ctrl-C reaches every process; only the main one acts on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader(photos: Photos, batch_size: int, seed: int, steps: range, workers: int, device,
           with_graded: bool = False):
    """The batches of `steps`, made by `workers` processes ahead of time, or here for 0. The result
    is the same for any number of workers."""
    return DataLoader(Batches(photos, batch_size, seed, with_graded), batch_size=None,
                      sampler=steps, num_workers=workers, pin_memory=device.type == "cuda",
                      worker_init_fn=ignore_interrupt,
                      generator=torch.Generator())      # else it draws from the global generator


def to_float(image: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] (clamped) -> uint8 (rounded): the inverse of to_float."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def sheet(columns: list[Tensor], scale=1) -> Image.Image:
    """Tensors (B, 3, H, W) in [-1, 1] side by side (LQ | restored | GT), one image in each line."""
    x = torch.cat([to_uint8(column.detach().float().cpu()) for column in columns], dim=3)
    picture = Image.fromarray(x.permute(0, 2, 3, 1).flatten(0, 1).numpy())  # (B * H, columns * W)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
