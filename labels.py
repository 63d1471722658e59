"""Labels for pairs of restorations whose order nobody knows: a person gives a few, an SVM the rest.

Paper    DiffusionReward (Wu et al. 2025, arXiv 2505.17910): the two pictures' metric vectors and
         people's labels teach a linear SVM, which annotates the other pairs.
Departs  The metrics are ours. Where no person is to hand (--labels svm) pairs of known order teach.

    python frm.py --ckpt runs/sft/last.pt --out pairs --n 100    writes pairs and pairs/pairs.csv
    python train.py --mode frm --labels pairs/pairs.csv          once a or b is filled in
"""
import argparse
import csv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Photos, UserError, has_file, pairs, read_photo, sheet, to_float
from evaluate import positive, restore, whole
from frm import graded
from model import load_restorer, pick_device
from rewards import dwt, psnr, ssim

COLUMNS = ["path_a", "path_b", "preferred", "path_gt"]     # path_gt may be missing
MIN_LABELS = 10     # ours: fewer cannot teach six numbers and be checked
SVM_C = 1.0         # the price of a wrong label, LIBLINEAR's default
SVM_ROUNDS = 100    # ours: by then w stands still to a part in a thousand


def metrics(x: Tensor, gt: Tensor = None) -> np.ndarray:
    """The metric vector of each picture (N, 3, H, W): (N, 6), without ground truth (N, 3).

    The log energy of the three finest octaves tells blur and grain; then SSIM, low-pass, PSNR.
    """
    columns, fine = [], x
    for _ in range(3):
        coarse = F.avg_pool2d(fine, 2)
        detail = fine - F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
        columns.append((detail.square().mean(dim=(1, 2, 3)) + 1e-8).log())
        fine = coarse
    if gt is not None:
        columns += [ssim(x, gt), dwt(x, gt), psnr(x, gt)]
    return torch.stack(columns, dim=1).double().cpu().numpy()


def fit_svm(d: np.ndarray, label: np.ndarray) -> np.ndarray:
    """w (M,) with sign(d @ w) = label (N,), +1 or -1, for differences of metric vectors d (N, M).

    Minimises |w|^2 / 2 + C sum max(0, 1 - label d.w) over standardised d, by coordinate descent in
    the dual (Hsieh et al. 2008, algorithm 1). No bias: a pair turned round must turn its label.
    """
    scale = np.sqrt((d ** 2).mean(axis=0)) + 1e-12
    z = label[:, None] * d / scale                                      # (N, M)
    alpha, w, square = np.zeros(len(z)), np.zeros(z.shape[1]), (z ** 2).sum(axis=1)
    for _ in range(SVM_ROUNDS):
        for i in np.flatnonzero(square):
            step = np.clip(alpha[i] + (1 - w @ z[i]) / square[i], 0, SVM_C) - alpha[i]
            alpha[i] += step
            w += step * z[i]
    return w / scale


def unknown_pairs(net, photos: Photos, n: int, K: int, eta: float, seed: int):
    """Restorations a, b (n, 3, H, W) of n photos, each degraded twice, and the photos."""
    index = np.random.default_rng(seed).permutation(len(photos))[:n]
    device, both = next(net.parameters()).device, []
    for epoch in (0, 1):        # another epoch, another degradation of the same photo
        lq, gt = (u.to(device) for u in pairs(photos, index, seed, epoch))
        both.append(restore(net, lq, K, eta, seed + epoch))
    return both[0], both[1], gt


def label_pairs(labels: str, photos: Tensor, unknown, seed: int) -> tuple[Tensor, Tensor]:
    """(better, worse) of the pairs `unknown` = (a, b, gt) as the SVM sees them, and of a person's.

    `labels` "svm": `photos` in milder and heavier degradations teach; else a person's CSV file.
    """
    if labels == "svm":
        (a, b), gt = graded(photos, np.random.default_rng(seed)), photos
        label = np.ones(len(a))
    else:
        a, b, gt, label = read_labels(labels, photos.shape[-1])
    d = metrics(a, gt) - metrics(b, gt)
    held = np.arange(len(d)) % 5 == 0       # every fifth label only checks
    w = fit_svm(d[~held], label[~held])
    x, y, ref = unknown
    print(f"labels: an SVM taught by {sum(~held)} pairs agrees with "
          f"{((d[held] @ w > 0) == (label[held] > 0)).mean():.0%} of {sum(held)} held-out labels; "
          f"it labels {len(x)} pairs of unknown order")
    ref = ref if gt is not None else None       # the metrics that the SVM was taught
    first = (metrics(x, ref) - metrics(y, ref)) @ w > 0
    if labels != "svm":
        x, y = torch.cat([x, a.to(x.device)]), torch.cat([y, b.to(y.device)])
        first = np.concatenate([first, label > 0])
    first = torch.from_numpy(first).to(x.device).view(-1, 1, 1, 1)
    return torch.where(first, x, y), torch.where(first, y, x)


def read_labels(path, size: int):
    """A person's pairs: a, b (N, 3, size, size), the photos or None, label (N,) +1 where a is
    preferred, -1 where b is. Lines without a preference are passed over."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:     # Excel's files have a mark
            table = csv.DictReader(file, restval="")
            rows, named = list(table), table.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {path}: known, svm, or a readable CSV file ({error})") from None
    if not {*COLUMNS[:3]} <= {*named}:
        raise UserError(f"--labels {path}: the first line must name {', '.join(COLUMNS[:3])}")
    for line, row in enumerate(rows, 2):
        if row["preferred"] not in ("a", "b", ""):
            raise UserError(f"--labels {path}, line {line}: preferred must be a, b or empty, not "
                            f"{row['preferred']!r}")
    rows = [row for row in rows if row["preferred"]]
    if len(rows) < MIN_LABELS:
        raise UserError(f"--labels {path}: {len(rows)} pairs are labelled, {MIN_LABELS} is the "
                        "least; write a or b into the column preferred")
    a, b, gt = (to_float(torch.stack([read_photo(Path(path).parent / row[name], size)
                                      for row in rows])) if name in named else None
                for name in ("path_a", "path_b", "path_gt"))
    return a, b, gt, np.array([1. if row["preferred"] == "a" else -1. for row in rows])


def write_pairs(args):
    """Pairs for a person: NNNN.png (a | b) to look at, both and the photo, and pairs.csv."""
    out = Path(args.out)
    if has_file(out) or (out / "pairs.csv").exists():
        raise UserError(f"--out {out}: is a file, or its pairs.csv may hold labels already; choose "
                        "another")
    net, state = load_restorer(args.ckpt, pick_device(args.device))
    saved, size = state["args"], net.config.size
    data = args.data or saved["data"]
    photos = (Photos.from_folder(data, size, "train") if data
              else Photos.drawn(saved["faces"], saved["seed"], size, "train"))
    trios = unknown_pairs(net, photos, args.n, saved["ddim_steps"], saved["eta"], args.seed)
    out.mkdir(parents=True, exist_ok=True)
    rows = [COLUMNS]
    for i, trio in enumerate(zip(*(u.split(1) for u in trios))):
        sheet(trio[:2], max(1, 256 // size)).save(out / f"{i:04}.png")
        a, b, gt = (f"{i:04}_{part}.png" for part in ("a", "b", "gt"))
        for name, x in zip((a, b, gt), trio):
            sheet([x]).save(out / name)
        rows.append([a, b, "", gt])
    with open(out / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    print(f"{len(rows) - 1} pairs: look at {out}/0000.png and on, write a (left) or b (right) into "
          f"the column preferred of {out}/pairs.csv; then train.py --mode frm --labels with it")


def main():
    p = argparse.ArgumentParser(description="Write pairs of restorations for a person to label.")
    p.add_argument("--ckpt", required=True, help="the restorer")
    p.add_argument("--data", help="folder of photos (default: as trained)")
    p.add_argument("--out", default="pairs", help="a new folder")
    p.add_argument("--n", type=positive, default=100, help="how many pairs (100)")
    p.add_argument("--seed", type=whole, default=1, help="of the choice of photos and degradations")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    write_pairs(p.parse_args())
