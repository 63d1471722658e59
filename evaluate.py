"""Compare checkpoints on one held-out set with one seed: a table, metrics.json and a picture.

    python evaluate.py --ckpt runs/sft/last.pt runs/lrpo/last.pt [--data path/to/faces]

Every row restores the same LQ images from the same noise with the same sampler. PSNR and SSIM are
over RGB at the images' own size, data range 1; SSIM is rewards.py's (Wang's window and constants,
equal to scikit-image's, see the tests). Higher is better in every column but LPIPS. "±" is the standard
error over the images of the difference to the first checkpoint's row, image by image.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

from data import Photos, UserError, pairs, sheet
from model import Diffusion, load_restorer, pick_device
from rewards import LPIPS, build_reward, parse_rewards, psnr, ssim

EVAL_ETA = 0.8          # LRPO's code samples with 0.8 and trains with 1.0
HELD_OUT_SEED = 0       # the held-out degradations are the same for every run
BATCH = 100             # images restored at a time


def held_out(data, size: int, n: int, device):
    """The first n held-out pairs (lq, gt), each (n, 3, size, size), of a folder or of drawn faces."""
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
    """Restorations of lq (N, 3, H, W), in batches; the noise depends on the seed alone."""
    generator, diffusion = torch.Generator().manual_seed(seed), Diffusion(net.config, lq.device)
    return torch.cat([diffusion.sample(net, part, K, eta, generator) for part in lq.split(BATCH)])


def table(rows: dict[str, dict]) -> str:
    """A markdown table of per-image figures; rows[1] is the one that the others are held against."""
    names = list(next(iter(rows.values())))
    base = list(rows.values())[1]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, row in rows.items():
        cells = []
        for name in names:
            delta = row[name] - base[name]
            error = delta.std().item() / len(delta) ** 0.5
            cells.append(f"{row[name].mean():.4g}" + (f" ±{error:.2g}" if error > 0 else ""))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(args) -> dict:
    """Restore with every checkpoint, print the table, write the files. Returns the mean figures."""
    device = pick_device(args.device)
    nets, states = zip(*[load_restorer(path, device) for path in args.ckpt])
    labels = [Path(p).parent.name if Path(p).stem == "last" else str(p) for p in args.ckpt]
    size, saved = nets[0].config.size, states[0]["args"]
    for path, net in zip(args.ckpt, nets):
        if net.config.size != size:
            raise UserError(f"--ckpt {path}: made for {net.config.size} px, but {args.ckpt[0]} for "
                            f"{size} px; compare checkpoints of one size")
    if len(set(labels)) < len(labels):
        labels = [str(p) for p in args.ckpt]
    K = args.ddim_steps or saved["ddim_steps"]
    frm = args.frm_weights or Path(args.ckpt[0]).parent.parent / "frm" / "last.pt"
    reward = build_reward(parse_rewards(args.rewards or saved["rewards"]), device, frm,
                          args.lpips_net, args.lpips_weights)
    lpips = LPIPS(args.lpips_net, args.lpips_weights).to(device) if args.lpips_weights else None
    lq, gt = held_out(args.data, size, args.n, device)
    images = [restore(net, lq, K, args.eta, args.seed) for net in nets]
    rows = {"LQ": measure(lq, gt, reward, lpips)}
    rows |= {label: measure(x, gt, reward, lpips) for label, x in zip(labels, images)}

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    means = {label: {k: v.mean().item() for k, v in row.items()} for label, row in rows.items()}
    facts = {"data": args.data or "drawn faces", "images": len(gt), "size": gt.shape[-1], "K": K,
             "eta": args.eta, "seed": args.seed, "rewards": reward.weights}
    (out / "metrics.json").write_text(json.dumps(facts | {"rows": means}, indent=1) + "\n")
    sheet([u[:8] for u in [lq, *images, gt]], scale=max(1, 96 // gt.shape[-1])).save(
        out / "comparison.png")
    print(f"{len(gt)} held-out images of {gt.shape[-1]} px, K = {K}, eta = {args.eta}, seed "
          f"{args.seed}; reward = {' + '.join(f'{w:g} {n}' for n, w in reward.weights.items())}")
    print(table(rows))
    print(f"{out}/comparison.png: LQ | {' | '.join(labels)} | ground truth")
    return means


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Compare checkpoints on held-out faces.")
    p.add_argument("--ckpt", nargs="+", required=True, help="checkpoints, the baseline first")
    p.add_argument("--data", help="folder of photos; its held-out files are used (default: drawn faces)")
    p.add_argument("--n", type=int, default=200, help="how many held-out images (default 200)")
    p.add_argument("--rewards", help="name=weight,... (default: what the first checkpoint was run with)")
    p.add_argument("--frm_weights", help="face reward model (default: frm/last.pt beside the run)")
    p.add_argument("--lpips_net", default="squeeze", choices=["squeeze", "alex", "vgg"])
    p.add_argument("--lpips_weights", help="backbone file; with it the table has an LPIPS column")
    p.add_argument("--ddim_steps", type=int, help="K (default: as in training)")
    p.add_argument("--eta", type=float, default=EVAL_ETA, help=f"DDIM noise (default {EVAL_ETA})")
    p.add_argument("--seed", type=int, default=0, help="of the sampler's noise")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--out", default="runs/evaluation", help="folder for metrics.json, comparison.png")
    return p


if __name__ == "__main__":
    try:
        compare(parser().parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
