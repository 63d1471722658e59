"""Compare checkpoints on one held-out set with one seed: a table, metrics.json and a picture.

    python evaluate.py --ckpt runs/sft/last.pt runs/lrpo/last.pt [--data path/to/faces]

Every row restores the same LQ images from the same noise, in the K steps that it was trained for.
PSNR and SSIM are over RGB at the images' own size, data range 1. SSIM is that of rewards.py (Wang's
window and constants, tested against scikit-image). Higher is better in every column but lpips. "±"
is the standard error over the images of the difference to the first checkpoint.
"""
import argparse
import json
from pathlib import Path

import torch

from frm import load_face_reward
from model import BATCH, EVAL_ETA, load_restorer, restore
from rewards import CompositeReward, parse_rewards, psnr, ssim
from support.checkpoint import pick_device
from support.cli import (ModelSettings, UserError, add_flags, make_folder, not_empty, positive,
                         run_main, seed_number, settings_fields, share)
from support.clipiqa import load_clipiqa
from support.data import Photos, pairs, sheet
from support.frontier import (FRONTIER_STEPS, distances_beyond, draw_frontier, sampler_points,
                              standard_error, verdict)
from support.lpips_reward import LPIPS

HELD_OUT_SEED = 2 ** 32 - 1     # of the held-out degradations; no run can have it
SHOWN = 5                       # faces in the picture (ours)


def held_out(data, size: int, n: int, device):
    """(lq, gt) of at most n held-out images, (n, 3, S, S) each, the same in every run."""
    photos = (Photos.from_folder(data, size, "heldout", n) if data
              else Photos.drawn(n, 0, size, "heldout"))
    lq, gt = pairs(photos, range(len(photos)), HELD_OUT_SEED, epoch=0)
    return lq.to(device), gt.to(device)


def load_reward(weights: dict[str, float], args, frm_path, device, size: int) -> CompositeReward:
    """The composite reward with the models that `weights` names, from the files in `args` (flags of
    ModelSettings) and `frm_path`. Raises UserError if one of them cannot be had."""
    models = {}
    if "face" in weights:
        models["face"] = load_face_reward(frm_path, size=size).eval().requires_grad_(False)
    if "lpips" in weights:
        models["lpips"] = LPIPS(args.lpips_net, args.lpips_weights)
    if "clipiqa" in weights:
        models["clipiqa"] = load_clipiqa(args.clip_weights)
    return CompositeReward(weights, **{name: model.to(device) for name, model in models.items()})


@torch.no_grad()
def measure(x, gt, reward, lpips=None) -> dict[str, torch.Tensor]:
    """Every metric of the restorations x (N, 3, H, W), for each image: name -> (N,)."""
    rows = []
    for a, b in zip(x.split(BATCH), gt.split(BATCH)):
        total, terms = reward(a, b)
        row = {"psnr": psnr(a, b), "ssim": ssim(a, b)}
        if lpips is not None:
            row["lpips"] = 1 - lpips(a, b)
        rows.append(row | {"reward": total} | {f"r_{name}": term for name, term in terms.items()})
    return {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}


def best_of(net, lq, gt, n: int, K: int, eta: float, seed: int, reward):
    """The best by reward of n restorations of each image, (N, 3, H, W): what someone who knows the
    ground truth reaches without training."""
    x = torch.stack([restore(net, lq, K, eta, seed + i) for i in range(n)])     # (n, N, 3, H, W)
    scores = torch.stack([measure(u, gt, reward)["reward"] for u in x])         # (n, N)
    return x[scores.argmax(dim=0), torch.arange(len(lq))]


def means(rows: dict[str, dict]) -> dict[str, dict[str, float]]:
    """The mean over the images of every metric of every row."""
    return {label: {k: v.mean().item() for k, v in row.items()} for label, row in rows.items()}


def table(rows: dict[str, dict], base: str) -> str:
    """A markdown table of means, each row compared with the row `base`. A reward term that has a
    column of its own (ssim, lpips) is left out."""
    names = list(next(iter(rows.values())))
    names = [name for name in names if not (name.startswith("r_") and name[2:] in names)]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, row in rows.items():
        cells = []
        for name in names:
            error = standard_error(row[name] - rows[base][name])
            cells.append(f"{row[name].mean():.4g}" + (f" ±{error:.2g}" if error > 0 else ""))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def print_quartiles(rows: dict, base: str, lq, gt):
    """A table for each quarter of the images, from the easiest to the hardest."""
    easiest_first = (lq - gt).abs().mean(dim=(1, 2, 3)).argsort().cpu()
    for q, part in enumerate(easiest_first.tensor_split(4), 1):
        print(f"\nquartile {q} by the L1 distance of LQ from the ground truth (4: the hardest)")
        print(table({label: {k: v[part] for k, v in row.items()} for label, row in rows.items()},
                    base))


def place_on_frontier(rows: dict, measured, Ks: list[int], eta: float, out: Path) -> dict:
    """Draw frontier.png, print each row's place, and return both as plain numbers. The first of
    `rows` spans the frontier; measured(K, eta) restores with it and measures."""
    first, *others = rows
    points = sampler_points(measured, Ks, eta)
    names = [name for name in ("lpips", "r_face") if name in rows[first]] or ["ssim"]
    draw_frontier(out / "frontier.png", rows, points, names, first)
    print(f"\nThe first checkpoint with eta = {eta:g} and other K, and the place of each other row "
          "against its frontier:")
    other = {f"K = {K}": points[K, eta] for K in FRONTIER_STEPS}
    print(table({first: rows[first]} | other, first))
    beyond = {name: distances_beyond({label: rows[label] for label in others}, points, name)
              for name in names}
    for name, places in beyond.items():
        print(*(verdict(label, name, *place) for label, place in places.items()), sep="\n")
    print(f"{out}/frontier.png")
    return {"sampler": means({f"K={K}, eta={e:g}": row for (K, e), row in points.items()}),
            "beyond": beyond}


def load(args, device):
    """The networks, their checkpoints and their labels. Raises UserError for different image
    sizes."""
    nets, states = zip(*[load_restorer(path, device) for path in args.ckpt])
    size = nets[0].config.size
    for path, net in zip(args.ckpt, nets):
        if net.config.size != size:
            raise UserError(f"--ckpt {path}: made for {net.config.size} px, but {args.ckpt[0]} for "
                            f"{size} px; compare checkpoints of one size")
    paths = [Path(path).resolve() for path in args.ckpt]
    labels = [path.parent.name if path.stem == "last" else given
              for path, given in zip(paths, args.ckpt)]
    return nets, states, labels if len({*labels}) == len(labels) else list(args.ckpt)


def compare(args):
    """Restore with every checkpoint, print the tables, write metrics.json and the pictures."""
    device = pick_device(args.device)
    nets, states, labels = load(args, device)
    size, saved = nets[0].config.size, states[0]["args"]
    Ks = [args.ddim_steps or state["args"]["ddim_steps"] for state in states]
    beside = [Path(path).resolve().parent.parent / "frm" / "last.pt" for path in args.ckpt]
    frm = args.frm_weights or next((path for path in beside if path.exists()), None)
    weights = parse_rewards(args.rewards or saved["rewards"])
    if "face" in weights and frm is None and len(weights) > 1:
        del weights["face"]
        print(f"face is left out of the reward: no {beside[0]} is there; --frm_weights names one")
    reward = load_reward(weights, args, frm, device, size)
    lpips = reward.terms.get("lpips")
    if args.lpips_weights and lpips is None:
        lpips = LPIPS(args.lpips_net, args.lpips_weights).to(device)
    data = args.data or saved["data"]
    lq, gt = held_out(data, size, args.n, device)
    if args.quartiles and len(gt) < 4:
        raise UserError(f"--quartiles: needs 4 held-out images or more, not {len(gt)}")
    out = make_folder(args.out)
    (out / "frontier.png").unlink(missing_ok=True)      # of an earlier comparison

    images = [restore(net, lq, K, args.eta, args.seed) for net, K in zip(nets, Ks)]
    if args.best_of:
        images.append(best_of(nets[0], lq, gt, args.best_of, Ks[0], args.eta, args.seed, reward))
        labels = [*labels, f"{labels[0]}, best of {args.best_of}"]
    rows = {label: measure(x, gt, reward, lpips) for label, x in zip(labels, images)}
    all_rows = {"LQ": measure(lq, gt, reward, lpips)} | rows

    facts = {"ckpt": dict(zip(labels, map(str, args.ckpt))), "data": data or "drawn faces",
             "images": len(gt), "size": size, "K": dict(zip(labels, Ks)), "eta": args.eta,
             "seed": args.seed, "rewards": reward.weights, "rows": means(all_rows),
             "psnr, ssim": "RGB, data range 1, nanoLRPO's own; SSIM with Wang's window, no padding"}
    formula = " + ".join(f"{w:g} {name}" for name, w in reward.weights.items())
    print(f"{len(gt)} held-out images ({facts['data']}) of {size} px, K = "
          f"{', '.join(map(str, Ks))}, eta = {args.eta}, seed {args.seed}; reward = {formula}")
    print(table(all_rows, labels[0]))
    if args.quartiles:
        print_quartiles(all_rows, labels[0], lq, gt)
    columns = [u[:SHOWN] for u in [lq, *images, gt]]
    sheet(columns, scale=max(1, 128 // size)).save(out / "comparison.png")
    print(f"{out}/comparison.png: LQ | {' | '.join(labels)} | ground truth")
    if args.frontier:
        facts |= place_on_frontier(rows, lambda K, eta: measure(
            restore(nets[0], lq, K, eta, args.seed), gt, reward, lpips), Ks, args.eta, out)
    (out / "metrics.json").write_text(json.dumps(facts, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    """The flags of evaluate.py."""
    p = argparse.ArgumentParser(description="Compare checkpoints on held-out faces.")
    p.add_argument("--ckpt", type=not_empty, nargs="+", required=True, help="the baseline first")
    p.add_argument("--data", type=not_empty, help="folder of photos (default: as trained)")
    p.add_argument("--n", type=positive, default=200, help="how many held-out images (200)")
    p.add_argument("--quartiles", action="store_true", help="also a table for each quarter of the "
                   "images, by how far LQ is from the ground truth")
    p.add_argument("--frontier", action="store_true", help="also the first checkpoint at other K "
                   "and eta, and each row's distance from what those reach")
    p.add_argument("--best_of", type=positive, help="also the best by reward of n restorations by "
                   "the first checkpoint")
    p.add_argument("--rewards", type=not_empty, help="name=weight,... or a set (default: as "
                   "the first checkpoint)")
    p.add_argument("--ddim_steps", type=positive, help="K (default: each as it was trained)")
    p.add_argument("--eta", type=share, default=EVAL_ETA, help=f"DDIM noise ({EVAL_ETA})")
    p.add_argument("--seed", type=seed_number, default=0, help="of the sampler's noise (0)")
    p.add_argument("--out", type=not_empty, default="runs/evaluation", help="folder for metrics "
                   "and pictures, which are replaced (runs/evaluation)")
    add_flags(p, settings_fields(ModelSettings))
    return p


if __name__ == "__main__":
    run_main(lambda: compare(parser().parse_args()))
