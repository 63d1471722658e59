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
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import support      # noqa: F401   first: it tells the threads of torch how to wait
import torch
from tqdm import tqdm

import evaluate
from rewards import LPIPS, parse_rewards
from settings import (DEMO, METHODS, SHIPPED, build, fields_of, frm_digest, frm_path, frm_tflop,
                      method_values, network, parse, resolve, reward_of)
from sft import EMA, SFTSettings
from support.checkpoint import (check_folder, check_photos, check_resume, load_run, locked,
                                pick_device, replacing, restore_run, run_state, save)
from support.cli import RewardFiles, StopSignal, UserError, make_folder, run_main, settings_fields
from support.data import Photos, loader, spare_cores
from support.distributed import alone, check_batch, is_first, join, maximum, place, wait
from support.labels import read_labels
from support.log import Log, NotFinite, check_finite, plan, warn_of_collapse
from support.operations import Operations

COUNTED = 2     # ours: steps whose operations are counted; refl measures its PSNR in every second
SLOW_DATA = 0.3     # ours: share of the time that waiting for data may take; more is reported
OFFLINE = {"steps": 540, "fidelity_margin": 0.1}    # ours: of refl in a demo without LPIPS, whose
#                                                     restorations get smooth first and sharp later


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
        if saved["step"] >= run.steps or saved.get("tflop", 0) >= (run.tflop or math.inf):
            return print(f"{run.mode}: {out} is finished; a higher --steps or --tflop goes on")
    workers = spare_cores(device) if run.workers == "auto" else run.workers
    photos = Photos.load(run.data, run.size, "train", run.faces, run.seed, workers)
    identity = photos.digest() if run.data else None
    if saved:
        check_photos(saved, run, identity)
    with Operations() as counted:           # frm restores pairs
        method, validate = build(run, net, device, generator, photos)
    entry = METHODS[run.mode]
    fresh = run.mode == "frm" or not (entry.from_sft or run.init)       # nothing trained it before
    ema = EMA(method.net, entry.ema, from_scratch=fresh)
    start, best = restore_run(saved, method, ema, generator) if saved else (0, -math.inf)
    metrics, _ = validate(ema.net)          # before the first step, and before anything is written

    def state(done, best, finished, tflop=0.0):
        return run_state(vars(run), method, ema, generator, done, best, bool(finished), frm, tflop,
                         identity)
    with locked(make_folder(out)) if is_first() else nullcontext(), StopSignal() as signal:
        if is_first():
            prepare(out, run, method.net, state(0, best, False))
        log = Log(out / "metrics.csv", start)
        tflop = counted.total / 1e12 + frm_tflop(run)
        log.rows = log.rows or [{"step": start, "seconds": 0.0, "tflop": tflop, **metrics}]
        print(plan(run, method.net, len(photos), start))
        loop(run, method, validate, ema, log, loader(
            photos, run.batch_size, run.seed, range(start, run.steps), workers, device,
            with_graded=run.mode == "frm"),
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


def counted_step(method, batch) -> tuple[dict[str, float], float]:
    """A step of a method, and its operations in 1e12: a multiplication and an addition are two.
    Rewards and rollouts are included, and what is done for each value alone is not."""
    with Operations() as counter:
        stats = method.step(batch)
    return stats, counter.total / 1e12


def loop(run, method, validate, ema, log, batches, start, best, state, signal):
    """The loop that every method shares: step, average, measure, save, until the end or a signal.
    Raises UserError at the first number that is not finite; what is saved is from before."""
    out, device = Path(run.out), next(method.net.parameters()).device
    earlier = spent = float(log.rows[-1]["seconds"])        # of training, before this call
    tflop = float(log.rows[-1]["tflop"])
    clock, limit = time.perf_counter(), math.inf if run.tflop is None else run.tflop
    bar = tqdm(batches, run.mode, run.steps, initial=start, disable=None if is_first() else True)
    waited = since = 0.0        # for data, and in all, since the last measurement
    for done, batch in enumerate(bar, start + 1):
        waited += time.perf_counter() - clock
        for group in method.optimizer.param_groups:
            group["lr"] = run.lr * min(1, done / METHODS[run.mode].warmup)
        try:
            batch = [u.to(device, non_blocking=True) for u in batch]
            counts = [float(row["tflop"]) for row in log.rows[:COUNTED + 1]]
            if len(counts) <= COUNTED:
                stats, count = counted_step(method, batch)
            else:                       # the mean of the first steps, of this call or an earlier
                stats, count = method.step(batch), (counts[-1] - counts[0]) / COUNTED
            ema.update(method.net)
            took = time.perf_counter() - clock
            tflop, spent, since = tflop + count, spent + took, since + took
            finished, number = maximum(done == run.steps or tflop >= limit, signal.number)
            stop, metrics = finished or number, {}
            if is_first() and (done % run.every == 0 or stop):
                metrics, picture = validate(ema.net)
            check_finite(metrics)
        except NotFinite as error:
            if is_first():
                log.write()
            raise UserError(f"{run.mode}, step {done}: {error}; try a lower --lr (what is saved in "
                            f"{out} is from before)") from None
        log.rows.append({"step": done, "seconds": spent, "tflop": tflop, **stats, **metrics})
        if metrics:
            score = metrics.get("heldout_reward", metrics.get("heldout_accuracy_restored"))
            better, best = score > best, max(score, best)
            log.write()                     # all before last.pt: a killed run writes them again
            log.curves(out / "curves.png")
            if picture:
                with replacing(out / f"samples_{done:06d}.png") as part:
                    picture.save(part, "PNG")
            if better:
                save(out / "best.pt", state(done, best, finished, tflop))
            save(out / "last.pt", state(done, best, finished, tflop))
            left = min(run.steps - done, (limit - tflop) / max(count, 1e-9))
            seconds = max(left, 0) * (spent - earlier) / (done - start)
            tqdm.write(f"{out.name}: step {done}, {seconds:.0f} s left; "
                       + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
            warn_of_collapse(log, out)
            if waited > SLOW_DATA * since:
                tqdm.write(f"{out.name}: {waited / since:.0%} of the time went into waiting for "
                           "data; more --workers make it faster, if there are cores for them")
            waited = since = 0.0
        clock = time.perf_counter()         # measuring and saving are not training time
        if stop:
            break
    if not finished:
        wait()          # torchrun stops all ranks as soon as one has ended
        print(f"{out.name}: stopped at step {done} and saved; --resume (not --overwrite) goes on")
        sys.exit(128 + number)
    print(f"{out.name}: done after {spent:.0f} s of training in all; {out / 'last.pt'}")


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
    """From the restorer that ships with the project: frm, each of --methods, and sft for as many
    operations as the most expensive of them took; then a table and a picture."""
    if place()[1] > 1:
        raise UserError("--mode demo: one process trains it; leave torchrun out")
    judge = given.pop("judge_weights", None)
    given = {"preset": "drawn64", "init": str(SHIPPED)} | given
    methods, root = given.pop("methods", DEMO), Path(given.pop("out", "runs/demo"))
    if "rewards" not in given and lpips_is_missing(given):
        methods, given = ["refl"], OFFLINE | given | {"rewards": "offline"}
    resume = given.pop("resume", False)

    def run(mode, **more):
        out = root / mode
        go_on = resume and (out / "last.pt").exists()
        own = {name: given[name] for name in given.keys() & fields_of(mode).keys()}
        if mode not in methods:
            own.pop("steps", None)          # --steps is for the methods
        return resolve(mode, own, out=str(out), resume=go_on, **more)
    modes = [*([] if "frm_weights" in given else ["frm"]), *methods]
    if idle := given.keys() - {name for mode in [*modes, "sft"] for name in fields_of(mode)}:
        raise UserError(f"--{min(idle)}: none of {', '.join(modes)}, sft has such a flag")
    for mode in [*modes, "sft"]:
        check(run(mode))
    for mode in modes:
        train(run(mode))
    # The baseline that any method must beat: supervised training for the same operations.
    tflop = {mode: float(Log(root / mode / "metrics.csv").rows[-1]["tflop"]) for mode in methods}
    train(run("sft", steps=10 ** 6, tflop=max(tflop.values())))
    ckpts = [given["init"], *(str(root / name / "last.pt") for name in ("sft", *methods))]
    flags = ["--out", str(root / "evaluation"), "--ckpt", *ckpts]
    for name in ("rewards", "device", "data", *settings_fields(RewardFiles)):
        flags += [f"--{name}", str(given[name])] if given.get(name) else []
    flags += ["--judge_weights", judge] if judge else []
    evaluate.compare(evaluate.parser().parse_args(flags))


def lpips_is_missing(given: dict) -> bool:
    """Whether LPIPS cannot be had. Demo alone goes on without it, and says so."""
    try:
        LPIPS(given.get("lpips_net", RewardFiles.lpips_net), given.get("lpips_weights"))
    except UserError as error:
        if "lpips_weights" in given:
            raise
        print(f"demo goes on with --methods refl --rewards offline. {error}")
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
    if METHODS[mode].rewarded and "face" in parse_rewards(run.rewards) and not (
            run.frm_weights or frm.exists() and load_run(frm, "--frm_weights")["finished"]):
        print(f"no face reward model at {frm}, or only a part of one: training it first")
        shared = given.keys() & fields_of("frm").keys() - {"steps", "tflop", "every", "batch_size",
                                                           "lr", "eta", "resume"}
        train(resolve("frm", {name: given[name] for name in shared}, out=str(frm.parent),
                      resume=frm.exists()))
    train(run)


if __name__ == "__main__":
    run_main(main)
