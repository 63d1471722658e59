"""Checkpoints: one file of plain types, which cannot run code when it is read.

A checkpoint holds all that a run needs to go on exactly: the network and its average, the
optimiser, the method's own state, the state of the random generator, the step and the arguments.
The data need no state: batch n depends on the seed and n alone. What identifies the photos of a
folder is kept, so that a run does not go on with others.
"""
import hashlib
import os
import secrets
from contextlib import contextmanager
from pathlib import Path

import torch

from support.cli import UserError, is_blocked, lacks_memory
from support.distributed import place

try:
    import fcntl
except ImportError:         # Windows
    import msvcrt
    fcntl = None

VERSION = 2     # of a checkpoint's fields
FIELDS = dict(mode=str, args=dict, step=int, best=float, finished=bool, frm=(str, type(None)),
              config=dict, model=dict, ema=dict, ema_updates=int, optimizer=dict, method=dict,
              generator=torch.Tensor)
ARGUMENTS = dict(data=(str, type(None)), ddim_steps=int, faces=int, seed=int, size=int, steps=int)
# those that a program reads from a checkpoint
PLACES = ("init", "frm_weights")        # arguments that name a file
# What may differ when a run goes on. Everything else would make it another run.
FREE_ON_RESUME = {"steps", "tflop", "every", "out", "device", "resume", "overwrite",
                  "workers", "lpips_weights", "clip_weights"}


def load_tensors(path, flag: str, remedy: str = "") -> dict:
    """Read a file of plain types. Raises UserError, with flag and remedy, if it is missing or
    damaged."""
    remedy = remedy and f"; {remedy}"
    if not Path(path).is_file():
        what = "a folder; name the file in it" if Path(path).is_dir() else "no such file"
        raise UserError(f"{flag} {path}: {what}{remedy}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # torch raises many kinds, and each means the same to the user
        raise UserError(f"{flag} {path}: not a PyTorch file of plain tensors, or a damaged one "
                        f"({type(error).__name__}){remedy}") from None


@contextmanager
def replacing(path):
    """A temporary path to write to, which is then renamed to `path`: a killed program never leaves
    half a file. Raises UserError if it cannot be written; an older file at `path` stays whole."""
    part = Path(path).with_name(f".{secrets.token_hex(4)}.part")    # of this call alone, and short
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # torch.save tells of a full disk by the latter
        reason = getattr(error, "strerror", None) or "the disk is full, or not writable"
        raise UserError(f"{path}: cannot be written ({reason}); what was there before is whole") \
            from None
    finally:
        part.unlink(missing_ok=True)


def save(path, state: dict):
    """Write a checkpoint. Raises UserError if that is not possible."""
    with replacing(path) as part, open(part, "wb") as file:     # a path's name would be in the file
        torch.save(state, file)


@contextmanager
def locked(folder: Path):
    """Lets one run at a time write to `folder`, and removes what a killed one left half written.
    The system frees the lock when the run ends, in any way. Raises UserError if another holds it.
    """
    with open(folder / ".lock", "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:        # some shared disks have no locks
            raise UserError(f"--out {folder}: another run is writing to it, or its disk has no "
                            f"locks ({error.strerror}); name another --out") from None
        for part in folder.glob(".????????.part"):
            part.unlink()
        yield


def digest(path) -> str | None:
    """What tells a file from any other, or None if there is no file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None


def run_state(args: dict, method, ema, generator, step: int, best: float, finished: bool,
              frm: str | None, tflop: float = 0.0, photos: dict | None = None) -> dict:
    """The checkpoint after `step` steps. Restoring a photo needs only `config` and `ema`. `frm` is
    the digest of the face reward model that the run uses, `photos` that of the photos of --data."""
    config = vars(method.net.config) if hasattr(method.net, "config") else {}
    return {"version": VERSION, "mode": args["mode"], "step": step, "best": best, "args": args,
            "finished": finished, "frm": frm, "tflop": tflop, "photos": photos, "config": config,
            "model": method.net.state_dict(), "ema": ema.net.state_dict(),
            "ema_updates": ema.updates, "optimizer": method.optimizer.state_dict(),
            "method": method.state_dict() if hasattr(method, "state_dict") else {},
            "generator": generator.get_state()}


def load_run(path, flag: str, remedy: str = "") -> dict:
    """A checkpoint of train.py. Raises UserError if the file is missing, damaged, of another
    program, or of another version of this one."""
    state = load_tensors(path, flag, remedy)
    if not isinstance(state, dict) or "mode" not in state or "args" not in state:
        raise UserError(f"{flag} {path}: not a checkpoint of train.py; {remedy or 'name another'}")
    if type(state.get("version")) is not int or state["version"] != VERSION:
        raise UserError(f"{flag} {path}: from another version of this program; train it again")
    if not fits(state, FIELDS) or not fits(state["args"], ARGUMENTS) or state["step"] < 0:
        raise UserError(f"{flag} {path}: a damaged checkpoint; train it again")
    return state


def fits(values: dict, kinds: dict) -> bool:
    """Whether `values` has every name in `kinds`, with a value of that kind."""
    return all(name in values and isinstance(values[name], kind) for name, kind in kinds.items())


def check_finished(state: dict, path, flag: str):
    """Raises UserError if the run of a checkpoint was stopped before its end."""
    if not state["finished"]:
        raise UserError(f"{flag} {path}: its run stopped at step {state['step']} of "
                        f"{state['args']['steps']}; finish it with train.py --mode {state['mode']} "
                        "--resume and the flags of before")


def restore_run(saved: dict, method, ema, generator) -> tuple[int, float]:
    """Undo `run_state`: everything as it was. Returns the next step and the best score so far.
    Raises UserError if the state does not fit."""
    try:
        method.net.load_state_dict(saved["model"])
        ema.net.load_state_dict(saved["ema"])
        ema.updates = saved["ema_updates"]
        method.optimizer.load_state_dict(saved["optimizer"])
        if saved["method"]:
            method.load_state_dict(saved["method"])
        generator.set_state(saved["generator"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--resume: the checkpoint does not fit this run ({reason})") from None
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
    init, frm_weights = (getattr(run, name, None) for name in ("init", "frm_weights"))
    if init:
        load_tensors(init, "--init")        # now, and not after a download
    sft = Path(run.out).parent / "sft" / "last.pt"
    for source in (init or (None if run.mode == "sft" else sft), frm_weights):
        if source and Path(source).resolve() == last.resolve():
            raise UserError(f"--out {run.out}: the run starts from the model in it, and would "
                            "replace it; name another --out")


def check_resume(saved: dict, run, frm: str | None):
    """Raises UserError where a run that goes on has other settings or another reward model."""
    was, now = saved["args"], vars(run)
    for name in sorted({*was, *now} - FREE_ON_RESUME):
        a, b = was.get(name), now.get(name)
        if name in PLACES and a and b:
            a, b = Path(str(a)).resolve(), Path(b).resolve()
        if repr(a) != repr(b) and not (name == "data" and a and b):     # that is for check_photos
            raise UserError(f"--resume: {run.out} was run with --{name} {a}, not {b}")
    if saved["frm"] != frm:
        raise UserError(f"--resume: the face reward model is not the one that {run.out} began with")


def check_photos(saved: dict | None, run, photos: dict | None):
    """Raises UserError where --data no longer holds the photos that a run began with: it changed,
    or is another folder. A moved one is the same. `photos` is that of `Photos.digest`; `saved` is
    None for a run that begins."""
    was = (saved or {}).get("photos") or photos     # an earlier checkpoint has none
    for name, now in (photos or {}).items():
        if was[name] != now:
            what = f"{was[name]} photos then, {now} now" if name == "number" else f"other {name}"
            raise UserError(f"--resume: --data {Path(run.data).resolve()} does not hold the "
                            f"training photos that {run.out} began with ({what})")


def pick_device(name: str) -> torch.device:
    """The device; "auto" is a CUDA GPU if there is one, under torchrun one for each rank. Raises
    UserError if it does not exist here, or is full."""
    if ":" in name and place()[1] > 1:
        raise UserError(f"--device {name}: torchrun gives each rank a GPU; write cuda")
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))     # torchrun: one each
        device = torch.device(name)
        torch.zeros(1, device=device).item()        # the device "meta" has no values
    except (RuntimeError, AssertionError, ImportError) as error:
        what = (f"its memory is full ({str(error).splitlines()[0]})" if lacks_memory(error)
                else "no such device here")
        raise UserError(f"--device {name}: {what}; --device cpu works") from None
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16. A GPU without it (T4, V100) takes float32, and a line
    says so: float16 would need its loss scaled."""
    missing = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if missing:
        print("--bf16 on: this GPU has no bfloat16; the network computes in float32")
    return not missing
