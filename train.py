"""Train: sft (supervised), frm (a face reward model), lrpo, refl, darl, or demo (the whole story).

    python train.py --mode demo                         drawn faces, two CPU cores, minutes
    python train.py --mode sft                          then:
    python train.py --mode lrpo                         starts from runs/sft/last.pt

A run's folder is --out (default runs/MODE). What it starts from is looked for beside that folder:
with --out X/lrpo, X/sft/last.pt and X/frm/last.pt. A method is a class with `net`, `optimizer` and
step(batch) -> metrics, and with state_dict() where it has a state of its own. It owns its optimiser
steps; this file owns data, device, checkpoints, log and stopping. best.pt is chosen by the reward,
which can be hacked, so last.pt is what the demo compares.
"""
import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
from darl import DARL
from frm import (FaceRewardModel, FaceRewardTraining, load_face_reward, metric_vector,
                 unknown_pairs)
from lrpo import LRPO
from model import EVAL_ETA, Config, Diffusion, UNet, load_restorer, restore
from refl import ReFL
from rewards import parse_rewards
from settings import (EMA_DECAY, METHODS, PRESETS, WARMUP, load_reward, method_values, parse,
                      resolve)
from sft import EMA, SFT
from steered import SteeredLRPO
from support.checkpoint import (check_folder, check_resume, load_tensors, pick_device, restore_run,
                                run_state, save)
from support.cli import UserError, run_main
from support.data import Photos, sheet, train_batch
from support.labels import label_pairs, read_labels
from support.log import Log
from support.lpips_reward import LPIPS

VALIDATION = 64         # ours: held-out images measured during training
RESTORED_PAIRS = 512    # ours: restorations that the face reward model learns from
REWARDED_WITHOUT_FRM = "ssim=.5,dwt=.5"     # chooses best.pt in sft, when no frm exists yet


# ---------------------------------------------------------------------------------------------
# What a run is made of

def network(run, device) -> UNet:
    """A new network for sft, otherwise the restorer that the run starts from. Raises UserError if
    there is none, or if it contradicts the flags."""
    init = run.init or (None if run.mode == "sft" else Path(run.out).parent / "sft" / "last.pt")
    if init is None:
        mults = tuple(int(m) for m in run.mults.split(","))
        net = UNet(Config(run.size, run.channels, mults, patch=run.patch))
    else:
        if not run.init and not init.exists():
            raise UserError(f"--mode {run.mode} starts from {init}, not there yet: run --mode sft "
                            "first, or give --init CKPT")
        net, state = load_restorer(init, device, "--init")
        if net.config.size != run.size:
            raise UserError(f"--init {init}: made for {net.config.size} px, not --size {run.size}")
        if state["args"]["data"] and not run.data:
            raise UserError(f"--init {init}: trained on {state['args']['data']}; give its --data")
        for name, has in (("channels", net.config.channels), ("patch", net.config.patch),
                          ("mults", ",".join(map(str, net.config.mults)))):
            if getattr(run, name) not in (PRESETS[run.preset][name], has):
                raise UserError(f"--{name} {getattr(run, name)}: --init {init} has {has}; leave it "
                                "out")
            setattr(run, name, has)         # for args.json
        net.train().requires_grad_(True)
    net.bf16 = run.bf16 == "on"
    return net.to(device)


def frm_path(run):
    """The path of a run's face reward model, which may not exist yet."""
    return run.frm_weights or Path(run.out).parent / "frm" / "last.pt"


def build_method(run, net, device, generator):
    """The method of mode sft, lrpo, refl or darl, and a function validate(averaged net) ->
    (metrics, picture)."""
    rewards = REWARDED_WITHOUT_FRM if run.mode == "sft" else run.rewards
    reward = load_reward(parse_rewards(rewards), run, frm_path(run), device, run.size)
    lq, gt = evaluate.held_out(run.data, run.size, VALIDATION, device)
    diffusion, settings = Diffusion(net.config, device), method_values(run)
    if run.mode == "sft":
        method = SFT(net, diffusion, generator, settings)
    elif run.mode == "refl":
        method = ReFL(net, diffusion, reward, generator, settings)
    elif run.mode == "lrpo":
        lrpo = LRPO if run.recipe == "paper" else SteeredLRPO
        method = lrpo(net, diffusion, reward, generator, settings)
    else:
        lpips = reward.terms.get("lpips")
        if run.lpips_weights and lpips is None:
            lpips = LPIPS(run.lpips_net, run.lpips_weights).to(device)
        print(f"darl: rewards {run.rewards}; difficulty by {'LPIPS' if lpips else 'L1'}")
        method = DARL(net, diffusion, reward, generator, settings, lpips)

    def validate(averaged):
        averaged.bf16 = False       # float32, as in evaluate.py
        x = restore(averaged, lq, run.ddim_steps, EVAL_ETA, seed=0)
        metrics = {f"heldout_{name}": values.mean().item()
                   for name, values in evaluate.measure(x, gt, reward).items()}
        return metrics, sheet([lq[:8], x[:8], gt[:8]], scale=2)
    return method, validate


def build_frm(run, net, device, generator, photos):
    """The same for mode frm, with pairs restored by `net`."""
    settings = method_values(run)
    face = (load_face_reward(run.frm_weights, size=run.size) if run.frm_weights
            else FaceRewardModel())
    n = min(RESTORED_PAIRS, len(photos))
    lq, gt = (u.to(device) for u in train_batch(photos, n, run.seed + 1, 0))
    held_lq, held_gt = evaluate.held_out(run.data, run.size, VALIDATION, device)
    print(f"frm: restoring {n} training photos, which the face reward model learns to tell apart")
    restored = restore(net, lq, run.ddim_steps, settings.eta, run.seed)
    held = restore(net, held_lq, run.ddim_steps, settings.eta, run.seed)
    labelled = None
    if settings.labels != "known":
        unknown = unknown_pairs(net, photos, n, run.ddim_steps, settings.eta, run.seed + 2)
        labelled = label_pairs(settings.labels, gt, unknown, metric_vector, run.seed)
    method = FaceRewardTraining(face.to(device), generator, settings, restored, gt, labelled)

    def validate(averaged):
        photo, degraded, worse = (averaged.score(u) for u in (held_gt, held_lq, held))
        return {"heldout_accuracy_degraded": (photo > degraded).float().mean().item(),
                "heldout_accuracy_restored": (photo > worse).float().mean().item()}, None
    return method, validate


# ---------------------------------------------------------------------------------------------
# The loop

def train(run):
    """Run one mode to its end: the loop that every method shares."""
    out, device = Path(run.out), pick_device(run.device)
    saved = load_tensors(out / "last.pt", "--resume") if run.resume else None
    if saved:
        check_resume(saved, run)
    torch.manual_seed(run.seed)             # for the first weights; everything else: `generator`
    generator = torch.Generator().manual_seed(run.seed)
    net = network(run, device)
    photos = Photos.load(run.data, run.size, "train", run.faces, run.seed)
    given = run, net, device, generator
    method, validate = build_frm(*given, photos) if run.mode == "frm" else build_method(*given)
    ema = EMA(method.net, EMA_DECAY[run.mode], from_scratch=run.mode not in METHODS)
    start, best = restore_run(saved, method, ema, generator) if saved else (0, -math.inf)
    metrics, _ = validate(ema.net)          # before the first step, and before anything is written

    out.mkdir(parents=True, exist_ok=True)
    (out / "args.json").write_text(json.dumps(vars(run), indent=1) + "\n")
    for old in () if saved else (out / "last.pt", out / "best.pt", *out.glob("samples_??????.png")):
        old.unlink(missing_ok=True)         # --overwrite: no file of the old run may stay
    log = Log(out / "metrics.csv", start)
    log.rows = log.rows or [{"step": start, "seconds": 0.0, **metrics}]
    print(plan(run, method.net, len(photos), start))
    earlier = spent = float(log.rows[-1]["seconds"])        # of training, before this call
    limit = math.inf if run.minutes is None else earlier + 60 * run.minutes
    clock = time.perf_counter()
    for step in tqdm(range(start, run.steps), run.mode, run.steps, initial=start, disable=None):
        for group in method.optimizer.param_groups:
            group["lr"] = run.lr * min(1, (step + 1) / WARMUP[run.mode])
        batch = train_batch(photos, run.batch_size, run.seed, step)
        stats = method.step([u.to(device) for u in batch])
        ema.update(method.net)
        done = step + 1
        spent, clock = spent + time.perf_counter() - clock, time.perf_counter()
        if not all(math.isfinite(value) for value in stats.values()):
            raise UserError(f"--lr {run.lr}: step {done} gave a number that is not finite; try a "
                            f"lower --lr (the checkpoints in {out} are from before)")
        stop, metrics = done == run.steps or spent > limit, {}
        if done % run.every == 0 or stop:
            metrics, picture = validate(ema.net)
            score = metrics.get("heldout_reward", metrics.get("heldout_accuracy_restored"))
            state = run_state(vars(run), method, ema, generator, done, max(best, score))
            save(out / "last.pt", state)
            if score > best:
                best = score
                save(out / "best.pt", state)
            if picture:
                picture.save(out / f"samples_{done:06d}.png")
        log.rows.append({"step": done, "seconds": spent, **stats, **metrics})
        if metrics:
            log.write()
            log.curves(out / "curves.png")
            left = min((run.steps - done) * (spent - earlier) / (done - start), limit - spent)
            tqdm.write(f"{run.mode}: step {done} of {run.steps}, {max(left, 0):.0f} s left; "
                       + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        clock = time.perf_counter()         # measuring and saving are not training time
        if stop:
            break
    print(f"{run.mode}: done after {spent:.0f} s of training; {out / 'last.pt'}")


def plan(run, net, photos: int, start: int) -> str:
    """What a run will do, in one line."""
    size = sum(p.numel() for p in net.parameters()) / 1e6
    text = (f"{run.mode}: {photos:,} training photos of {run.size} px, {size:.2f} M parameters, "
            f"steps {start} to {run.steps} of {run.batch_size} images")
    if run.mode in ("lrpo", "darl"):
        text += f" x {run.group} restorations of {run.ddim_steps} DDIM steps"
    if run.mode in METHODS:
        text += f"; rewards {run.rewards}"
    limit = "" if run.minutes is None else f"; at most {run.minutes:.2g} minutes"
    return f"{text}{limit}; to {run.out}"


# ---------------------------------------------------------------------------------------------
# The programs

def check(run):
    """Raises UserError now, not after minutes of other training, for a mistake in the settings or
    a reward's model that cannot be had."""
    check_folder(run)
    method_values(run)
    weights = parse_rewards(run.rewards)
    if run.mode in METHODS:
        early = {name: w for name, w in weights.items() if name != "face" or run.frm_weights}
        early |= {"lpips": 0.0} if run.mode == "darl" and run.lpips_weights else {}
        load_reward(early, run, run.frm_weights, "cpu", run.size)
    if run.mode == "frm" and run.labels not in ("known", "svm"):
        read_labels(run.labels, run.size)


def demo(given: dict):
    """sft, frm, each of --methods, and sft trained on for as long as they took; then a table."""
    methods = given.pop("methods", ["lrpo"])
    methods = METHODS if "all" in methods else methods
    root = Path(given.pop("out", "runs"))
    modes = ["sft", *([] if "frm_weights" in given else ["frm"]), *methods]
    go_on = given.pop("resume", False)
    runs = {mode: resolve(mode, given, out=str(root / mode),
                          resume=go_on and (root / mode / "last.pt").exists()) for mode in modes}
    if "rewards" not in given and "lpips_weights" not in given and lpips_is_missing(runs):
        for run in runs.values():
            run.rewards = "offline" if "lpips" in parse_rewards(run.rewards) else run.rewards
    for run in runs.values():
        check(run)
    longer = root / "sft_longer"
    if longer.exists() and not (go_on or "overwrite" in given):
        raise UserError(f"--out {root}: holds {longer} already, which demo writes anew; "
                        "--overwrite it, or name another --out")
    for mode, run in runs.items():
        if not run.resume or int(Log(root / mode / "metrics.csv").rows[-1]["step"]) < run.steps:
            train(run)      # otherwise it was finished before
    # The baseline that any method must beat: supervised training for the same extra time.
    seconds = {mode: float(Log(root / mode / "metrics.csv").rows[-1]["seconds"]) for mode in modes}
    shutil.rmtree(longer, ignore_errors=True)
    shutil.copytree(root / "sft", longer)
    extra = seconds.get("frm", 0) + max(seconds[mode] for mode in methods)
    go_on = dict(out=str(longer), resume=True, overwrite=False, minutes=extra / 60, steps=10 ** 6)
    train(argparse.Namespace(**vars(runs["sft"]) | go_on))
    ckpts = [str(root / row / "last.pt") for row in ["sft", "sft_longer", *methods]]
    flags = ["--out", str(root / "evaluation"), "--frontier", "--ckpt", *ckpts]
    for name in ("rewards", "device", "lpips_net", "lpips_weights", "clip_weights", "frm_weights",
                 "data"):
        value = getattr(runs["sft"], name)
        flags += [f"--{name}", value] if value else []
    evaluate.compare(evaluate.parser().parse_args(flags))


def lpips_is_missing(runs: dict) -> bool:
    """Whether LPIPS, which a preset asks for, cannot be had. Demo alone goes on without it, and
    says so in one line."""
    if not any("lpips" in parse_rewards(run.rewards) for run in runs.values()):
        return False
    try:
        LPIPS(runs["sft"].lpips_net)
    except UserError as error:
        print(f"demo goes on with --rewards offline instead of a reward with LPIPS. {error}")
        return True
    return False


def main(argv=None):
    """Run one mode, and before it mode frm if its reward needs a model that does not exist."""
    given = parse(argv)
    mode = given.pop("mode")
    if mode == "demo":
        return demo(given)
    run = resolve(mode, given)
    check(run)
    frm = Path(frm_path(run))
    if mode in METHODS and "face" in parse_rewards(run.rewards) and not (run.frm_weights
                                                                         or frm.exists()):
        print(f"no face reward model at {frm}: training one first")
        own = {"steps", "minutes", "every", "batch_size", "lr", "eta", "resume"}
        train(resolve("frm", {name: given[name] for name in given.keys() - own},
                      out=str(frm.parent)))
    train(run)


if __name__ == "__main__":
    run_main(main)
