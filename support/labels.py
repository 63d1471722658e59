"""Labels for pairs of restorations whose order is not known: an SVM gives them.

Paper    DiffusionReward (Wu et al. 2025, arXiv 2505.17910): people label some pairs; a linear SVM
         learns those labels from the pictures' metric vectors, and labels the other pairs.
Departs  The metrics are ours (`frm.metric_vector`). With `--labels svm` no person is needed: pairs
         of known order train the SVM.
"""
import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.cli import UserError, read_table
from support.data import graded, to_float
from support.photos import read_photo

COLUMNS = ["path_a", "path_b", "preferred", "path_gt"]     # of the CSV file; path_gt is optional
MIN_LABELS = 10     # ours: fewer cannot fit six numbers and leave some to check them
SVM_C = 1.0         # penalty of a wrong label, LIBLINEAR's default
SVM_ROUNDS = 100    # ours: by then w changes by less than a part in a thousand


def fit_svm(d: np.ndarray, label: np.ndarray) -> np.ndarray:
    """w (M,) with sign(d @ w) = label (N,), +1 or -1, for differences of metric vectors d (N, M).

    Minimises |w|^2 / 2 + C sum max(0, 1 - label d.w) over standardised d, by coordinate descent in
    the dual (Hsieh et al. 2008, algorithm 1). There is no bias: when the two pictures of a pair
    change places, the label must change its sign.
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


def label_pairs(labels: str, photos: Tensor, unknown, metric_vector, seed: int):
    """The pairs `unknown` = (a, b, gt), each (M, 3, H, W), as the SVM labels them, and a person's.

    `labels` "svm": milder and heavier degradations of `photos` (N, 3, H, W) train the SVM; else it
    is a person's CSV file. Returns (better, worse). Prints how well the SVM agrees with labels that
    it has not seen. Raises UserError if the file cannot be used."""
    if labels == "svm":
        (a, b), gt = graded(photos, np.random.default_rng(seed)), photos
        label = np.ones(len(a))
    else:
        a, b, gt, label = read_labels(labels, photos.shape[-1])
    d = metric_vector(a, gt) - metric_vector(b, gt)
    held = np.arange(len(d)) % 5 == 0       # every fifth label only checks the others
    w = fit_svm(d[~held], label[~held])
    x, y, ref = unknown
    print(f"labels: an SVM trained on {sum(~held)} pairs agrees with "
          f"{((d[held] @ w > 0) == (label[held] > 0)).mean():.0%} of {sum(held)} held-out labels; "
          f"it labels {len(x)} pairs of unknown order")
    ref = ref if gt is not None else None       # the same metrics as in training
    first = (metric_vector(x, ref) - metric_vector(y, ref)) @ w > 0
    if labels != "svm":
        x, y = torch.cat([x, a.to(x.device)]), torch.cat([y, b.to(y.device)])
        first = np.concatenate([first, label > 0])
    first = torch.from_numpy(first).to(x.device).view(-1, 1, 1, 1)
    return torch.where(first, x, y), torch.where(first, y, x)


def read_labels(path, size: int):
    """A person's pairs in a CSV file: a, b (N, 3, size, size), the photos or None, and label (N,),
    +1 where a is preferred and -1 where b is. Rows without a preference are skipped. Raises
    UserError if the file cannot be used."""
    try:
        rows, named = read_table(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {path}: known, svm, or a readable CSV file ({error})") from None
    if not {*COLUMNS[:3]} <= {*named}:
        raise UserError(f"--labels {path}: the first line must name {', '.join(COLUMNS[:3])}")
    for line, row in enumerate(rows, 2):
        row["preferred"] = row["preferred"].strip().lower()
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
