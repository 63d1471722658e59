"""The score of the open assignment: how far a checkpoint lies beyond its SFT's frontier.

Steps    1. Draw new faces of a seed that no one trained on, and degrade them.
         2. Restore them with the shared SFT checkpoint at every (K, eta): its sampler's frontier.
         3. Restore them with the checkpoint, in the K it was trained for.
         4. The score is its distance beyond the frontier in LPIPS at equal PSNR, with the standard
            error over the faces (support/frontier.py).
`python -m tools.exercises score` runs it.
"""
import torch

from model import BATCH, EVAL_ETA, load_restorer, restore
from rewards import psnr
from support.checkpoint import pick_device
from support.cli import UserError
from support.data import Photos, pairs
from support.frontier import distances_beyond, sampler_points, verdict
from support.lpips_reward import LPIPS


def load(args, device):
    """The network of the checkpoint and that of the SFT checkpoint, and the K of each. Raises
    UserError if they are different networks."""
    (net, state), (sft, base) = (load_restorer(path, device, flag) for path, flag in
                                 ((args.ckpt, "score"), (args.sft, "--sft")))
    other = [name for name, value in vars(sft.config).items() if getattr(net.config, name) != value]
    if other:
        raise UserError(f"score {args.ckpt}: another network than that of --sft {args.sft}, in "
                        f"{', '.join(other)}; train one that starts from it")
    return net, state["args"]["ddim_steps"], sft, base["args"]["ddim_steps"]


@torch.no_grad()
def measure(x, gt, lpips) -> dict[str, torch.Tensor]:
    """PSNR and LPIPS of the restorations x (N, 3, H, W), for each image: name -> (N,)."""
    parts = list(zip(x.split(BATCH), gt.split(BATCH)))
    return {"psnr": torch.cat([psnr(a, b) for a, b in parts]).cpu(),
            "lpips": torch.cat([1 - lpips(a, b) for a, b in parts]).cpu()}


def score_checkpoint(args):
    """Print PSNR, LPIPS and the score. Raises UserError if LPIPS cannot be had."""
    device = pick_device(args.device)
    net, K, sft, base_K = load(args, device)
    lpips = LPIPS(args.lpips_net, args.lpips_weights).to(device)
    photos = Photos.drawn(args.n, args.seed, sft.config.size, "train")
    lq, gt = (u.to(device) for u in pairs(photos, range(args.n), args.seed, epoch=0))
    points = sampler_points(lambda K, eta: measure(restore(sft, lq, K, eta, args.seed), gt, lpips),
                            [base_K], EVAL_ETA)
    rows = {"sft": points[base_K, EVAL_ETA],
            "yours": measure(restore(net, lq, K, EVAL_ETA, args.seed), gt, lpips)}
    print(f"{args.n} drawn faces of seed {args.seed}, {sft.config.size} px, eta = {EVAL_ETA}")
    for label, row in rows.items():
        print(f"{label:6} PSNR {row['psnr'].mean():.2f} dB, LPIPS {row['lpips'].mean():.4f}")
    distance, error = distances_beyond({"yours": rows["yours"]}, points, "lpips")["yours"]
    print(verdict("yours", "lpips", distance, error))
    print(f"score: {distance:+.4f} ± {error:.4f}")
