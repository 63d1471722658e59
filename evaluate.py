"""Compare checkpoints on one held-out set with one seed: tables, metrics.json and a picture.

    python evaluate.py --ckpt runs/sft/last.pt runs/lrpo/last.pt [--data path/to/faces]

Every row restores the same LQ images from the same noise, in the K steps that it was trained for.
There are two tables. The first has the judges: measures that no checkpoint's reward contains. A
gain counts when a judge sees it. The second has the reward and its terms, in which every method
that is trained on them gains.

    psnr         dB, over RGB, data range 1. No reward contains it, but it steers lrpo and refl
    ssim         Wang's, over RGB (rewards.py, tested against scikit-image); if no reward has it
    haarpsi      HaarPSI (Reisenhofer et al. 2018), by piq: wavelets, nothing learnt
    lpips_alex   LPIPS with another backbone than the reward's (--judge_net); lower is better
    identity     with --identity: distance of dlib's 128 numbers of a face from those of the ground
                 truth, lower is better; and rank1, the share of faces that are nearest to their own

Images below 128 px are enlarged twice for haarpsi and LPIPS. "±" is the standard error over the
images of the difference to the first checkpoint.

    python evaluate.py --ckpt runs/lrpo/last.pt --lq lq --data gt --images CodeFormer

takes LQ files that exist, and their ground truth by name, in place of held-out photos; without
--data there are only the terms of the reward that need no ground truth. Each folder of --images has
the pictures of another method, and gets a row of the same tables.
"""
import argparse
import json
from pathlib import Path

import piq
import torch
import torch.nn.functional as F
from torch import Tensor

from frm import load_face_reward
from model import BATCH, EVAL_ETA, load_restorer, restore
from rewards import (LPIPS, LPIPS_ENLARGED_BELOW, LPIPS_NETS, load_reward, parse_rewards, psnr,
                     ssim)
from support.checkpoint import pick_device
from support.cli import (ModelSettings, UserError, add_flags, make_folder, not_empty, positive,
                         run_main, seed_number, settings_fields, share)
from support.data import Photos, pairs, to_float
from support.frontier import (FRONTIER_STEPS, distances_beyond, draw_frontier, sampler_points,
                              verdict)
from support.given import read_given
from support.identity import Identity
from support.pictures import comparison
from support.table import means, table

HELD_OUT_SEED = 2 ** 32 - 1     # of the held-out degradations; no run can have it
BASIC = {"psnr": psnr, "ssim": ssim}        # measures that need the ground truth and no model
NO_TRUTH = ("face", "clipiqa")  # terms of the reward that need no ground truth
CHECKERBOARD = 10               # ours: times the ground truth's energy, from where it is reported


def held_out(data, size: int, n: int, device):
    """(lq, gt) of at most n held-out images, (n, 3, S, S) each, the same in every run."""
    photos = (Photos.from_folder(data, size, "heldout", n) if data
              else Photos.drawn(n, 0, size, "heldout"))
    lq, gt = pairs(photos, range(len(photos)), HELD_OUT_SEED, epoch=0)
    return lq.to(device), gt.to(device)


def given(args, size: int, device):
    """(lq, gt or None, [images of each folder of --images]) of the folders on the command line, (N,
    3, S, S) each. Raises UserError for what has no sense without ground truth."""
    if not args.lq:
        raise UserError(f"--images {args.images[0]}: give the LQ files of these pictures with --lq")
    if args.frontier and not args.data:
        raise UserError("--frontier: needs the ground truth; give its folder with --data")
    folders = [("--lq", args.lq), *(("--images", folder) for folder in args.images)]
    folders += [("--data", args.data)] * bool(args.data)
    lq, *others = (to_float(u).to(device) for u in read_given(folders, size, args.n))
    return lq, others.pop() if args.data else None, others


@torch.no_grad()
def measure(x: Tensor, gt: Tensor | None, reward, judges: dict = {}) -> dict[str, Tensor]:
    """Every metric of the restorations x (N, 3, H, W), for each image: name -> (N,). `judges`,
    {name: function of (x, gt) to (N,)}, are measured beside the reward, and PSNR and SSIM where
    there is a ground truth."""
    judges = judges if gt is None else BASIC | judges
    rows = []
    for a, b in zip(x.split(BATCH), [None] * len(x) if gt is None else gt.split(BATCH)):
        total, terms = reward(a, b)
        rows.append({name: judge(a, b) for name, judge in judges.items()}
                    | {"reward": total.flatten()} | {f"r_{k}": v for k, v in terms.items()})
    return {name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]}


def haarpsi(x: Tensor, y: Tensor) -> Tensor:
    """HaarPSI of images (N, 3, H, W) in [-1, 1], enlarged twice below 128 px: (N,) in [0, 1]."""
    scale = 2 if min(x.shape[-2:]) < LPIPS_ENLARGED_BELOW else 1
    x, y = (F.interpolate(u, scale_factor=scale, mode="bicubic").clamp(-1, 1) / 2 + 0.5
            for u in (x, y))
    return piq.haarpsi(x, y, data_range=1.0, reduction="none")


def checkerboard(x: Tensor) -> float:
    """The mean energy of images (N, 3, H, W) at the highest spatial frequency."""
    i, j = (torch.arange(n, device=x.device) for n in x.shape[-2:])
    sign = 1 - 2 * ((i[:, None] + j) % 2)                               # (H, W)
    return (x * sign).mean(dim=(2, 3)).square().mean().item()


def best_of(net, lq, gt, n: int, K: int, eta: float, seed: int, reward):
    """The best by reward of n restorations of each image, (N, 3, H, W): what someone who knows the
    ground truth reaches without training."""
    x = torch.stack([restore(net, lq, K, eta, seed + i) for i in range(n)])     # (n, N, 3, H, W)
    scores = torch.stack([measure(u, gt, reward)["reward"] for u in x])         # (n, N)
    return x[scores.argmax(dim=0), torch.arange(len(lq))]


def place_on_frontier(rows: dict, name: str, measured, Ks: list[int], eta: float, out: Path):
    """Draw frontier.png in the plane of PSNR and `name`, print each row's place, and return both as
    plain numbers. The first of `rows` spans the frontier; measured(K, eta) restores with it."""
    first, *others = rows
    points = sampler_points(measured, Ks, eta)
    draw_frontier(out / "frontier.png", rows, points, [name], first)
    print(f"\nThe first checkpoint with eta = {eta:g} and other K, and the place of each other row "
          "against its frontier:")
    print(table({first: rows[first]} | {f"K = {K}": points[K, eta] for K in FRONTIER_STEPS}, first))
    beyond = distances_beyond({label: rows[label] for label in others}, points, name)
    print(*(verdict(label, name, *place) for label, place in beyond.items()), sep="\n")
    print(f"{out}/frontier.png")
    return {"sampler": means({f"K={K}, eta={e:g}": row for (K, e), row in points.items()}),
            "beyond": {name: beyond}}


def load(args, device):
    """The networks, their checkpoints, and the labels of all rows. Raises UserError for different
    image sizes."""
    nets, states = zip(*[load_restorer(path, device) for path in args.ckpt])
    size = nets[0].config.size
    for path, net in zip(args.ckpt, nets):
        if net.config.size != size:
            raise UserError(f"--ckpt {path}: made for {net.config.size} px, but {args.ckpt[0]} for "
                            f"{size} px; compare checkpoints of one size")
    paths = [Path(path).resolve() for path in args.ckpt]
    labels = [path.parent.name if path.stem == "last" else path.stem for path in paths]
    labels += [Path(folder).resolve().name for folder in args.images]
    unique = len({"LQ", "ground truth", *labels}) == len(labels) + 2
    return nets, states, labels if unique else [*args.ckpt, *args.images]


def rewards_of(states, args) -> list[dict[str, float]]:
    """The rewards that the checkpoints were trained on, those of sft left out. Raises UserError if
    one of them has the judge's LPIPS: then it is no judge."""
    found = []
    for path, state in zip(args.ckpt, states):
        if state["mode"] != "sft":
            try:
                found.append(parse_rewards(state["args"]["rewards"]))
            except UserError:
                print(f"{path}: trained on {state['args']['rewards']}, which is not measured here")
                continue
            if found[-1].get("lpips") and state["args"]["lpips_net"] == args.judge_net:
                raise UserError(f"--judge_net {args.judge_net}: {path} was trained on LPIPS with "
                                "it, so that it is no judge; choose another")
    return found


def load_judges(args, device) -> dict:
    """The judges beside PSNR and SSIM, for `measure`. Prints a line if the backbone of the LPIPS
    that judges is not given and cannot be fetched. Raises UserError for a wrong file."""
    judges = {"haarpsi": haarpsi}
    try:
        lpips = LPIPS(args.judge_net, args.judge_weights, "--judge_weights").to(device)
        judges[f"lpips_{args.judge_net}"] = lambda x, gt: 1 - lpips(x, gt)
    except UserError as error:
        if args.judge_weights:
            raise
        print(f"without the judge lpips_{args.judge_net}: {error}")
    return judges


def load_composite(args, trained_on, blind: bool, size: int, device):
    """The reward of the table: --rewards, or the first that a checkpoint was trained on. If `blind`
    only its terms that need no ground truth. Raises UserError if there is none of them."""
    beside = [Path(path).resolve().parent.parent / "frm" / "last.pt" for path in args.ckpt]
    frm = args.frm_weights or next((path for path in beside if path.exists()), None)
    weights = (parse_rewards(args.rewards or "default") if args.rewards or not trained_on
               else trained_on[0])
    if blind:
        weights = {name: weight for name, weight in weights.items() if name in NO_TRUTH}
    if not weights:
        raise UserError(f"--lq {args.lq}: give the ground truth with --data, or a term that needs "
                        "none: --rewards face=1 or clipiqa=1")
    if "face" in weights and frm is None and len(weights) > 1:
        del weights["face"]
        print(f"face is left out of the reward: no {beside[0]} is there; --frm_weights names one")
    face = load_face_reward(frm, size=size) if "face" in weights else None
    return load_reward(weights, args, face, device)


def compare(args):
    """Restore with every checkpoint, print the tables, write metrics.json and the pictures."""
    device = pick_device(args.device)
    nets, states, labels = load(args, device)
    size, data = nets[0].config.size, args.data or states[0]["args"]["data"]
    Ks = [args.ddim_steps or state["args"]["ddim_steps"] for state in states]
    trained_on, blind = rewards_of(states, args), args.lq and not args.data     # no ground truth
    judges = {} if blind else load_judges(args, device)
    terms = {name for rewards in trained_on for name, weight in rewards.items() if weight}
    reward = load_composite(args, trained_on, blind, size, device)
    lq, gt, others = (given(args, size, device) if args.lq or args.images else
                      (*held_out(data, size, args.n, device), []))
    if args.identity and (blind or not data):
        raise UserError("--identity: needs real faces as ground truth; name their folder by --data")
    identity = args.identity and Identity(gt)
    out = make_folder(args.out)
    (out / "frontier.png").unlink(missing_ok=True)      # of an earlier comparison

    images = [restore(net, lq, K, args.eta, args.seed) for net, K in zip(nets, Ks)] + others
    if args.best_of:
        images.append(best_of(nets[0], lq, gt, args.best_of, Ks[0], args.eta, args.seed, reward))
        labels = [*labels, f"{labels[0]}, best of {args.best_of}"]
    columns = {"LQ": lq, **dict(zip(labels, images))}
    all_rows = {label: measure(x, gt, reward, judges) for label, x in columns.items()}
    rows = {label: all_rows[label] for label in labels}
    if identity:
        all_rows = {label: row | identity(columns[label]) for label, row in all_rows.items()}

    source = f"{args.lq}, ground truth {args.data}" if args.lq else data or "drawn faces"
    facts = {"ckpt": dict(zip(labels, map(str, args.ckpt))), "data": source,
             "images": len(lq), "size": size, "K": dict(zip(labels, Ks)), "eta": args.eta,
             "seed": args.seed, "rewards": reward.weights, "rewarded": sorted(terms),
             "tflop": {label: state.get("tflop") for label, state in zip(labels, states)},
             "rows": means(all_rows),
             "psnr, ssim": "RGB, data range 1, nanoLRPO's own; SSIM with Wang's window, no padding"}
    print(f"{len(lq)} {'given' if args.lq else 'held-out'} images ({source}) of {size} px, K = "
          f"{', '.join(map(str, Ks))}, eta = {args.eta}, seed {args.seed}")
    if judges:
        print("\nJudges, which no reward contains (TFLOP: the operations of that run):")
        names = [name for name in BASIC | judges if name not in terms]
        print(table(all_rows, labels[0], names + ["identity", "rank1"] * args.identity,
                    facts["tflop"]))
    formula = " + ".join(f"{w:g} {name}" for name, w in reward.weights.items())
    print(f"\nThe reward {formula}, and its terms:")
    print(table(all_rows, labels[0], ["reward", *(f"r_{name}" for name in reward.weights)]))
    for label, x in zip(labels, images if gt is not None else ()):
        if (times := checkerboard(x) / max(checkerboard(gt), 1e-12)) > CHECKERBOARD:
            grey = 127.5 * checkerboard(x) ** 0.5
            print(f"{label}: a checkerboard of {grey:.2g} grey levels, which is {times:.0f} times "
                  "the ground truth's energy at the highest spatial frequency")
    columns |= {} if gt is None else {"ground truth": gt}
    comparison(columns).save(out / "comparison.png")
    print(f"{out}/comparison.png: {' | '.join(columns)}, and one detail")
    if args.frontier:
        facts |= place_on_frontier(rows, [*judges][-1], lambda K, eta: measure(
            restore(nets[0], lq, K, eta, args.seed), gt, reward, judges), Ks, args.eta, out)
    (out / "metrics.json").write_text(json.dumps(facts, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    """The flags of evaluate.py."""
    p = argparse.ArgumentParser(description="Compare checkpoints on held-out faces.")
    p.add_argument("--ckpt", type=not_empty, nargs="+", required=True, help="the baseline first")
    p.add_argument("--data", type=not_empty, help="folder of photos (default: as trained)")
    p.add_argument("--lq", type=not_empty, help="folder of LQ files; --data has their ground truth "
                   "by name, if it is given")
    p.add_argument("--images", type=not_empty, nargs="+", default=[], help="with --lq: folders, "
                   "each with another method's pictures of the same names, a row of the tables")
    p.add_argument("--n", type=positive, default=200, help="how many images at most (200)")
    p.add_argument("--frontier", action="store_true", help="also the first checkpoint at other K "
                   "and eta, and each row's distance from what those reach")
    p.add_argument("--best_of", type=positive, help="also the best by reward of n restorations by "
                   "the first checkpoint")
    p.add_argument("--identity", action="store_true", help="also the distance between the faces of "
                   "real people, by dlib, which is to be installed")
    p.add_argument("--judge_net", default="alex", choices=LPIPS_NETS, help="backbone of the LPIPS "
                   "that judges (alex)")
    p.add_argument("--judge_weights", type=not_empty, help="its file; left out: fetched")
    p.add_argument("--rewards", type=not_empty, help="name=weight,... or a set (default: that of "
                   "the first checkpoint trained on one)")
    p.add_argument("--ddim_steps", type=positive, help="K (default: each as it was trained)")
    p.add_argument("--eta", type=share, default=EVAL_ETA, help=f"DDIM noise ({EVAL_ETA})")
    p.add_argument("--seed", type=seed_number, default=0, help="of the sampler's noise (0)")
    p.add_argument("--out", type=not_empty, default="runs/evaluation", help="folder for metrics "
                   "and pictures, which are replaced (runs/evaluation)")
    add_flags(p, settings_fields(ModelSettings))
    return p


if __name__ == "__main__":
    run_main(lambda: compare(parser().parse_args()))
