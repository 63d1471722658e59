"""Verify the project on one GPU in at most eight minutes, and print one table.

    python -m tools.gpu_check [--device cuda]
    python -m tools.gpu_check --device cpu --quick      the same lines with tiny networks

Lines    agree    two steps of every mode on the CPU and on the device, from the same networks, in
                  float32 without TF32: the largest relative difference of a metric.
         resume   four steps of every mode against two and two more: the relative difference of the
                  weights, and of those of the same run made twice, because not every function of a
                  GPU adds up in the same order.
         waits    how often a step waits for the device, as PyTorch counts it.
         rate     a step of every method with a preset, on random pictures: images a second, the
                  largest memory, and the share of the time in which the GPU has something to do.
         data     pairs a second that the workers make.
A line that fails does not stop the others. The exit code is 1 if one failed.
"""
import argparse
import contextlib
import csv
import io
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torchvision.models import squeezenet1_1

import train
from frm import FaceRewardModel
from model import Config, Diffusion, UNet
from rewards import LPIPS, CompositeReward, parse_rewards
from settings import METHODS, method_values, resolve
from sft import EMA
from support.checkpoint import pick_device
from support.cli import run_main
from support.data import Photos, loader, spare_cores

LIMIT = 470             # ours: seconds, after which no line begins
AGREE, REPEAT = 2e-3, 1e-4      # ours: relative differences; float32 adds up to 1e-6 a sum
COMPARED = {"heldout_psnr", "heldout_ssim", "loss", "grad_norm", "reward", "gt_loss", "sft_loss",
            "loss_reward", "loss_fidelity", "frm_loss"}     # the others are near 0, or differences
TINY = "--batch_size 4 --ddim_steps 3 --faces 24 --every 2"
NETWORK = "--size 32 --channels 16 --mults 1,2"
MODES = {"sft": NETWORK, "frm": "", "lrpo": "--group 2 --rewards ssim=.5,face=.5",
         "refl": "--rewards ssim=.5,face=.5", "darl": "--group 2 --rewards face=1"}
RATES = [("small", mode, bf16, compiled) for bf16 in ("on", "off") for compiled in (False, True)
         for mode in ("sft", "lrpo", "refl", "darl") if not (compiled and mode == "refl")] + [
         ("base", mode, "on", False) for mode in ("sft", "lrpo", "refl")]
# base takes the longest, so it is last


def trained(mode: str, out: Path, models: Path, device, steps: int, *flags) -> list[dict]:
    """The rows of metrics.csv after `steps` steps of a mode in out/mode, from models/sft and
    models/frm."""
    words = f"--mode {mode} --steps {steps} --device {device} {TINY} {MODES[mode]}".split()
    words += ["--out", str(out / mode)]
    words += ["--init", str(models / "sft" / "last.pt")] * (mode != "sft")
    words += ["--frm_weights", str(models / "frm" / "last.pt")] * METHODS[mode].rewarded
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*words, *flags])
    with open(out / mode / "metrics.csv", newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell}
                for row in csv.DictReader(file)]


def difference(a: Path, b: Path) -> float:
    """The relative distance of the weights in two checkpoints."""
    x, y = (torch.cat([v.flatten().double() for v in torch.load(
        path / "last.pt", map_location="cpu", weights_only=True)["model"].values()])
        for path in (a, b))
    return ((x - y).norm() / x.norm()).item()


def agree(mode: str, root: Path, device):
    """The largest relative difference of the first two rows, and whether it is small enough."""
    torch.backends.cudnn.allow_tf32 = False
    cpu, there = (trained(mode, root / str(name), root / "cpu", name, 2, "--overwrite")
                  for name in ("cpu", device))
    torch.backends.cudnn.allow_tf32 = True
    worst = max((abs(a[name] - b[name]) / (abs(a[name]) + 1e-3), name) for a, b in zip(
        cpu[:2], there[:2]) for name in COMPARED & a.keys())
    return f"{worst[0]:.1e} ({worst[1]})", worst[0] < AGREE


def resume(mode: str, root: Path, device):
    """The difference of a resumed run, that of a repeated one, and whether both are small."""
    whole, twice, parts = (root / name for name in ("whole", "twice", "parts"))
    for out, steps in ((whole, 4), (twice, 4), (parts, 2)):
        trained(mode, out, root / "cpu", device, steps)
    trained(mode, parts, root / "cpu", device, 4, "--resume")
    resumed, repeated = (difference(whole / mode, out / mode) for out in (parts, twice))
    return (f"resumed {resumed:.1e}, repeated {repeated:.1e}",
            resumed <= max(REPEAT, 10 * repeated))


def method_of(preset: str, mode: str, device, backbone: Path, **changes):
    """(run, method, average, batch) of a preset, with random weights and pictures."""
    run, of = (resolve(name, {"preset": preset} | changes) for name in (mode, "sft"))
    net = UNet(Config(of.size, of.channels, [int(m) for m in of.mults.split(",")],
                      patch=of.patch)).to(device)
    net.bf16 = run.bf16 == "on"
    if run.compile:
        net.compile()
    weights = parse_rewards(getattr(run, "rewards", "ssim=1"))
    models = {"face": FaceRewardModel().eval().requires_grad_(False), "lpips": LPIPS(
        "squeeze", str(backbone))} if METHODS[mode].rewarded else {}
    reward = CompositeReward(weights, **{name: model.to(device) for name, model in models.items()
                                         if name in weights})
    method = METHODS[mode].make(net, Diffusion(net.config, device), reward,
                                torch.Generator().manual_seed(0), method_values(run))
    batch = [torch.rand(run.batch_size, 3, of.size, of.size, device=device) * 2 - 1
             for _ in range(2)]
    return run, method, EMA(net, 0.99), batch


def waits(mode: str, device, backbone: Path):
    """How often one step waits, and whether that is at most once."""
    if device.type != "cuda":
        return "seen on CUDA alone", None
    _, method, ema, batch = method_of("tiny", mode, device, backbone)
    method.step(batch)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        method.step(batch)
        ema.update(method.net)
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchron" in str(w.message)]
    return f"{len(places)} ({', '.join(places)})", len(places) <= 1


def busy_seconds(step) -> float:
    """The time that kernels of the GPU take in a step, by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return sum(e.device_time_total for e in profiled.events()
               if e.device_type == torch.autograd.DeviceType.CUDA) / 1e6


def rate(preset: str, mode: str, device, backbone: Path, seconds: float, sizes: dict):
    """Images a second of a method's step, its memory, and how busy the GPU is."""
    run, method, ema, batch = method_of(preset, mode, device, backbone, **sizes)
    module, times = torch.get_device_module(device), []

    def step():
        start = perf_counter()
        method.step(batch)
        ema.update(method.net)
        module.synchronize(device)
        return perf_counter() - start
    first = step()                              # compiles, and tunes convolutions
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    while sum(times) < seconds or (first < seconds and len(times) < 3):
        times.append(step())
    took = median(times)
    text = f"{run.batch_size / took:.1f} images/s, {took * 1e3:.0f} ms a step, first {first:.1f} s"
    if device.type == "cuda":
        text += (f", {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB, busy "
                 f"{busy_seconds(step) / took:.0%}")
    return text, None


def data(size: int, workers: int, device, quick: bool):
    """Pairs a second of the loop that makes batches."""
    photos, n = Photos.drawn(64, 0, size, "train"), 8 if quick else 60
    batches = iter(loader(photos, 16, 0, range(n + 4), workers, device))
    for _ in range(4):
        next(batches)
    start = perf_counter()
    for _ in range(n):
        next(batches)
    return f"{n * 16 / (perf_counter() - start):.0f} pairs/s", None


def main(argv=None):
    p = argparse.ArgumentParser(description="Verify the project on one GPU.")
    p.add_argument("--device", default="auto", help="(auto)")
    p.add_argument("--only", nargs="+", metavar="WORD", help="lines that begin with one of these")
    p.add_argument("--quick", action="store_true", help="tiny networks and a few steps")
    args = p.parse_args(argv)
    device, start, failed = pick_device(args.device), perf_counter(), 0
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{what}, torch {torch.__version__}\n\n| line | figure | |\n|---|---|---|", flush=True)
    small = dict(channels=8, batch_size=2, size=32, mults="1,2") if args.quick else {}

    with tempfile.TemporaryDirectory() as folder:
        root, backbone = Path(folder), Path(folder) / "squeeze.pt"
        torch.save(squeezenet1_1(weights=None).features.state_dict(), backbone)
        for mode in ("sft", "frm"):
            trained(mode, root / "cpu", root / "cpu", "cpu", 2)
        lines = [(f"agree {mode}", lambda m=mode: agree(m, root, device)) for mode in MODES]
        lines += [(f"resume {mode}", lambda m=mode: resume(m, root, device)) for mode in MODES]
        lines += [(f"waits {mode}", lambda m=mode: waits(m, device, backbone))
                  for mode in MODES if mode != "frm"]
        lines += [(f"data {size} px, {n} workers", lambda s=size, n=n: data(
            s, n, device, args.quick)) for size in (64, 128)[:2 - args.quick]
            for n in sorted({0, 2, spare_cores(device)})]
        for preset, mode, bf16, compiled in RATES[:4] if args.quick else RATES:
            sizes = small | dict(bf16=bf16, compile=compiled)
            lines.append((f"rate {preset} {mode}, bf16 {bf16}{', compiled' * compiled}",
                          lambda p=preset, m=mode, s=sizes: rate(
                              p, m, device, backbone, 0.2 if args.quick else 2.0, s)))
        lines = [line for line in lines if line[0].startswith(tuple(args.only or [""]))]
        for name, line in lines:
            try:
                text, ok = line() if perf_counter() - start < LIMIT else ("no time left", None)
            except Exception as error:      # of any kind: the other lines are still worth having
                text, ok = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}", False
            failed += ok is False
            verdict = {None: "", True: "passed", False: "FAILED"}[ok]
            print(f"| {name} | {text} | {verdict} |", flush=True)
    print(f"\n{failed} of {len(lines)} lines failed, after {perf_counter() - start:.0f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    run_main(main)
