"""Train: sft (supervised), frm (a face reward model), lrpo, refl, darl, or demo (the whole story).

    python train.py --mode demo                         drawn faces, two CPU cores, minutes
    python train.py --mode sft                          then:
    python train.py --mode lrpo                         starts from runs/sft/last.pt

A mode's run folder is --out (default runs/MODE); what it starts from is looked for beside it: with
--out X/lrpo, X/sft/last.pt and X/frm/last.pt. A method is a class with step(batch) -> floats that
owns its optimiser steps; this file owns data, device, checkpoints, log, pictures and stopping.
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
from data import Photos, UserError, has_file, run_main, sheet, train_batch
from evaluate import Log
from frm import FaceRewardModel, FaceRewardTraining, load_face_reward
from labels import label_pairs, read_labels, unknown_pairs
from lrpo import LRPO
from model import (EMA, SFT, Config, Diffusion, UNet, load_restorer, load_tensors, pick_device,
                   save_checkpoint)
from refl import ReFL
from rewards import LPIPS, build_reward, parse_rewards
from settings import (EMA_DECAY, METHODS, PRESETS, WARMUP, check_flags, flags_of, foreign_flags,
                      parser, resolve, settings_of)
from steered import SteeredLRPO

VALIDATION = 64         # held-out images measured during training
RESTORED_PAIRS = 512    # restorations that the face reward model learns from
REWARDED_WITHOUT_FRM = "ssim=.5,dwt=.5"     # what sft's best.pt is chosen by: no frm exists yet


def build(args, device, generator, photos):
    """The method, and validate(averaged net) -> (figures, picture or None), for args.mode."""
    beside = Path(args.out).parent
    init = args.init or (None if args.mode == "sft" else beside / "sft" / "last.pt")
    if init and not args.init and not init.exists():
        raise UserError(f"--mode {args.mode} starts from {init}, not there yet: run --mode sft "
                        "first, or give --init CKPT")
    if init is None:
        mults = tuple(int(m) for m in args.mults.split(","))
        net = UNet(Config(args.size, args.channels, mults, patch=args.patch))
    else:
        net, state = load_restorer(init, device, "--init")
        if net.config.size != args.size:
            raise UserError(f"--init {init}: made for {net.config.size} px, not --size {args.size}")
        if state["args"]["data"] and not args.data:
            raise UserError(f"--init {init}: trained on {state['args']['data']}; give its --data")
        for name, has in (("channels", net.config.channels), ("patch", net.config.patch),
                          ("mults", ",".join(map(str, net.config.mults)))):
            if getattr(args, name) not in (PRESETS[args.preset][name], has):
                raise UserError(f"--{name} {getattr(args, name)}: --init {init} has {has}; leave "
                                "it out")
            setattr(args, name, has)        # for args.json
        net.train().requires_grad_(True)
    net = net.to(device)
    net.bf16 = args.bf16 == "on"
    diffusion = Diffusion(net.config, device)
    lq, gt = evaluate.held_out(args.data, args.size, VALIDATION, device)

    if args.mode == "frm":
        n = min(RESTORED_PAIRS, len(photos))
        pool_lq, pool_gt = (u.to(device) for u in train_batch(photos, n, args.seed + 1, 0))
        print(f"restoring {n} training photos with {init}, for the face reward model to tell apart")
        restored = evaluate.restore(net, pool_lq, args.ddim_steps, args.eta, args.seed)
        held = evaluate.restore(net, lq, args.ddim_steps, args.eta, args.seed)
        face = load_face_reward(args.frm_weights) if args.frm_weights else FaceRewardModel()
        labelled = None
        if args.labels != "known":
            unknown = unknown_pairs(net, photos, n, args.ddim_steps, args.eta, args.seed + 2)
            labelled = label_pairs(args.labels, pool_gt, unknown, args.seed)
        method = FaceRewardTraining(face.to(device), generator, restored, pool_gt, args.lr,
                                    labelled)

        def validate(averaged):
            score = [averaged.score(u) for u in (gt, lq, held)]
            return {"heldout_accuracy_degraded": (score[0] > score[1]).float().mean().item(),
                    "heldout_accuracy_restored": (score[0] > score[2]).float().mean().item()}, None
        return method, validate

    weights = parse_rewards(REWARDED_WITHOUT_FRM if args.mode == "sft" else args.rewards)
    frm = args.frm_weights or beside / "frm" / "last.pt"
    reward = build_reward(weights, device, frm, args.lpips_net, args.lpips_weights,
                          args.clip_weights, args.size)
    method = make_method(args, net, diffusion, reward, generator)

    def validate(averaged):
        x = evaluate.restore(averaged, lq, args.ddim_steps, evaluate.EVAL_ETA, seed=0)
        figures = {name: v.mean().item() for name, v in evaluate.measure(x, gt, reward).items()}
        picture = sheet([lq[:8], x[:8], gt[:8]], scale=2)
        return {f"heldout_{name}": v for name, v in figures.items()}, picture
    return method, validate


def make_method(args, net, diffusion, reward, generator):
    """What takes the steps of sft, lrpo, refl or darl, with its settings from the flags."""
    if args.mode == "sft":
        return SFT(net, diffusion, generator, args.lr)
    given = net, diffusion, reward, generator
    if args.mode == "refl":
        return ReFL(*given, lr=args.lr, K=args.ddim_steps, last=args.refl_last,
                    struct_weight=args.struct_weight, reg_weight=args.reg_weight, reg=args.reg,
                    denoise_weight=args.denoise_weight, frm_update_every=args.frm_update_every,
                    frm_lr=args.frm_lr)
    own = settings_of(args.mode, args.recipe)
    settings = own(**{name: getattr(args, name) for name in flags_of(own)})
    if args.mode == "lrpo":
        return (LRPO if args.recipe == "paper" else SteeredLRPO)(*given, settings)
    lpips = reward.terms.get("lpips")
    if args.lpips_weights and lpips is None:
        lpips = LPIPS(args.lpips_net, args.lpips_weights).to(diffusion.abar.device)
    print(f"darl: rewards {args.rewards}; difficulty by {'LPIPS' if lpips else 'L1'}")
    return DARL(*given, settings, lpips)


def train(args):
    """Run one mode to its end."""
    check(args)
    out, device = Path(args.out), pick_device(args.device)
    last = out / "last.pt"
    saved = load_tensors(last, "--resume") if args.resume else None
    torch.manual_seed(args.seed)            # the weights' first values; all else is `generator`'s
    generator = torch.Generator().manual_seed(args.seed)
    try:
        photos = (Photos.from_folder(args.data, args.size, "train") if args.data
                  else Photos.drawn(args.faces, args.seed, args.size, "train"))
        method, validate = build(args, device, generator, photos)
    except ValueError as error:         # a face, a network or a method that cannot be had
        raise UserError(f"--preset {args.preset} with these flags: {error}") from None
    ema = EMA(method.net, EMA_DECAY[args.mode], from_scratch=args.mode not in METHODS)
    start, best = 0, -math.inf
    if saved:
        start, best = restore_run(saved, args, method, ema, generator)
    figures, _ = validate(ema.net)      # before the first step, and before anything is written

    out.mkdir(parents=True, exist_ok=True)
    (out / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")
    for old in () if saved else (last, out / "best.pt", *out.glob("samples_??????.png")):
        old.unlink(missing_ok=True)     # --overwrite: nothing of the old run may look like the new
    log = Log(out / "metrics.csv", start)
    log.rows = log.rows or [{"step": start, "seconds": 0.0, **figures}]
    print(plan(args, method.net, len(photos), start))
    before = spent = float(log.rows[-1]["seconds"])
    clock = time.perf_counter()
    bar = tqdm(range(start, args.steps), args.mode, args.steps, initial=start, disable=None)
    for step in bar:
        for group in method.optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / WARMUP[args.mode])
        batch = train_batch(photos, args.batch_size, args.seed, step)
        stats = method.step([u.to(device) for u in batch])
        ema.update(method.net)
        done = step + 1
        spent, clock = spent + time.perf_counter() - clock, time.perf_counter()
        if not all(math.isfinite(value) for value in stats.values()):
            raise UserError(f"--lr {args.lr}: step {done} gave a number that is not finite; try a "
                            f"lower --lr (the checkpoints in {out} are from before)")
        stop = done == args.steps or (
            args.minutes is not None and spent - before > 60 * args.minutes)
        figures = {}
        if done % args.every == 0 or stop:
            figures, picture = validate(ema.net)
            stats |= figures
            if picture:
                picture.save(out / f"samples_{done:06d}.png")
            score = figures.get("heldout_reward", figures.get("heldout_accuracy_restored"))
            state = run_state(args, method, ema, generator, done, max(best, score))
            save_checkpoint(last, state)
            if score > best:
                best = score
                save_checkpoint(out / "best.pt", state)
        log.rows.append({"step": done, "seconds": spent, **stats})
        if figures:
            log.write()
            log.curves(out / "curves.png")
            if hasattr(method, "picture"):
                method.picture(log.rows, out)
        bar.set_postfix({k: f"{v:.3g}" for k, v in list(stats.items())[:1]})
        clock = time.perf_counter()         # measuring and saving are not training time
        if stop:
            break
    print(f"{args.mode}: {done} steps, {spent:.0f} s of training; "
          + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))


def check(args):
    """Refuse what cannot work before any work is done and any file written."""
    last = Path(args.out) / "last.pt"
    if has_file(args.out):
        raise UserError(f"--out {args.out}: is a file, or below one; name a folder")
    if args.resume and not last.exists():
        raise UserError(f"--resume: there is no {last} to go on from")
    if last.exists() and not args.resume and not args.overwrite:
        raise UserError(f"--out {args.out}: holds a run already; --resume it, --overwrite it, "
                        "or name another --out")
    terms = parse_rewards(args.rewards)
    if args.mode == "frm" and args.labels not in ("known", "svm"):
        read_labels(args.labels, args.size)
    if args.mode == "frm" and args.frm_weights:
        load_face_reward(args.frm_weights, size=args.size)
    if args.mode in ("lrpo", "darl"):
        if args.eta <= 0:
            raise UserError(f"--eta must be above 0 in {args.mode}: without noise a step has no "
                            "likelihood")
        if args.group < 2 or args.ddim_steps < 2:
            raise UserError(f"--group and --ddim_steps must be 2 or more in {args.mode}")
    branched = args.mode in ("lrpo", "darl") and args.recipe == "steered" and args.branch == "on"
    for name, idle in (("noise_level_weights", "on"), ("steps_per_update", 0), ("gt_last", 0)):
        if branched and getattr(args, name) not in (idle, None):
            raise UserError(f"--{name} {getattr(args, name)}: with a branch a single step is "
                            "trained, so that it has no effect; give --branch off as well")
    if args.mode == "darl" and args.stepwise == "on" and args.branch == "on":
        raise UserError("--stepwise on: needs --branch off (and a smaller --batch_size)")
    if args.mode == "refl" and args.refl_last > args.ddim_steps:
        raise UserError(f"--refl_last {args.refl_last}: at most --ddim_steps {args.ddim_steps}")
    if args.mode in METHODS:
        early = {name for name in terms if name != "face" or args.frm_weights}
        early |= {"lpips"} if args.mode == "darl" and args.lpips_weights else set()
        build_reward(dict.fromkeys(early, 0.0), "cpu", args.frm_weights, args.lpips_net,
                     args.lpips_weights, args.clip_weights, args.size)


def plan(args, net, photos: int, start: int) -> str:
    """What a run will do, in one line."""
    size = sum(p.numel() for p in net.parameters()) / 1e6
    text = (f"{args.mode}: {photos:,} training photos of {args.size} px, {size:.2f} M parameters, "
            f"steps {start} to {args.steps} of {args.batch_size} images")
    if args.mode in ("lrpo", "darl"):
        text += f" x {args.group} restorations of {args.ddim_steps} DDIM steps"
    if args.mode in METHODS:
        text += f"; rewards {args.rewards}"
    limit = "" if args.minutes is None else f"; at most {args.minutes:.2g} minutes"
    return f"{text}{limit}; to {args.out}"


def run_state(args, method, ema, generator, step: int, best: float) -> dict:
    """A checkpoint. The data position is `step`; config and ema are all that restoring needs."""
    config = vars(method.net.config) if args.mode != "frm" else {}
    return {"mode": args.mode, "step": step, "best": best, "args": vars(args), "config": config,
            "model": method.net.state_dict(), "ema": ema.net.state_dict(),
            "ema_updates": ema.updates, "optimizer": method.optimizer.state_dict(),
            "method": method.state_dict() if hasattr(method, "state_dict") else {},
            "generator": generator.get_state()}


def restore_run(saved: dict, args, method, ema, generator) -> tuple[int, float]:
    """Everything back to where run_state left it; returns the next step and the best score."""
    was, now = saved["args"], vars(args)
    for name in sorted({*was, *now} - FREE_ON_RESUME - {*foreign_flags({args.mode})}):
        if was.get(name) != now.get(name):
            raise UserError(f"--resume: {args.out} was run with --{name} {was.get(name)}, "
                            f"not {now.get(name)}")
    if saved["step"] >= args.steps:
        raise UserError(f"--resume: {args.out} has done {saved['step']} steps; give more --steps")
    method.net.load_state_dict(saved["model"])
    ema.net.load_state_dict(saved["ema"])
    ema.updates = saved["ema_updates"]
    method.optimizer.load_state_dict(saved["optimizer"])
    if saved["method"]:
        method.load_state_dict(saved["method"])
    generator.set_state(saved["generator"])
    return saved["step"], saved["best"]


# What may differ when a run goes on; everything else would make it another run.
FREE_ON_RESUME = {"steps", "minutes", "every", "out", "device", "resume", "overwrite", "methods",
                  "lpips_weights", "clip_weights"}


def lpips_is_missing(args) -> bool:
    """Whether demo, which wants LPIPS by default, has to do without it; it says so in one line."""
    wanted = resolve(argparse.Namespace(**vars(args) | {"mode": "lrpo"}))
    if args.rewards or args.lpips_weights or "lpips" not in parse_rewards(wanted.rewards):
        return False        # what is asked for by a flag stops the run where it cannot be had
    try:
        LPIPS(wanted.lpips_net)
    except UserError as error:
        print(f"demo goes on with --rewards offline instead of a reward with LPIPS. {error}")
        return True
    return False


def demo(args):
    """sft, frm, each method of --methods, sft trained on for as long as they took; a table."""
    offline = lpips_is_missing(args)
    methods = METHODS if "all" in args.methods else args.methods
    root, stages = Path(args.out), ["sft", *([] if args.frm_weights else ["frm"]), *methods]

    def stage(mode, name, **changes):
        run = resolve(argparse.Namespace(
            **vars(args) | {"mode": mode, "out": str(root / name), "init": None} | changes))
        if offline and "lpips" in parse_rewards(run.rewards):
            run.rewards = "offline"
        return run

    def seconds(name):
        return float(Log(root / name / "metrics.csv").rows[-1]["seconds"])
    runs = {mode: stage(mode, mode, resume=args.resume and (root / mode / "last.pt").exists())
            for mode in stages}
    for run in runs.values():
        check(run)
    longer = root / "sft_longer"
    if longer.exists() and not (args.resume or args.overwrite):
        raise UserError(f"--out {root}: holds {longer} already, which demo writes anew; "
                        "--overwrite it, or name another --out")
    for mode, run in runs.items():
        if not run.resume or len(Log(root / mode / "metrics.csv").rows) <= run.steps:
            train(run)      # else it was finished before
    # The baseline that any method must beat: supervised training for the same extra wall time.
    shutil.rmtree(longer, ignore_errors=True)
    shutil.copytree(root / "sft", longer)
    extra = ("frm" in runs and seconds("frm")) + max(seconds(m) for m in methods)
    train(stage("sft", "sft_longer", resume=True, overwrite=False, minutes=extra / 60,
                steps=100 * runs["sft"].steps))
    ckpts = [str(root / row / "last.pt") for row in ["sft", "sft_longer", *methods]]
    choice = ["--out", str(root / "evaluation"), "--frontier", "--ckpt", *ckpts]
    flags = vars(runs["sft"])
    for name in ("rewards", "device", "lpips_net", "lpips_weights", "clip_weights", "frm_weights",
                 "data"):
        choice += [f"--{name}", flags[name]] if flags[name] else []
    evaluate.compare(evaluate.parser().parse_args(choice))


def main(argv=None):
    given = parser().parse_args(argv)
    check_flags(given)
    if given.mode == "demo":
        return demo(argparse.Namespace(**vars(given) | {"out": given.out or "runs"}))
    args = resolve(given)
    frm = Path(args.out).parent / "frm" / "last.pt"
    check(args)
    trained_first = (args.mode in METHODS and "face" in parse_rewards(args.rewards)
                     and not args.frm_weights and not frm.exists())
    if args.mode != "frm" and args.labels != "known" and not trained_first:
        raise UserError("--labels: no face reward model is trained here; use --mode frm")
    if trained_first:
        print(f"no face reward model at {frm}: training one first")
        own = dict(mode="frm", out=str(frm.parent), resume=False, minutes=None, steps=None,
                   batch_size=None, lr=None, every=None)
        train(resolve(argparse.Namespace(**vars(given) | own)))
    train(args)


if __name__ == "__main__":
    run_main(main)
