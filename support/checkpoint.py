"""Checkpoints: one file of plain types, which cannot run code when it is read.

A checkpoint holds all that a run needs to go on exactly: the network and its average, the
optimiser, the method's own state, the state of the random generator, the step and the arguments.
The data need no state: batch n depends on the seed and n alone.
"""
import os
from pathlib import Path

import torch

from support.cli import UserError, is_blocked

# What may differ when a run goes on. Everything else would make it another run.
FREE_ON_RESUME = {"steps", "minutes", "every", "out", "device", "resume", "overwrite",
                  "workers", "lpips_weights", "clip_weights"}


def load_tensors(path, flag: str, remedy: str = "") -> dict:
    """Read a file of plain types. Raises UserError, with flag and remedy, if it is missing or
    damaged."""
    remedy = remedy and f"; {remedy}"
    if not Path(path).is_file():
        what = "a folder, not the last.pt in it" if Path(path).is_dir() else "no such file"
        raise UserError(f"{flag} {path}: {what}{remedy}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # torch raises many kinds, and each means the same to the user
        raise UserError(f"{flag} {path}: not a PyTorch file of plain tensors, or a damaged one "
                        f"({type(error).__name__}){remedy}") from None


def save(path, state: dict):
    """Write to a temporary name, then rename: a killed run never leaves half a checkpoint."""
    part = f"{path}.part"
    torch.save(state, part)
    os.replace(part, path)


def run_state(args: dict, method, ema, generator, step: int, best: float) -> dict:
    """The checkpoint after `step` steps. Restoring a photo needs only `config` and `ema`."""
    config = vars(method.net.config) if hasattr(method.net, "config") else {}
    return {"mode": args["mode"], "step": step, "best": best, "args": args, "config": config,
            "model": method.net.state_dict(), "ema": ema.net.state_dict(),
            "ema_updates": ema.updates, "optimizer": method.optimizer.state_dict(),
            "method": method.state_dict() if hasattr(method, "state_dict") else {},
            "generator": generator.get_state()}


def restore_run(saved: dict, method, ema, generator) -> tuple[int, float]:
    """Undo `run_state`: everything as it was. Returns the next step and the best score so far."""
    method.net.load_state_dict(saved["model"])
    ema.net.load_state_dict(saved["ema"])
    ema.updates = saved["ema_updates"]
    method.optimizer.load_state_dict(saved["optimizer"])
    if saved["method"]:
        method.load_state_dict(saved["method"])
    generator.set_state(saved["generator"])
    return saved["step"], saved["best"]


def check_folder(run):
    """Raises UserError where the run would lose an older one, or has nothing to resume."""
    last = Path(run.out) / "last.pt"
    if is_blocked(run.out):
        raise UserError(f"--out {run.out}: is a file, or below one; name a folder")
    if run.resume and not last.exists():
        raise UserError(f"--resume: there is no {last} to go on from")
    if last.exists() and not run.resume and not run.overwrite:
        raise UserError(f"--out {run.out}: holds a run already; --resume it, --overwrite it, "
                        "or name another --out")


def check_resume(saved: dict, run):
    """Raises UserError where a run that goes on has other settings, or no step left to take."""
    was, now = saved["args"], vars(run)
    for name in sorted({*was, *now} - FREE_ON_RESUME):
        if was.get(name) != now.get(name):
            raise UserError(f"--resume: {run.out} was run with --{name} {was.get(name)}, "
                            f"not {now.get(name)}")
    if saved["step"] >= run.steps:
        raise UserError(f"--resume: {run.out} has done {saved['step']} steps; give more --steps")


def pick_device(name: str) -> torch.device:
    """The device; "auto" is a CUDA GPU if there is one. Raises UserError if it does not exist
    here."""
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" \
            else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name}: no such device here; --device cpu works") from None
    return device
