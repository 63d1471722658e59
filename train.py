"""Train: sft (supervised), frm (a face reward model), lrpo, refl, darl, or demo (the whole story).

    python train.py --mode demo                         drawn faces, two CPU cores, minutes
    python train.py --mode sft                          then:
    python train.py --mode lrpo                         starts from runs/sft/last.pt
    torchrun --nproc_per_node 2 train.py --mode sft     the same run on two GPUs or processes

A run's folder is --out (default runs/MODE). A run starts from what lies beside it: with --out
X/lrpo from X/sft/last.pt and X/frm/last.pt. A method (settings.py lists them) owns its optimiser
steps; this file owns the rest. best.pt is chosen by the reward, which can be hacked: compare
last.pt.
"""
import argparse
import json
import math
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
from rewards import LPIPS, parse_rewards
from settings import (METHODS, build, fields_of, frm_digest, frm_path, method_values, network,
                      parse, resolve, reward_of)
from sft import EMA, SFTSettings
from support.checkpoint import (check_folder, check_resume, load_run, locked, pick_device,
                                replacing, restore_run, run_state, save)
from support.cli import StopSignal, UserError, make_folder, run_main
from support.data import Photos, loader
from support.distributed import alone, check_batch, is_first, join, maximum, place, wait
from support.labels import read_labels
from support.log import Log
from support.optimise import NotFinite, check_finite


def train(run):
    """Run one mode to its end, unless it is finished. Under torchrun rank 0 writes, and every rank
    does all of mode frm, whose model is small by default."""
    wait()                                  # until every rank has seen what there was before
    with alone(run.mode == "frm"):
        check_batch(run.batch_size)
        train_here(run)
    wait()                                  # for what rank 0 writes


def train_here(run):
    """What each rank does of `train`."""
    out, device, frm = Path(run.out), pick_device(run.device), frm_digest(run)
    torch.manual_seed(run.seed)             # for the first weights; everything else: `generator`
    generator = torch.Generator().manual_seed(run.seed)
    net = network(run, device)
    saved = load_run(out / "last.pt", "--resume") if run.resume else None
    if saved:
        check_resume(saved, run, frm)
        if saved["step"] >= run.steps:
            return print(f"{run.mode}: {out} is finished; with a higher --steps it goes on")
    photos = Photos.load(run.data, run.size, "train", run.faces, run.seed, run.workers)
    method, validate = build(run, net, device, generator, photos)
    entry = METHODS[run.mode]
    ema = EMA(method.net, entry.ema, from_scratch=not entry.rewarded)
    start, best = restore_run(saved, method, ema, generator) if saved else (0, -math.inf)
    metrics, _ = validate(ema.net)          # before the first step, and before anything is written

    def state(done, best, finished):
        return run_state(vars(run), method, ema, generator, done, best, bool(finished), frm)
    with locked(make_folder(out)) if is_first() else nullcontext(), StopSignal() as signal:
        if is_first():
            prepare(out, run, method.net, state(0, best, False))
        log = Log(out / "metrics.csv", start)
        log.rows = log.rows or [{"step": start, "seconds": 0.0, **metrics}]
        print(plan(run, method.net, len(photos), start))
        loop(run, method, validate, ema, log, loader(
            photos, run.batch_size, run.seed, range(start, run.steps), run.workers, device),
            start, best, state, signal)


def prepare(out: Path, run, net, state: dict):
    """Try the disk, and leave no file of an older run. Raises UserError if the disk is full."""
    moments = [torch.zeros(2, *p.shape) for p in net.parameters()]          # as AdamW's later
    save(out / "trial", state | {"moments": moments})
    (out / "trial").unlink()
    old = [out / name for name in ("last.pt", "best.pt", "metrics.csv", "curves.png")]
    for path in () if run.resume else [*old, *out.glob("samples_??????.png")]:
        path.unlink(missing_ok=True)
    (out / "args.json").write_text(json.dumps(vars(run), indent=1) + "\n")


def loop(run, method, validate, ema, log, batches, start, best, state, signal):
    """The loop that every method shares: step, average, measure, save, until the end or a signal.
    Raises UserError at the first number that is not finite; what is saved is from before."""
    out, device = Path(run.out), next(method.net.parameters()).device
    earlier = spent = float(log.rows[-1]["seconds"])        # of training, before this call
    timed = run.minutes is not None and place()[0] == 0     # rank 0 has the clock
    limit = earlier + 60 * run.minutes if timed else math.inf
    clock = time.perf_counter()
    bar = tqdm(batches, run.mode, run.steps, initial=start, disable=None if is_first() else True)
    for done, batch in enumerate(bar, start + 1):
        for group in method.optimizer.param_groups:
            group["lr"] = run.lr * min(1, done / METHODS[run.mode].warmup)
        try:
            stats = method.step([u.to(device, non_blocking=True) for u in batch])
            ema.update(method.net)
            spent, clock = spent + time.perf_counter() - clock, time.perf_counter()
            finished, number = maximum(done == run.steps or spent > limit, signal.number)
            stop, metrics = finished or number, {}
            if is_first() and (done % run.every == 0 or stop):
                metrics, picture = validate(ema.net)
            check_finite({name: torch.tensor(v) for name, v in (stats | metrics).items()})
        except NotFinite as error:
            if is_first():
                log.write()
            raise UserError(f"{run.mode}, step {done}: {error}; try a lower --lr (what is saved in "
                            f"{out} is from before)") from None
        log.rows.append({"step": done, "seconds": spent, **stats, **metrics})
        if metrics:
            score = metrics.get("heldout_reward", metrics.get("heldout_accuracy_restored"))
            better, best = score > best, max(score, best)
            log.write()                     # all before last.pt: a killed run writes them again
            log.curves(out / "curves.png")
            if picture:
                with replacing(out / f"samples_{done:06d}.png") as part:
                    picture.save(part, "PNG")
            if better:
                save(out / "best.pt", state(done, best, finished))
            save(out / "last.pt", state(done, best, finished))
            left = min((run.steps - done) * (spent - earlier) / (done - start), limit - spent)
            tqdm.write(f"{out.name}: step {done}, {max(left, 0):.0f} s left; "
                       + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
            warn_of_collapse(log, out)
        clock = time.perf_counter()         # measuring and saving are not training time
        if stop:
            break
    if not finished:
        wait()          # torchrun stops all ranks as soon as one has ended
        print(f"{out.name}: stopped at step {done} and saved; --resume (not --overwrite) goes on")
        sys.exit(128 + number)
    print(f"{out.name}: done after {spent:.0f} s of training in all; {out / 'last.pt'}")


COLLAPSE = 1.0      # ours: dB of held-out PSNR below the start; no method at its defaults loses .5


def warn_of_collapse(log: Log, out: Path):
    """One line when the held-out PSNR is far below the start for two measurements."""
    psnr = [float(row["heldout_psnr"]) for row in log.rows if row.get("heldout_psnr")]
    low = [value < psnr[0] - COLLAPSE for value in psnr]
    if low[-2:] == [True, True] and not all(low[-3:-2]):
        reward = [float(row["heldout_reward"]) for row in log.rows if row.get("heldout_reward")]
        tqdm.write(f"held-out PSNR is more than {COLLAPSE} dB below the start, twice: " + (
            f"--lr is too high, and {out / 'best.pt'} is from before" if reward[-1] < reward[0] else
            "the reward is being hacked, and best.pt with it; give the likelihood more weight "
            "(lrpo: --gt_weight auto, or a lower --fidelity_margin)"))


def plan(run, net, photos: int, start: int) -> str:
    """What a run will do, in one line."""
    size = sum(p.numel() for p in net.parameters()) / 1e6
    text = (f"{run.mode}: {photos:,} training photos of {run.size} px, {size:.2f} M parameters, "
            f"from step {start} to {run.steps:,}, {run.batch_size} images each")
    if hasattr(run, "group"):
        text += f" x {run.group} restorations of {run.ddim_steps} DDIM steps"
    if METHODS[run.mode].rewarded:
        text += f"; rewards {run.rewards}"
    limit = "" if run.minutes is None else f"; at most {run.minutes:.2g} minutes"
    return f"{text}{limit}; to {run.out}"


def check(run):
    """Raises UserError now, not after minutes of other training, for a mistake in the settings or
    a reward's model that cannot be had."""
    check_folder(run)
    method_values(run)
    if METHODS[run.mode].rewarded:
        weights = parse_rewards(run.rewards)
        reward_of(run, "cpu", {name: weight for name, weight in weights.items()
                               if name != "face" or run.frm_weights})
    if run.mode == "frm" and run.labels not in ("known", "svm"):
        read_labels(run.labels, SFTSettings.size)


def demo(given: dict):
    """sft, frm, each of --methods, and sft trained on for as long as they took; then a table."""
    if place()[1] > 1:
        raise UserError("--mode demo: one process trains it; leave torchrun out")
    methods = given.pop("methods", ["lrpo"])
    root = Path(given.pop("out", "runs"))
    modes = ["sft", *([] if "frm_weights" in given else ["frm"]), *methods]
    if idle := given.keys() - {name for mode in modes for name in fields_of(mode)}:
        raise UserError(f"--{min(idle)}: none of {', '.join(modes)} has such a flag")
    go_on = given.pop("resume", False)
    runs = {mode: resolve(mode, {name: given[name] for name in given.keys() & fields_of(mode)},
                          out=str(root / mode), resume=go_on and (root / mode / "last.pt").exists())
            for mode in modes}
    if "rewards" not in given and "lpips_weights" not in given and lpips_is_missing(runs):
        for mode in methods:
            if "lpips" in parse_rewards(runs[mode].rewards):
                runs[mode].rewards = "offline"
    for run in runs.values():
        check(run)
    longer = root / "sft_longer"
    if longer.exists() and not (go_on or "overwrite" in given):
        raise UserError(f"--out {root}: holds {longer} already, which demo writes anew; "
                        "--overwrite it, or name another --out")
    for mode, run in runs.items():
        if not (run.resume and load_run(root / mode / "last.pt", "--resume")["finished"]):
            train(run)
    # The baseline that any method must beat: supervised training for the same extra time.
    seconds = {mode: float(Log(root / mode / "metrics.csv").rows[-1]["seconds"]) for mode in modes}
    shutil.rmtree(longer, ignore_errors=True)
    shutil.copytree(root / "sft", longer)
    extra = seconds.get("frm", 0) + max(seconds[mode] for mode in methods)
    train(argparse.Namespace(**vars(runs["sft"]) | dict(
        out=str(longer), resume=True, overwrite=False, minutes=extra / 60, steps=10 ** 6)))
    ckpts = [str(root / row / "last.pt") for row in ["sft", "sft_longer", *methods]]
    flags = ["--out", str(root / "evaluation"), "--frontier", "--ckpt", *ckpts]
    for name, value in vars(runs[methods[0]]).items():
        if value and name in ("rewards", "device", "lpips_net", "lpips_weights", "clip_weights",
                              "frm_weights", "data"):
            flags += [f"--{name}", str(value)]
    evaluate.compare(evaluate.parser().parse_args(flags))


def lpips_is_missing(runs: dict) -> bool:
    """Whether a preset's LPIPS cannot be had. Demo alone goes on without it, and says so."""
    run = next((run for run in runs.values() if METHODS[run.mode].rewarded
                and "lpips" in parse_rewards(run.rewards)), None)
    if run is None:
        return False
    try:
        LPIPS(run.lpips_net)
    except UserError as error:
        print(f"demo goes on with --rewards offline instead of a reward with LPIPS. {error}")
        return True
    return False


def main(argv=None):
    """Run one mode, and before it mode frm if its reward needs a model that does not exist."""
    given = parse(argv)
    mode = given.pop("mode")
    join()
    if mode == "demo":
        return demo(given)
    run = resolve(mode, given)
    check(run)
    frm = Path(frm_path(run))
    if METHODS[mode].rewarded and "face" in parse_rewards(run.rewards) and not frm.exists():
        print(f"no face reward model at {frm}: training one first")
        shared = given.keys() & fields_of("frm").keys() - {"steps", "minutes", "every", "lr",
                                                           "batch_size", "eta", "resume"}
        train(resolve("frm", {name: given[name] for name in shared}, out=str(frm.parent)))
    train(run)


if __name__ == "__main__":
    run_main(main)
