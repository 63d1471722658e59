"""Every flag of train.py, and the presets that fill in what the command line leaves open.

A setting of lrpo or darl stands in its dataclass (lrpo.py, steered.py, darl.py) with default,
published value and meaning; its flag is made from that. What a run uses is, in this order: the
command line, `--recipe paper`, the preset, the default. `tiny` and `small` were chosen by
measurement (docs/results.md). `base` has the paper's K and G and DiffusionReward's steps and rate;
the rest of it is extrapolated, and it has not been run.
"""
import argparse
from dataclasses import fields

from darl import DARLSettings
from data import UserError
from evaluate import amount, positive, share, whole
from lrpo import LRPOSettings
from rewards import SETS
from steered import SteeredSettings

METHODS = ["lrpo", "refl", "darl"]      # what starts from an SFT restorer


def rewarded(composite: str, direct: str) -> dict:
    """ReFL has its fidelity in L_struct; DARL wants a score without ground truth."""
    return dict(sft=composite, frm=composite, lrpo=composite, refl=direct, darl="face=1")


# A value is one for every mode, or one for each.
PRESETS = {
    "tiny": dict(       # drawn faces, 32 px, two CPU cores, minutes
        size=32, channels=32, mults="1,2,4", patch=2, faces=4096,
        steps=dict(sft=4500, frm=200, lrpo=80, refl=240, darl=45),
        batch_size=dict(sft=16, frm=32, lrpo=32, refl=16, darl=32),
        lr=dict(sft=1e-3, frm=1e-3, lrpo=3e-4, refl=1e-4, darl=1e-4),
        every=dict(sft=500, frm=50, lrpo=20, refl=60, darl=15),
        ddim_steps=5, bf16="off", rewards=rewarded("default", "face=.1,ssim=.4")),
    "small": dict(      # 64 px, a folder of faces, one GPU, minutes
        size=64, channels=64, mults="1,2,4", patch=2, faces=20_000,
        steps=dict(sft=20_000, frm=200, lrpo=80, refl=100, darl=60),
        batch_size=dict(sft=64, frm=32, lrpo=16, refl=16, darl=16),
        lr=dict(sft=1e-3, frm=1e-3, lrpo=2e-4, refl=5e-5, darl=1e-4),
        every=dict(sft=1000, frm=100, lrpo=20, refl=50, darl=20),
        ddim_steps=5, bf16="on", rewards=rewarded("default", "face=.1,lpips=.5")),
    "base": dict(       # 128 px, the paper's K and G, one GPU, hours
        size=128, channels=96, mults="1,2,3,4", patch=1, faces=50_000,
        steps=dict(sft=200_000, frm=2000, lrpo=1000, refl=3500, darl=1000),
        batch_size=dict(sft=32, frm=32, lrpo=4, refl=4, darl=4),
        lr=dict(sft=3e-4, frm=1e-3, lrpo=3e-5, refl=5e-5, darl=3e-5),
        every=dict(sft=5000, frm=500, lrpo=50, refl=500, darl=50),
        ddim_steps=50, group=9, branch="off", bf16="on",
        rewards=rewarded("default", "face=.1,lpips=.5")),
}
# Ours. A policy gradient is noisy: the average over some 20 rollouts is what improves.
EMA_DECAY = dict(sft=0.999, frm=0.99, lrpo=0.95, refl=0.99, darl=0.95)
WARMUP = dict(sft=100, frm=20, lrpo=2, refl=10, darl=2)     # steps of linear warm-up (ours)

PAPER_RECIPE = dict(rewards="paper", lpips_net="vgg", bf16="off")   # beside LRPOSettings' values


def settings_of(mode: str, recipe: str = "steered"):
    """The settings dataclass of lrpo or darl."""
    if mode == "darl":
        return DARLSettings
    return LRPOSettings if recipe == "paper" else SteeredSettings


def flags_of(dataclass) -> dict:
    """The fields of a settings dataclass that have a flag, by name."""
    return {f.name: f for f in fields(dataclass) if f.init}


# Flags that only some modes read; refused in others, and not compared when a run goes on.
SHARED = {"lr", "ddim_steps"}       # settings of lrpo and darl whose flag every mode reads
OWN = {"demo": {"methods"},
       "frm": {"labels", "eta"},
       "lrpo": {"recipe", *flags_of(SteeredSettings)} - SHARED,
       "darl": {*flags_of(DARLSettings)} - SHARED,
       "refl": {"refl_last", "struct_weight", "reg_weight", "reg", "denoise_weight",
                "frm_update_every", "frm_lr"}}


def foreign_flags(modes: set) -> dict[str, list[str]]:
    """Flags that none of these modes reads, and the modes that do."""
    own = set().union(*(OWN.get(mode, set()) for mode in modes))
    return {name: [mode for mode in OWN if name in OWN[mode]]
            for name in sorted(set().union(*OWN.values()) - own)}


def resolve(args) -> argparse.Namespace:
    """A copy in which what the command line left open is filled in."""
    args = argparse.Namespace(**vars(args))
    if args.mode == "darl" and args.clip_weights:
        args.rewards = args.rewards or "clipiqa=1"
    preset = {name: value[args.mode] if isinstance(value, dict) else value
              for name, value in PRESETS[args.preset].items()}
    own = flags_of(settings_of(args.mode, args.recipe))
    filled = {name: f.default for name, f in own.items()} | {"lpips_net": "squeeze"} | preset
    if args.mode == "lrpo" and args.recipe == "paper":
        filled |= {name: f.metadata["paper"] for name, f in own.items()} | PAPER_RECIPE
    for name, value in filled.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or f"runs/{args.mode}"
    return args


def blend(text: str) -> str:
    """An argparse type: adaptive, hard, easy or a number from 0 to 1."""
    if text not in ("adaptive", "hard", "easy"):
        share(text)
    return text


def auto_weight(text: str):
    """An argparse type: auto, or a number of 0 or more."""
    if text == "auto":
        return text
    try:
        return amount(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor auto") from None


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
    flag("--seed", type=whole, default=0)
    flag("--device", default="auto", help="auto, cpu, cuda")
    flag("--bf16", choices=["on", "off"], help="network in bfloat16; likelihoods stay in float32")
    flag("--size", type=positive, help="side of the images in pixels")
    flag("--channels", type=positive, help="width of the first level")
    flag("--mults", help="width of each level, as multiples: 1,2,4")
    flag("--patch", type=positive, help="pixel-unshuffle before the network: 1 is none")
    flag("--rewards", help=f"name=weight,..., or a set: {', '.join(SETS)}")
    flag("--lpips_net", choices=["squeeze", "alex", "vgg"], help="backbone of LPIPS (squeeze)")
    flag("--lpips_weights", help="file of the LPIPS backbone (default: fetched)")
    flag("--clip_weights", help="file of CLIP RN50 (default: fetched)")
    flag("--frm_weights", help="face reward model (default: frm/last.pt beside --out); frm starts "
         "from it")
    flag("--labels", default="known", help="what frm learns from: known (pairs of known order), "
         "svm (also pairs that an SVM labels), or a CSV of a person's labels, which teach the SVM")
    flag("--recipe", default="steered", choices=["steered", "paper"], help="of lrpo: paper is the "
         "published method at its published settings, steered is ours (steered.py)")
    for name, f in (flags_of(DARLSettings) | flags_of(SteeredSettings)).items():
        default = "by preset" if any(name in preset for preset in PRESETS.values()) else f.default
        known = {"default": default, "paper": f.metadata["paper"]}
        flag(f"--{name}", type=TYPES.get(name, TYPES[f.type]), choices=f.metadata.get("choices"),
             help="; ".join([f.metadata["meaning"], *(f"{k}: {v}" for k, v in known.items()
                                                      if v is not None)]))
    flag("--refl_last", type=positive, default=2, help="the step with gradient: of the last n")
    flag("--struct_weight", type=amount, default=15.0, help="refl: low-pass L1 to the ground truth")
    flag("--reg_weight", type=amount, default=0.01, help="refl: distance from the frozen network")
    flag("--reg", default="features", choices=["features", "weights"], help="... measured in")
    flag("--denoise_weight", type=amount, default=20.0, help="refl: the supervised loss")
    flag("--frm_update_every", type=whole, default=10, help="refl: steps (0: freeze it)")
    flag("--frm_lr", type=amount, default=1e-4, help="refl: learning rate of its reward model")
    return p


# argparse types of the settings' flags, by name and else by the type of the field.
TYPES = {int: positive, float: amount, str: str, "eta": share, "gt_last": whole, "blend": blend,
         "steps_per_update": whole, "gt_weight": auto_weight}


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
    for name, modes in foreign_flags(modes).items():
        if getattr(given, name) != parser().get_default(name):
            raise UserError(f"--{name}: --mode {given.mode} does not read it, only "
                            f"{' and '.join(modes)}; leave it out")
    if given.recipe == "paper":
        if given.gt_weight == "auto":
            raise UserError("--gt_weight auto: --recipe paper does not steer; give a number")
        unread = flags_of(SteeredSettings).keys() - flags_of(LRPOSettings).keys()
        unread -= flags_of(DARLSettings).keys() if "darl" in methods else set()
        for name in sorted(unread):
            if getattr(given, name) is not None:
                raise UserError(f"--{name}: --recipe paper does not read it; leave one of them out")
    if given.fidelity_margin is not None and given.gt_weight not in (None, "auto"):
        raise UserError("--fidelity_margin: a fixed --gt_weight is not steered; leave one of them "
                        "out")
