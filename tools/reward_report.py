"""How each reward reacts to graded damage, and what damage it does not detect.

    python -m tools.reward_report [--data path/to/faces] [--rewards ...] [--frm_weights FILE]

Every photo is damaged in six kinds and five grades (all ours), and each term scores each grade.
"rho" is Spearman's rank correlation of a photo's five scores with the grade, averaged over the
photos: -1 if every grade lowers the score. "fall" is the mean score of the clean photos minus that
of the heaviest grade; a star marks means that do not fall at every grade. A term is blind to damage
whose fall is small against its largest fall.
"""
import argparse

import numpy as np
import torch
import torch.nn.functional as F

from frm import load_face_reward
from model import BATCH
from rewards import load_reward, parse_rewards
from support.checkpoint import pick_device
from support.cli import ModelSettings, add_flags, positive, run_main, settings_fields
from support.data import Photos, blur, jpeg, to_float, to_uint8


def swap(x, radius):
    """x (B, 3, S, S) with the previous face of the batch in a soft-edged disc around the centre,
    whose radius is a share of the side."""
    place = torch.linspace(-.5, .5, x.shape[-1])
    inside = torch.sigmoid((radius - (place ** 2 + place[:, None] ** 2).sqrt()) / .02)
    return x.lerp(x.roll(1, dims=0), inside)


# name: (five grades, the function that damages x (B, 3, S, S) by a grade)
DAMAGE = {
    "blur": ((.5, .8, 1.2, 1.8, 2.6),       # sigma in pixels of 64
             lambda x, g: torch.stack([blur(u, *[g * x.shape[-1] / 64] * 2, 0.) for u in x])),
    "noise": ((5, 10, 20, 35, 50),          # sigma of 255; the same noise at every grade
              lambda x, g: x + g / 127.5 * torch.randn(
                  x.shape, generator=torch.Generator().manual_seed(0))),
    "JPEG": ((90, 70, 45, 25, 10),          # quality
             lambda x, g: to_float(torch.stack([jpeg(u, g) for u in to_uint8(x)]))),
    "downsampling": ((1.33, 2, 3, 4, 6),    # factor, down and up again
                     lambda x, g: F.interpolate(F.interpolate(
                         x, size=round(x.shape[-1] / g), mode="bilinear", antialias=True),
                         size=x.shape[-1], mode="bilinear")),
    "colour": ((.02, .05, .1, .15, .2),     # red up, blue down, of 1
               lambda x, g: x + 2 * g * torch.tensor([1., 0., -1.]).view(3, 1, 1)),
    "swap": ((.1, .2, .3, .4, .5), swap),   # radius of another's face
}


def spearman(score: np.ndarray) -> float:
    """Rank correlation of each row of (N, grades) with 1, 2, 3, ..., averaged over the rows. Equal
    scores share their mean rank; a row of equal scores counts as 0."""
    u, v, grade = score[:, :, None], score[:, None], np.arange(score.shape[1])
    rank = (u > v).sum(axis=2) + (u == v).sum(axis=2) / 2               # (N, grades)
    rank, grade = rank - rank.mean(axis=1, keepdims=True), grade - grade.mean()
    norm = np.sqrt((rank ** 2).sum(axis=1) * (grade ** 2).sum())
    return float(np.mean(rank @ grade / np.where(norm, norm, 1)))


@torch.no_grad()
def scores(reward, x: torch.Tensor, device) -> dict[str, dict[str, np.ndarray]]:
    """damage -> term -> (N, 6): the clean photo's score, then the five grades'."""
    def judge(u):
        parts = [reward(a.to(device), b.to(device))[1] for a, b in zip(u.split(BATCH),
                                                                       x.split(BATCH))]
        return {term: torch.cat([part[term] for part in parts]).cpu().numpy() for term in parts[0]}
    found, clean = {}, judge(x)
    for kind, (grades, damage) in DAMAGE.items():
        columns = [clean, *(judge(damage(x, grade).clamp(-1, 1)) for grade in grades)]
        found[kind] = {term: np.stack([column[term] for column in columns], 1) for term in clean}
    return found


def table(found: dict) -> str:
    """Markdown: a row for each term, a column for each kind of damage."""
    lines = ["| rho, fall | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for term in next(iter(found.values())):
        lines.append(f"| {term} |")
        for rows in found.values():
            mean = rows[term].mean(axis=0)                              # (6,)
            star = "*" if (np.diff(mean) >= 0).any() else ""
            lines[-1] += f" {spearman(rows[term][:, 1:]):.2f}, {mean[0] - mean[-1]:.3f}{star} |"
    return "\n".join(lines)


def report(args):
    """Score the damaged photos and print the table."""
    device, weights = pick_device(args.device), parse_rewards(args.rewards)
    face = (load_face_reward(args.frm_weights or "runs/frm/last.pt", size=args.size)
            if "face" in weights else None)
    reward = load_reward(weights, args, face, device)
    photos = (Photos.from_folder(args.data, args.size, "heldout", args.n) if args.data
              else Photos.drawn(args.n, 0, args.size, "heldout"))
    print(f"{len(photos)} held-out photos ({args.data or 'drawn faces'}) of {args.size} px\n\n"
          + table(scores(reward, to_float(photos.images), device)))


def parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    p = argparse.ArgumentParser(description="How each reward reacts to graded damage.")
    p.add_argument("--data", help="folder of photos with held-out files (default: drawn faces)")
    p.add_argument("--rewards", default="offline", help="a set, or name=weight,... (offline)")
    p.add_argument("--n", type=positive, default=200, help="how many photos (200)")
    p.add_argument("--size", type=positive, default=32, help="their side in pixels, as the face "
                   "reward model was trained on (32)")
    add_flags(p, settings_fields(ModelSettings))
    return p


if __name__ == "__main__":
    run_main(lambda: report(parser().parse_args()))
