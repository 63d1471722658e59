"""The flags of train.py, and the presets that fill in what the command line leaves open.

A flag (but for --mode, --methods and --recipe) is a field of a settings dataclass, with default,
published value and meaning: `RunSettings` here for every mode, and the method's own in sft.py,
frm.py, lrpo.py, steered.py, refl.py or darl.py. So a mode has no flag of another mode. A value
comes from, in this order: the command line, `--recipe paper`, the preset, the default.
"""
import argparse
from dataclasses import dataclass

from darl import DARLSettings
from frm import FRMSettings
from lrpo import LRPOSettings
from refl import ReFLSettings
from rewards import SETS
from sft import SFTSettings
from steered import SteeredSettings
from support.cli import (ModelSettings, UserError, add_flags, multiples, seed_number, setting,
                         settings_fields, whole)

METHODS = ["lrpo", "refl", "darl"]      # they start from the restorer of mode sft
MODES = ["sft", "frm", *METHODS, "demo"]

# Ours. docs/results.md says what was measured: `tiny`, and `small` with 32 channels. `base` has the
# paper's K and G and DiffusionReward's steps and learning rate; it was never run.
PRESETS = {
    "tiny": dict(       # drawn faces, 32 px, two CPU cores, minutes
        size=32, channels=32, mults="1,2,4", patch=2, faces=4096, ddim_steps=5, bf16="off",
        rewards="default",
        sft=dict(steps=4500, batch_size=16, lr=1e-3, every=500),
        frm=dict(steps=200, batch_size=32, lr=1e-3, every=50),
        lrpo=dict(steps=80, batch_size=32, lr=3e-4, every=20),
        refl=dict(steps=240, batch_size=16, lr=1e-4, every=60, rewards="face=.1,ssim=.4"),
        darl=dict(steps=45, batch_size=32, lr=1e-4, every=15, rewards="face=1")),
    "small": dict(      # 64 px, a folder of faces, one GPU, minutes
        size=64, channels=64, mults="1,2,4", patch=2, faces=20_000, ddim_steps=5, bf16="on",
        rewards="default",
        sft=dict(steps=20_000, batch_size=64, lr=1e-3, every=1000),
        frm=dict(steps=200, batch_size=32, lr=1e-3, every=100),
        lrpo=dict(steps=80, batch_size=16, lr=2e-4, every=20),
        refl=dict(steps=100, batch_size=16, lr=5e-5, every=50, rewards="face=.1,lpips=.5"),
        darl=dict(steps=60, batch_size=16, lr=1e-4, every=20, rewards="face=1")),
    "base": dict(       # 128 px, the paper's K and G, one GPU, hours
        size=128, channels=96, mults="1,2,3,4", patch=1, faces=50_000, ddim_steps=50, bf16="on",
        rewards="default", group=9, branch="off",
        sft=dict(steps=200_000, batch_size=32, lr=3e-4, every=5000),
        frm=dict(steps=2000, batch_size=32, lr=1e-3, every=500),
        lrpo=dict(steps=1000, batch_size=4, lr=3e-5, every=50),
        refl=dict(steps=3500, batch_size=4, lr=5e-5, every=500, rewards="face=.1,lpips=.5"),
        darl=dict(steps=1000, batch_size=4, lr=3e-5, every=50, rewards="face=1")),
}
# Ours. A policy gradient is noisy: the average of the weights over some 20 rollouts improves.
EMA_DECAY = dict(sft=0.999, frm=0.99, lrpo=0.95, refl=0.99, darl=0.95)
WARMUP = dict(sft=100, frm=20, lrpo=2, refl=10, darl=2)     # steps of linear warm-up (ours)

PAPER_RECIPE = dict(rewards="paper", lpips_net="vgg", bf16="off")   # beside LRPOSettings' values


@dataclass
class RunSettings(ModelSettings):
    """The flags of every mode. A preset replaces None in most of them."""
    preset: str = setting("tiny", None, "a set of defaults", choices=list(PRESETS))
    data: str = setting(None, None, "folder of face photos; left out: drawn faces")
    faces: int = setting(None, None, "how many drawn faces to train on")
    out: str = setting(None, None, "run folder; left out: runs/MODE, for demo runs")
    init: str = setting(None, None, "restorer to start from; left out: sft/last.pt beside --out")
    resume: bool = setting(False, None, "go on with the run in --out, exactly")
    overwrite: bool = setting(False, None, "start anew where --out holds a run")
    steps: int = setting(None, None, "calls of the method's step, in all")
    minutes: float = setting(None, None, "stop after so much training time of this call")
    every: int = setting(None, None, "steps between measurements, with checkpoints")
    batch_size: int = setting(None, None, "images in a step; for lrpo and darl, groups")
    seed: int = setting(0, None, "of everything that is random", type=seed_number)
    ddim_steps: int = setting(None, None, "K, sampling steps")
    rewards: str = setting(None, None, f"name=weight,..., or a set: {', '.join(SETS)}")
    workers: int = setting(0, None, "processes that make the batches; 0: this one", type=whole)
    compile: bool = setting(False, None, "compile the network: faster on a GPU; not for refl")
    bf16: str = setting(None, None, "network in bfloat16; likelihoods stay in float32",
                        choices=["on", "off"])
    size: int = setting(None, None, "side of the images in pixels")
    channels: int = setting(None, None, "width of the first level of the network")
    mults: str = setting(None, None, "width of each level, as multiples: 1,2,4", type=multiples)
    patch: int = setting(None, None, "pixel-unshuffle before the network: 1 is none")


def method_settings(mode: str, recipe: str = "steered"):
    """The settings dataclass of a mode's method."""
    if mode == "lrpo" and recipe == "paper":
        return LRPOSettings
    return dict(sft=SFTSettings, frm=FRMSettings, lrpo=SteeredSettings, refl=ReFLSettings,
                darl=DARLSettings)[mode]


def parser(mode: str, recipe: str = "steered") -> argparse.ArgumentParser:
    """The flags of one mode. The parsed result holds only those on the command line."""
    p = argparse.ArgumentParser(
        prog="train.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Train a face restorer, then improve it by rewards. `train.py --mode MODE "
        "--help` lists the flags of a mode.", usage="train.py --mode MODE [flags]")
    p.add_argument("--mode", required=True, choices=MODES)
    known = settings_fields(RunSettings)
    if mode == "demo":
        p.add_argument("--methods", nargs="+", choices=[*METHODS, "all"],
                       help="what demo compares; default: lrpo")
    elif mode:
        known |= settings_fields(method_settings(mode, recipe))
    if mode == "lrpo":
        p.add_argument("--recipe", choices=["steered", "paper"], help="paper: the published method "
                       "at its published settings; steered: ours (steered.py); default: steered")
    by_preset = {*PRESETS["base"], *PRESETS["base"]["sft"]}     # base has every key
    add_flags(p, known, by_preset, only_given=True)
    return p


def parse(argv=None) -> dict:
    """What the command line says, {flag: value}. Raises UserError for a flag that the mode does not
    have, and for flags that contradict each other."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--mode")
    first.add_argument("--recipe", default="steered")
    choice, _ = first.parse_known_args(argv)
    p = parser(choice.mode if choice.mode in MODES else None, choice.recipe)
    given, unknown = p.parse_known_args(argv)
    given = vars(given)
    if unknown:
        mode = choice.mode + (" --recipe paper" if choice.recipe == "paper" else "")
        raise UserError(f"{unknown[0]}: --mode {mode} has no such flag; train.py --mode {mode} "
                        "--help lists those that it has")
    if choice.mode == "demo" and "init" in given:
        raise UserError("--init: demo trains its own sft; leave it out")
    if "data" in given and "faces" in given:
        raise UserError("--faces: --data has the photos; leave one of them out")
    if "compile" in given and choice.mode == "refl":
        raise UserError("--compile: a compiled network hides what refl reads; leave it out")
    if "resume" in given and "overwrite" in given:
        raise UserError("--resume, --overwrite: give only one of them")
    if "fidelity_margin" in given and given.get("gt_weight", "auto") != "auto":
        raise UserError("--fidelity_margin: a fixed --gt_weight is not steered; leave one out")
    return given


def resolve(mode: str, given: dict, **changes) -> argparse.Namespace:
    """Every setting of a run: `changes`, then what the command line gave, then the rest in the
    order at the head of this file."""
    given = {"recipe": "steered"} | given | {"mode": mode} | changes
    own = settings_fields(method_settings(mode, given["recipe"]))
    known = settings_fields(RunSettings) | own
    preset = PRESETS[given.get("preset", RunSettings.preset)]
    values = {name: f.default for name, f in known.items()} | preset | preset[mode]
    if mode == "lrpo" and given["recipe"] == "paper":
        values |= {name: f.metadata["paper"] for name, f in own.items()} | PAPER_RECIPE
    values |= given
    values["out"] = values["out"] or f"runs/{mode}"
    return argparse.Namespace(**{name: values[name] for name in ["mode", *known]
                                 + ["recipe"] * (mode == "lrpo")})


def method_values(run):
    """The method's settings dataclass, filled from a resolved run."""
    own = method_settings(run.mode, getattr(run, "recipe", "steered"))
    return own(**{name: getattr(run, name) for name in settings_fields(own)})
