"""Every flag of train.py, and the presets that fill in what the command line leaves open.

K = 50 and G = 9 are LRPO's code, `base`'s steps and rate of refl DiffusionReward's. The rest is
ours: `tiny` and `small` by measurement (docs/results.md), `base` by extrapolation, untried.
"""
import argparse

from data import UserError
from evaluate import amount, positive, share, whole
from rewards import OFFLINE

METHODS = ["lrpo", "refl", "darl"]      # what starts from an SFT restorer
REAL = "face=.2,lpips=.5,dwt=.2,ssim=.1"    # ours: LRPO's .3 each bought LPIPS with PSNR (64 px)


def rewarded(composite: str, direct: str) -> dict:
    """ReFL has its fidelity in L_struct; DARL wants a score without ground truth."""
    return dict(sft=composite, frm=composite, lrpo=composite, refl=direct, darl="face=1")


# A value is one for every mode, or one for each.
# gt_weight falls with the pixels: noise averages out in a mean, the likelihood's error does not.
PRESETS = {
    "tiny": dict(       # drawn faces, 32 px, two CPU cores, minutes
        size=32, channels=32, mults="1,2,4", patch=2, faces=4096,
        steps=dict(sft=4500, frm=200, lrpo=80, refl=240, darl=45),
        batch_size=dict(sft=16, frm=32, lrpo=32, refl=16, darl=32),
        lr=dict(sft=1e-3, frm=1e-3, lrpo=1e-4, refl=1e-4, darl=1e-4),
        every=dict(sft=500, frm=50, lrpo=20, refl=60, darl=15),
        ddim_steps=10, group=8, branch=4, gt_weight=2.7, bf16="off",
        rewards=rewarded(OFFLINE, "face=.1,ssim=.4")),
    "small": dict(      # 64 px, a folder of faces, one GPU, minutes
        size=64, channels=64, mults="1,2,4", patch=2, faces=20_000,
        steps=dict(sft=20_000, frm=200, lrpo=125, refl=100, darl=60),
        batch_size=dict(sft=64, frm=32, lrpo=16, refl=16, darl=16),
        lr=dict(sft=1e-3, frm=1e-3, lrpo=5e-5, refl=5e-5, darl=5e-5),
        every=dict(sft=1000, frm=100, lrpo=25, refl=50, darl=20),
        ddim_steps=10, group=8, branch=4, gt_weight=0.8, bf16="on",
        rewards=rewarded(REAL, "face=.1,lpips=.5")),
    "base": dict(       # 128 px, the paper's K and G, one GPU, hours
        size=128, channels=96, mults="1,2,3,4", patch=1, faces=50_000,
        steps=dict(sft=200_000, frm=2000, lrpo=1000, refl=3500, darl=1000),
        batch_size=dict(sft=32, frm=32, lrpo=4, refl=4, darl=4),
        lr=dict(sft=3e-4, frm=1e-3, lrpo=3e-5, refl=5e-5, darl=3e-5),
        every=dict(sft=5000, frm=500, lrpo=50, refl=500, darl=50),
        ddim_steps=50, group=9, branch=0, gt_weight=0.08, bf16="on",
        rewards=rewarded(REAL, "face=.1,lpips=.5")),
}
# Ours. A policy gradient is noisy: the average over some 50 rollouts is what improves.
EMA_DECAY = dict(sft=0.999, frm=0.99, lrpo=0.98, refl=0.99, darl=0.98)
WARMUP = dict(sft=100, frm=20, lrpo=2, refl=10, darl=2)     # steps of linear warm-up (ours)

# Flags that only some modes read; refused in others, and not compared when a run goes on.
OWN = {("demo",): {"methods"},
       ("frm",): {"labels"},
       ("lrpo", "darl"): {"group", "branch", "updates", "clip", "adv_std", "noise_level_weights"},
       ("lrpo",): {"pg_weight", "gt_weight", "gt_target", "gt_last"},
       ("darl",): {"blend", "sft_weight", "kl_weight", "stepwise"},
       ("refl",): {"refl_last", "struct_weight", "reg_weight", "reg", "denoise_weight",
                   "frm_update_every", "frm_lr"}}


def resolve(args) -> argparse.Namespace:
    """A copy in which what the command line left open is filled from the preset."""
    args = argparse.Namespace(**vars(args))
    if args.mode == "darl" and args.clip_weights:
        args.rewards = args.rewards or "clipiqa=1"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value[args.mode] if isinstance(value, dict) else value)
    args.out = args.out or f"runs/{args.mode}"
    return args


def blend(text: str) -> str:
    """An argparse type: adaptive, hard, easy or a number from 0 to 1."""
    if text not in ("adaptive", "hard", "easy"):
        share(text)
    return text


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description="Train a face restorer, then improve it by rewards.")
    flag = p.add_argument
    flag("--mode", required=True, choices=["sft", "frm", *METHODS, "demo"])
    flag("--preset", default="tiny", choices=list(PRESETS), help="a set of defaults (tiny)")
    flag("--methods", nargs="+", default=["lrpo"], choices=[*METHODS, "all"],
         help="what demo compares (lrpo)")
    flag("--data", help="folder of face photos (default: drawn faces)")
    flag("--faces", type=positive, help="how many drawn faces to train on")
    flag("--out", help="run folder (default runs/MODE; for demo the folder of all of them, runs)")
    flag("--init", help="restorer to start from (default: sft/last.pt beside --out; sft: none)")
    flag("--resume", action="store_true", help="go on with the run in --out, exactly")
    flag("--overwrite", action="store_true", help="start anew where --out holds a run")
    flag("--steps", type=positive, help="calls of the method's step, in all")
    flag("--minutes", type=amount, help="stop after this much training time of this call (demo: of "
         "each stage)")
    flag("--every", type=positive, help="steps between measurements, with checkpoints")
    flag("--batch_size", type=positive, help="images a step; for lrpo and darl, groups")
    flag("--lr", type=amount, help="learning rate")
    flag("--seed", type=whole, default=0)
    flag("--device", default="auto", help="auto, cpu, cuda")
    flag("--bf16", choices=["on", "off"], help="network in bfloat16; likelihoods stay in float32")
    flag("--size", type=positive, help="side of the images in pixels")
    flag("--channels", type=positive, help="width of the first level")
    flag("--mults", help="width of each level, as multiples: 1,2,4")
    flag("--patch", type=positive, help="pixel-unshuffle before the network: 1 is none")
    flag("--rewards", help="name=weight,..., or a set: paper, paper-alt, card, offline")
    flag("--lpips_net", default="squeeze", choices=["squeeze", "alex", "vgg"])
    flag("--lpips_weights", help="file of the LPIPS backbone (default: fetched)")
    flag("--clip_weights", help="file of CLIP RN50 (default: fetched)")
    flag("--frm_weights", help="face reward model (default: frm/last.pt beside --out); frm starts "
         "from it")
    flag("--labels", default="known", help="what frm learns from: known (pairs of known order), "
         "svm (also pairs that an SVM labels), or a CSV of a person's labels, which teach the SVM")
    flag("--ddim_steps", type=positive, help="K, sampling steps")
    flag("--eta", type=share, default=1.0, help="DDIM noise of the rollouts (refl draws its own)")
    flag("--group", type=positive, help="G, restorations of one image")
    flag("--branch", type=whole, help="a group parts at one of the last n steps (0: at each)")
    flag("--updates", type=positive, default=2, help="optimiser steps on a rollout")
    flag("--clip", type=amount, help="of the ratio (default 1.64 / D)")
    flag("--adv_std", default="group", choices=["group", "batch"], help="spread in the advantage")
    flag("--noise_level_weights", default="on", choices=["on", "off"], help="LRPO strategy 3")
    flag("--pg_weight", type=amount, default=1.0, help="weight of the policy gradient")
    flag("--gt_weight", type=amount, help="weight of LRPO strategy 2 (0: off)")
    flag("--gt_target", default="posterior", choices=["marginal", "posterior"])
    flag("--gt_last", type=whole, default=0, help="strategy 2 on the last n trained steps (0: all)")
    flag("--refl_last", type=positive, default=2, help="the step with gradient: of the last n")
    flag("--struct_weight", type=amount, default=15.0, help="refl: low-pass L1 to the ground truth")
    flag("--reg_weight", type=amount, default=0.01, help="refl: distance from the frozen network")
    flag("--reg", default="features", choices=["features", "weights"], help="... measured in")
    flag("--denoise_weight", type=amount, default=20.0, help="refl: the supervised loss")
    flag("--frm_update_every", type=whole, default=10, help="refl: steps (0: freeze it)")
    flag("--frm_lr", type=amount, default=1e-4, help="refl: learning rate of its reward model")
    flag("--blend", type=blend, default="adaptive", help="darl: share of RL in an image's loss: "
         "adaptive, hard (above the mean difficulty only), easy, or a number from 0 to 1")
    flag("--sft_weight", type=amount, default=0.2, help="darl: weight of the supervised loss")
    flag("--kl_weight", type=amount, default=0.0, help="darl: KL from the policy it started as")
    flag("--stepwise", default="off", choices=["on", "off"], help="darl: credit each step with "
         "what is gained after it (needs --branch 0)")
    return p


def check_flags(given):
    """Refuse a flag that would have no effect: nobody would notice."""
    methods = METHODS if "all" in given.methods else given.methods
    modes = {given.mode, *(methods if given.mode == "demo" else ())}
    modes |= {"frm"} if modes != {"sft"} else set()     # a method trains frm where there is none
    for useless, why in (
            (given.mode == "demo" and given.init, "--init: demo trains its own sft; leave it out"),
            (given.data and given.faces, "--faces: --data has the photos; leave one of them out"),
            (given.resume and given.overwrite, "--resume, --overwrite: give one, not both")):
        if useless:
            raise UserError(why)
    for readers, names in OWN.items():
        for name in names if modes.isdisjoint(readers) else ():
            if getattr(given, name) != parser().get_default(name):
                raise UserError(f"--{name}: --mode {given.mode} does not read it, only "
                                f"{' and '.join(readers)}; leave it out")
