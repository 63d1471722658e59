"""Compare checkpoints on one held-out set with one seed: a table, metrics.json and a picture.

    python evaluate.py --ckpt runs/sft/last.pt runs/lrpo/last.pt [--data path/to/faces]

Every row restores the same LQ images from the same noise, in the K steps that it was trained for.
PSNR and SSIM are over RGB at the images' own size, data range 1; SSIM is rewards.py's (Wang's
window and constants, equal to scikit-image's, see the tests). Higher is better in every column but
lpips. "±" is the standard error over the images of the difference to the second row of the table.
"""
import argparse
import csv
import json
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure

from data import Photos, UserError, make_folder, pairs, run_main, sheet
from frontier import (FRONTIER_STEPS, draw_frontier, frontier, sampler_points, standard_error,
                      verdict)
from model import Diffusion, load_restorer, pick_device
from rewards import LPIPS, build_reward, parse_rewards, psnr, ssim

EVAL_ETA = 0.8          # LRPO's code samples with 0.8 and trains with 1.0
HELD_OUT_SEED = 2 ** 32 - 1     # one set of held-out degradations, of a seed that no run has
BATCH = 100             # images restored at a time


def number(kind, low, high=2 ** 32 - 1):
    """An argparse type: a finite number of this kind, from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number "
                                             f"from {low} to {high}")
        return value
    return parse


positive, whole = number(int, 1), number(int, 0)
amount, share = number(float, 0), number(float, 0, 1)


def held_out(data, size: int, n: int, device):
    """The first n held-out pairs (lq, gt) of a folder or of drawn faces: (n, 3, size, size)."""
    photos = (Photos.from_folder(data, size, "heldout", n) if data
              else Photos.drawn(n, 0, size, "heldout"))
    lq, gt = pairs(photos, range(len(photos)), HELD_OUT_SEED, epoch=0)
    return lq.to(device), gt.to(device)


@torch.no_grad()
def measure(x, gt, reward, lpips=None) -> dict[str, torch.Tensor]:
    """Every figure of the restorations x (N, 3, H, W), per image: name -> (N,)."""
    rows = []
    for a, b in zip(x.split(BATCH), gt.split(BATCH)):
        total, parts = reward(a, b)
        row = {"psnr": psnr(a, b), "ssim": ssim(a, b)}
        if lpips is not None:
            row["lpips"] = 1 - lpips(a, b)
        rows.append(row | {"reward": total} | {f"r_{name}": part for name, part in parts.items()})
    return {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}


def restore(net, lq, K: int, eta: float, seed: int):
    """Restorations of lq (N, 3, H, W), in batches; the noise depends on seed and N alone."""
    generator, diffusion = torch.Generator().manual_seed(seed), Diffusion(net.config, lq.device)
    return torch.cat([diffusion.sample(net, part, K, eta, generator) for part in lq.split(BATCH)])


def best_of(net, lq, gt, n: int, K: int, eta: float, seed: int, reward):
    """The best by reward of n restorations of each image: what can be had without training, by
    whoever knows the ground truth. (N, 3, H, W)"""
    x = torch.stack([restore(net, lq, K, eta, seed + i) for i in range(n)])     # (n, N, 3, H, W)
    scores = torch.stack([measure(u, gt, reward)["reward"] for u in x])         # (n, N)
    return x[scores.argmax(dim=0), torch.arange(len(lq))]


def table(rows: dict[str, dict]) -> str:
    """A markdown table of means; each row is compared with the second. A reward term that has a
    column of its own (ssim, lpips) is left out."""
    names = list(next(iter(rows.values())))
    names = [name for name in names if name.removeprefix("r_") not in names or name[:2] != "r_"]
    base = list(rows.values())[1]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, row in rows.items():
        cells = []
        for name in names:
            error = standard_error(row[name] - base[name])
            cells.append(f"{row[name].mean():.4g}" + (f" ±{error:.2g}" if error > 0 else ""))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(args):
    """Restore with every checkpoint, print the table, write the files."""
    device = pick_device(args.device)
    nets, states = zip(*[load_restorer(path, device) for path in args.ckpt])
    paths = [Path(path).resolve() for path in args.ckpt]
    labels = [p.parent.name if p.stem == "last" else given
              for p, given in zip(paths, args.ckpt)]
    size, saved = nets[0].config.size, states[0]["args"]
    for path, net in zip(args.ckpt, nets):
        if net.config.size != size:
            raise UserError(f"--ckpt {path}: made for {net.config.size} px, but {args.ckpt[0]} for "
                            f"{size} px; compare checkpoints of one size")
    if len(set(labels)) < len(labels):
        labels = args.ckpt
    Ks = [args.ddim_steps or state["args"]["ddim_steps"] for state in states]
    frm = args.frm_weights or paths[0].parent.parent / "frm" / "last.pt"
    reward = build_reward(parse_rewards(args.rewards or saved["rewards"]), device, frm,
                          args.lpips_net, args.lpips_weights, args.clip_weights, size)
    lpips = reward.terms.get("lpips")
    if args.lpips_weights and lpips is None:
        lpips = LPIPS(args.lpips_net, args.lpips_weights).to(device)
    data = args.data or saved["data"]
    lq, gt = held_out(data, size, args.n, device)
    if args.quartiles and len(gt) < 4:
        raise UserError(f"--quartiles: needs 4 held-out images or more, not {len(gt)}")
    out = make_folder(args.out)
    images = [restore(net, lq, K, args.eta, args.seed) for net, K in zip(nets, Ks)]
    if args.best_of:
        images.append(best_of(nets[0], lq, gt, args.best_of, Ks[0], args.eta, args.seed, reward))
        labels = [*labels, f"{labels[0]}, best of {args.best_of}"]
    rows = {"LQ": measure(lq, gt, reward, lpips)}
    rows |= {label: measure(x, gt, reward, lpips) for label, x in zip(labels, images)}

    means = {label: {k: v.mean().item() for k, v in row.items()} for label, row in rows.items()}
    facts = {"ckpt": dict(zip(labels, map(str, args.ckpt))), "data": data or "drawn faces",
             "images": len(gt), "size": size, "K": dict(zip(labels, Ks)),
             "eta": args.eta, "seed": args.seed, "rewards": reward.weights,
             "psnr, ssim": "RGB, data range 1, nanoLRPO's own; SSIM with Wang's window, no padding"}
    sheet([u[:8] for u in [lq, *images, gt]], scale=max(1, 96 // gt.shape[-1])).save(
        out / "comparison.png")
    formula = " + ".join(f"{w:g} {name}" for name, w in reward.weights.items())
    print(f"{len(gt)} held-out images ({facts['data']}) of {size} px, K = "
          f"{', '.join(map(str, Ks))}, eta = {args.eta}, seed {args.seed}; reward = {formula}")
    print(table(rows))
    if args.quartiles:
        easiest_first = (lq - gt).abs().mean(dim=(1, 2, 3)).argsort().cpu()
        for q, part in enumerate(easiest_first.tensor_split(4), 1):
            print(f"\nquartile {q} by the L1 distance of LQ from the ground truth (4: the hardest)")
            print(table({label: {k: v[part] for k, v in row.items()}
                         for label, row in rows.items()}))
    print(f"{out}/comparison.png: LQ | {' | '.join(labels)} | ground truth")
    facts |= {"rows": means}
    if args.frontier:
        points = sampler_points(lambda K, eta: measure(restore(nets[0], lq, K, eta, args.seed), gt,
                                                       reward, lpips), Ks, args.eta)
        names = [name for name in ("lpips", "r_face") if name in rows[labels[0]]] or ["ssim"]
        draw_frontier(out / "frontier.png", {l: rows[l] for l in labels}, points, names, labels[0])
        facts |= {"sampler": {f"K={K}, eta={eta:g}": {k: v.mean().item() for k, v in row.items()}
                              for (K, eta), row in points.items()}, "beyond": {}}
        print(f"\nThe first checkpoint with eta = {args.eta:g} and other K, and the other rows "
              "against its frontier:")
        print(table({"LQ": rows["LQ"]} | {f"K = {K}": points[K, args.eta] for K in FRONTIER_STEPS}))
        for name in names:
            places = frontier({l: rows[l] for l in labels[1:]}, points, name)
            facts["beyond"][name] = places
            print(*(verdict(l, name, *place) for l, place in places.items()), sep="\n")
        print(f"{out}/frontier.png")
    (out / "metrics.json").write_text(json.dumps(facts, indent=1) + "\n")


class Log:
    """metrics.csv: one line a step, written with each checkpoint, so that the two agree."""

    def __init__(self, path: Path, start: float = math.inf):
        """Reads back the rows up to step `start` of a run that goes on; none at start = 0."""
        self.path, self.rows = path, []
        if start and path.exists():
            with open(path, newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]

    def write(self):
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    def curves(self, path: Path):
        """Every column against the step, in small panels."""
        names = list(dict.fromkeys(n for row in self.rows for n in row))[2:]    # after the clocks
        lines = -(-len(names) // 4)
        fig = Figure(figsize=(14, 2.4 * lines))
        axes = fig.subplots(lines, 4, squeeze=False)
        for ax, name in zip(axes.flat, names):
            rows = [row for row in self.rows if row.get(name) not in (None, "")]
            points = [(int(row["step"]), float(row[name])) for row in rows]
            ax.plot(*zip(*points), marker="." if len(points) < 30 else "")
            ax.set_title(name, fontsize=9)
        for ax in list(axes.flat)[len(names):]:
            ax.axis("off")
        fig.tight_layout()
        fig.savefig(path, dpi=70)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Compare checkpoints on held-out faces.")
    p.add_argument("--ckpt", nargs="+", required=True, help="checkpoints, the baseline first")
    p.add_argument("--data", help="folder of photos with held-out files (default: as trained)")
    p.add_argument("--n", type=positive, default=200, help="how many held-out images (default 200)")
    p.add_argument("--quartiles", action="store_true", help="also a table for each quarter of the "
                   "images, by how far LQ is from the ground truth")
    p.add_argument("--frontier", action="store_true", help="also the first checkpoint at other K "
                   "and eta, and each row's distance from what those reach")
    p.add_argument("--best_of", type=positive, help="also the best by reward of n restorations by "
                   "the first checkpoint")
    p.add_argument("--rewards", help="name=weight,... or a set (default: as the first checkpoint)")
    p.add_argument("--frm_weights", help="face reward model (default: frm/last.pt beside the run)")
    p.add_argument("--lpips_net", default="squeeze", choices=["squeeze", "alex", "vgg"])
    p.add_argument("--lpips_weights", help="backbone file; with it the table has an LPIPS column")
    p.add_argument("--clip_weights", help="file of CLIP RN50 (default: fetched)")
    p.add_argument("--ddim_steps", type=positive, help="K (default: each as it was trained)")
    p.add_argument("--eta", type=share, default=EVAL_ETA, help=f"DDIM noise (default {EVAL_ETA})")
    p.add_argument("--seed", type=whole, default=0, help="of the sampler's noise")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--out", default="runs/evaluation", help="for metrics.json, comparison.png")
    return p


if __name__ == "__main__":
    run_main(lambda: compare(parser().parse_args()))
