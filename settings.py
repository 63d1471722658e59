"""The registry of the methods, their flags and presets; and from settings to objects.

A method is a class with `net`, `optimizer` and step(batch) -> metrics (and state_dict and
load_state_dict, if it has a state of its own), and one entry in `METHODS`. From the entry come its
flags, its place in demo, the start from sft, the warm-up and the average of its weights.

A flag is a field of a settings dataclass, with default, published value and meaning: `RunSettings`
here for every mode, `RewardFiles` for those that are rewarded, and the method's own in its file. So
a mode takes only flags that it uses. `value_sources` has the order in which a value is looked up.
"""
import argparse
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from darl import DARL, DARLSettings
from evaluate import held_out, measure
from frm import (FaceRewardModel, FaceRewardTraining, FRMSettings, load_face_reward, metric_vector,
                 unknown_pairs)
from lrpo import LRPO, LRPOSettings
from model import EVAL_ETA, Config, Diffusion, UNet, load_restorer, restore
from refl import ReFL, ReFLSettings
from rewards import load_reward, parse_rewards
from sft import SFT, SFTSettings
from support.checkpoint import check_finished, digest, has_bfloat16, load_tensors
from support.cli import (RewardFiles, UserError, add_flags, one_of, seed_number, setting,
                         settings_fields, whole)
from support.data import sheet, train_batch
from support.labels import label_pairs

DEMO = ["lrpo", "refl"]     # the methods that a demo compares
SHIPPED = Path(__file__).parent / "pretrained" / "faces64.pt"   # drawn faces, from mode sft
VALIDATION = 64         # ours: held-out images measured during training
RESTORED_PAIRS = 512    # ours: restorations that the face reward model learns from
WITHOUT_FRM = "ssim=.5,dwt=.5"      # the reward that chooses best.pt where a mode has none


@dataclass
class Method:
    """One entry of the registry. The defaults of `settings` are the preset tiny; `presets` has what
    the others change."""
    make: type                      # make(net, diffusion, reward, generator, settings)
    settings: type                  # a dataclass of `setting` fields
    ema: float                      # decay of the average of the weights (ours)
    warmup: int                     # steps of linear warm-up of the learning rate (ours)
    presets: dict = field(default_factory=dict)     # {preset: {flag: value}}
    from_sft: bool = True           # starts from the restorer of mode sft
    recipes: tuple = ()             # values of --recipe, ours first, if there are published values

    @property
    def rewarded(self) -> bool:
        """Whether it is trained on a reward."""
        return "rewards" in settings_fields(self.settings)


# A policy gradient is noisy: the average of the weights over some 20 rollouts is better.
METHODS = {
    "sft": Method(SFT, SFTSettings, ema=0.999, warmup=100, from_sft=False, presets={
        "small": dict(steps=20_000, batch_size=64, every=1000),
        "base": dict(steps=200_000, batch_size=32, lr=3e-4, every=5000)}),
    "frm": Method(FaceRewardTraining, FRMSettings, ema=0.99, warmup=20, presets={
        "drawn64": dict(batch_size=16),
        "small": dict(every=100),
        "base": dict(steps=2000, every=500)}),
    "lrpo": Method(LRPO, LRPOSettings, ema=0.95, warmup=2, recipes=("ours", "paper"), presets={
        "drawn64": dict(steps=60, batch_size=16, lr=2e-4, credit=8),
        "small": dict(batch_size=16, lr=2e-4, credit=8),
        "base": dict(steps=1000, batch_size=4, lr=3e-5, every=50, group=9, own_steps=0)}),
    "refl": Method(ReFL, ReFLSettings, ema=0.95, warmup=4, recipes=("ours", "paper"), presets={
        "drawn64": dict(steps=140, lr=3e-4),
        "small": dict(steps=180, lr=3e-4),
        "base": dict(steps=3500, batch_size=4, lr=5e-5, every=500)}),
    "darl": Method(DARL, DARLSettings, ema=0.95, warmup=2, presets={
        "small": dict(steps=60, batch_size=16, every=20),
        "base": dict(steps=1000, batch_size=4, lr=3e-5, every=50, group=9, own_steps=0)}),
}
# Ours: what presets change for every mode. `base` has LRPO's K and G, and DiffusionReward's steps.
PRESETS = {
    "tiny": {},         # drawn faces, 32 px, two CPU cores, minutes: the defaults
    "drawn64": dict(size=64, bf16="on"),             # drawn faces, 64 px: from pretrained/
    "small": dict(size=64, channels=64, faces=20_000, bf16="on"),   # one GPU, minutes
    "base": dict(size=128, channels=96, mults="1,2,3,4", patch=1, faces=50_000, ddim_steps=50,
                 bf16="on"),                                        # one GPU, hours; never run
}


@dataclass
class RunSettings:
    """The flags of every mode."""
    preset: str = setting("tiny", None, "a set of defaults", choices=list(PRESETS))
    data: str = setting(None, None, "folder of face photos; left out: drawn faces")
    faces: int = setting(4096, None, "how many drawn faces to train on")
    out: str = setting(None, None, "run folder; left out: runs/MODE, for demo runs")
    init: str = setting(None, None, "restorer to start from; left out: sft/last.pt beside --out, "
                        "and for sft a new one")
    resume: bool = setting(False, None, "go on with the run in --out, exactly")
    overwrite: bool = setting(False, None, "start anew where --out holds a run")
    tflop: float = setting(None, None, "stop after so many operations of training, in 1e12; "
                           "metrics.csv counts them")
    seed: int = setting(0, None, "of everything that is random", type=seed_number)
    ddim_steps: int = setting(5, None, "K, sampling steps")
    workers: str | int = setting("auto", None, "processes that make the batches; auto: every core "
                                 "beside a GPU, else 0", type=one_of("auto", otherwise=whole))
    compile: bool = setting(False, None, "compile the network: faster on a GPU; not for refl")
    bf16: str = setting("off", "off", "network in bfloat16; likelihoods stay in float32",
                        choices=["on", "off"])
    device: str = setting("auto", None, "auto, cpu or cuda")


def fields_of(mode: str) -> dict:
    """The fields of every flag of a mode, by name; for demo those of all modes that it runs."""
    if mode == "demo":
        return {name: f for m in METHODS for name, f in fields_of(m).items()}
    method = METHODS[mode]
    kinds = [RunSettings, *[RewardFiles] * method.rewarded]
    return {name: f for kind in (*kinds, method.settings)
            for name, f in settings_fields(kind).items()}


# ---------------------------------------------------------------------------------------------
# From the command line to the settings of a run

def parser(mode: str) -> argparse.ArgumentParser:
    """The flags of one mode. The parsed result holds only those on the command line."""
    p = argparse.ArgumentParser(
        prog="train.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Train a face restorer, then improve it by rewards. `train.py --mode MODE "
        "--help` lists the flags of a mode.", usage="train.py --mode MODE [flags]")
    p.add_argument("--mode", required=True, choices=[*METHODS, "demo"])
    if mode == "demo":
        rewarded = [name for name, method in METHODS.items() if method.rewarded]
        p.add_argument("--methods", nargs="+", choices=rewarded,
                       help=f"what demo compares; default: {' '.join(DEMO)}")
        p.add_argument("--judge_weights", help="as for evaluate.py")
    recipes = METHODS[mode].recipes if mode in METHODS else ()
    if recipes:
        p.add_argument("--recipe", choices=recipes, help="ours, or the published values of all "
                       f"flags that have one; default: {recipes[0]}")
    if mode:
        by_preset = {name for preset in PRESETS for source in (PRESETS[preset], *(
            m.presets.get(preset, {}) for m in METHODS.values())) for name in source}
        add_flags(p, fields_of(mode), by_preset, published=bool(recipes), only_given=True)
    return p


def parse(argv=None) -> dict:
    """What the command line says, {flag: value}. Raises UserError for a flag that the mode does not
    have, and for flags that contradict each other."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--mode")
    mode = first.parse_known_args(argv)[0].mode
    p = parser(mode if mode in (*METHODS, "demo") else None)
    given, unknown = p.parse_known_args(argv)
    given = vars(given)
    if unknown:
        raise UserError(f"{unknown[0]}: --mode {mode} has no such flag; train.py --mode {mode} "
                        "--help lists those that it has")
    if "data" in given and "faces" in given:
        raise UserError("--faces: --data has the photos; leave one of them out")
    if "compile" in given and "refl" in (mode, *given.get("methods", DEMO * (mode == "demo"))):
        raise UserError("--compile: a compiled network hides what refl reads; leave it out")
    if "fidelity_margin" in given and given.get("gt_weight", "auto") != "auto":
        raise UserError("--fidelity_margin: a fixed --gt_weight is not steered; leave one out")
    network_flags = given.keys() & {"size", "channels", "mults", "patch"}
    if network_flags and ("init" in given or mode == "demo"):
        raise UserError(f"--{min(network_flags)}: --init has a network already; leave one out")
    if "resume" in given and "overwrite" in given:
        raise UserError("--resume, --overwrite: give only one of them")
    return given


def value_sources(mode: str, given: dict) -> list[dict]:
    """Where a setting's value is looked up, in this order: the command line, --recipe paper, the
    preset's part for the mode, the preset, the default."""
    known, preset = fields_of(mode), given.get("preset", RunSettings.preset)
    published = {name: f.metadata["paper"] for name, f in known.items()
                 if f.metadata["paper"] is not None}
    return [given, published if given.get("recipe") == "paper" else {},
            METHODS[mode].presets.get(preset, {}), PRESETS[preset],
            {name: f.default for name, f in known.items()}, {"out": f"runs/{mode}"}]


def resolve(mode: str, given: dict, **changes) -> argparse.Namespace:
    """Every setting of a run of `mode`: `changes`, then the `value_sources`."""
    run, sources = argparse.Namespace(mode=mode), value_sources(mode, given | changes)
    for name in [*fields_of(mode), *["recipe"] * bool(METHODS[mode].recipes)]:
        values = [source[name] for source in sources if source.get(name) is not None]
        setattr(run, name, values[0] if values else None)
    return run


def method_values(run):
    """The method's settings dataclass, filled from a run. Raises UserError as that does."""
    own = METHODS[run.mode].settings
    return own(**{name: getattr(run, name) for name in settings_fields(own)})


# ---------------------------------------------------------------------------------------------
# From the settings of a run to its objects

def network(run, device) -> UNet:
    """A new network for sft without --init, otherwise the restorer that the run starts from, whose
    configuration becomes the run's. Raises UserError if there is none, or if it was trained on
    other pictures."""
    if not (METHODS[run.mode].from_sft or run.init):
        net = UNet(Config(run.size, run.channels, [int(m) for m in run.mults.split(",")],
                          patch=run.patch))
    else:
        init = run.init or Path(run.out).parent / "sft" / "last.pt"
        if not run.init and not init.exists():
            raise UserError(f"--mode {run.mode} starts from {init}, not there yet: run --mode sft "
                            "first, or give --init CKPT")
        net, state = load_restorer(init, device, "--init")
        check_finished(state, init, "--init")
        if state["args"]["data"] and not run.data:
            raise UserError(f"--init {init}: trained on {state['args']['data']}; give its --data")
        if run.data and not state["args"]["data"]:
            print(f"--init {init}: trained on drawn faces, not on {run.data}")
        net.train().requires_grad_(True)
        run.size = net.config.size
        for name in {"channels", "mults", "patch"} & vars(run).keys():
            value = getattr(net.config, name)
            setattr(run, name, ",".join(map(str, value)) if name == "mults" else value)
    net.bf16 = run.bf16 == "on" and has_bfloat16(device)
    if run.compile:
        net.compile()
    return net.to(device)


def frm_path(run):
    """The path of a run's face reward model, which may not exist yet."""
    return getattr(run, "frm_weights", None) or Path(run.out).parent / "frm" / "last.pt"


def reward_of(run, device, weights: dict = None):
    """The composite reward that a run is trained on (with other `weights`, if given), or without
    one the reward that chooses best.pt."""
    weights = parse_rewards(getattr(run, "rewards", WITHOUT_FRM)) if weights is None else weights
    face = (load_face_reward(frm_path(run), size=getattr(run, "size", None))
            if "face" in weights else None)
    return load_reward(weights, run, face, device)


def frm_tflop(run) -> float:
    """The operations that trained a run's face reward model, in 1e12; 0 if nobody counted."""
    return load_tensors(frm_path(run), "--frm_weights").get("tflop", 0.0) if frm_digest(run) else 0


def frm_digest(run) -> str | None:
    """What identifies the face reward model that a run is trained on, or None if there is none."""
    uses = METHODS[run.mode].rewarded and "face" in parse_rewards(run.rewards)
    return digest(frm_path(run)) if uses else None


def build(run, net, device, generator, photos):
    """The method of a run, and a function (averaged net) -> (metrics, picture) that measures it on
    held-out images."""
    lq, gt = held_out(run.data, run.size, VALIDATION, device)
    diffusion, settings = Diffusion(net.config, device), method_values(run)
    if run.mode == "frm":
        return build_frm(run, net, device, generator, photos, settings, lq, gt)
    reward = reward_of(run, device)
    method = METHODS[run.mode].make(net, diffusion, reward, generator, settings)
    return method, partial(validate_restorer, lq=lq, gt=gt, K=run.ddim_steps, reward=reward)


def validate_restorer(averaged, lq, gt, K: int, reward):
    """The held-out metrics of a restorer, and a picture of eight faces."""
    averaged.bf16 = False       # float32, as in evaluate.py
    x = restore(averaged, lq, K, EVAL_ETA, seed=0)
    metrics = {f"heldout_{name}": values.mean().item()
               for name, values in measure(x, gt, reward).items()}
    return metrics, sheet([lq[:8], x[:8], gt[:8]], scale=2)


def build_frm(run, net, device, generator, photos, settings, held_lq, held_gt):
    """As `build`, for mode frm, with pairs restored by `net`."""
    face = (load_face_reward(run.frm_weights, size=run.size) if run.frm_weights
            else FaceRewardModel())
    n = min(RESTORED_PAIRS, len(photos))
    lq, gt = (u.to(device) for u in train_batch(photos, n, run.seed + 1, 0))
    print(f"frm: restoring {n} training photos, which the face reward model learns to tell apart")
    restored = restore(net, lq, run.ddim_steps, settings.eta, run.seed)
    held = restore(net, held_lq, run.ddim_steps, settings.eta, run.seed)
    labelled = None
    if settings.labels != "known":
        unknown = unknown_pairs(net, photos, n, run.ddim_steps, settings.eta, run.seed + 2)
        labelled = label_pairs(settings.labels, gt, unknown, metric_vector, run.seed)
    method = METHODS["frm"].make(face.to(device), generator, settings, restored, gt, labelled)
    return method, partial(validate_frm, lq=held_lq, gt=held_gt, restored=held)


@torch.no_grad()
def validate_frm(averaged, lq, gt, restored):
    """The share of held-out photos that a face reward model prefers to LQ and to restorations."""
    photo, degraded, worse = (averaged.score(u) for u in (gt, lq, restored))
    return {"heldout_accuracy_degraded": (photo > degraded).float().mean().item(),
            "heldout_accuracy_restored": (photo > worse).float().mean().item()}, None
