"""Long trials of what the programs promise: nothing is lost, and nothing foreign gets in.

    python -m tools.trials kills [--n 40]   SIGKILL, SIGTERM, SIGINT at random moments, five modes
    python -m tools.trials demo [--n 10]    the same for the demo
    python -m tools.trials disk             a disk that is full, at 12 sizes (Linux, as root)
    python -m tools.trials hostile          checkpoints that are foreign, damaged, or run code

Each trial uses tiny networks and a temporary folder, and ends with one line of figures. It fails
with an AssertionError where a promise is broken: a killed run goes on and ends as the run that
nobody stopped, bit for bit; no program prints a trace; no file executes code.
"""
import argparse
import contextlib
import io
import json
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

import evaluate
import frm
import sample
import train
from support.cli import UserError, run_main, whole

ROOT = Path(__file__).parents[1]
SMALL = ("--size 16 --channels 8 --mults 1,2 --batch_size 4 --device cpu --ddim_steps 3 --faces 24 "
         "--every 1").split()
STOPS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}       # and the exit codes
DISK_SIZES = (8, 200, 700, 900, 1100, 1400, 1700, 1900, 2200, 2500, 2800, 3300)     # kB
BAD = [None, 0, -1, "x", [], {}, float("nan"), torch.zeros(2), True, 10 ** 12]


def start(mode: str, out, *flags) -> subprocess.Popen:
    """A run in a process of its own."""
    return subprocess.Popen([sys.executable, "train.py", "--mode", mode, "--out", str(out), *SMALL,
                             *flags], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def finish(run: subprocess.Popen, codes=(0,)) -> int:
    """Wait for its end. Raises AssertionError for a trace, or another exit code than these."""
    text = run.communicate()[0]
    # A signal in the first seconds, while Python still imports, is not ours to handle.
    assert "Traceback" not in text or "KeyboardInterrupt" in text, text
    assert run.returncode in codes, (run.returncode, text)
    return run.returncode


def same(a, b) -> bool:
    """Whether two checkpoints hold the same values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def result(folder: Path):
    """All that a run leaves, but for the arguments and the seconds."""
    states = [torch.load(folder / f"{name}.pt", weights_only=True) | {"args": None}
              for name in ("last", "best")]
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [*states, [row[:1] + row[2:] for row in rows], sorted(p.name for p in folder.glob("*"))]


def kills(root: Path, n: int):
    """Kill runs at random moments, let them go on, compare the end."""
    rng, models = random.Random(0), ["--init", root / "sft/last.pt"]
    finish(start("sft", root / "sft", "--steps", "6"))
    finish(start("frm", root / "frm", "--steps", "6", *map(str, models)))
    models += ["--frm_weights", root / "frm/last.pt", "--rewards", "ssim=.5,face=.5"]
    flags = {"sft": [], "frm": models[:2], "refl": models,
             "lrpo": [*models, "--group", 2], "darl": [*models, "--group", 2]}
    wanted, seconds, done, i = {}, {}, {s: 0 for s in STOPS}, 0
    while sum(done.values()) < n:
        mode = list(flags)[i % len(flags)]
        more, out = ["--steps", "6", *map(str, flags[mode])], root / f"{mode}_{i}"
        if mode not in wanted:
            clock = time.perf_counter()
            finish(start(mode, root / mode / "whole", *more))
            seconds[mode] = time.perf_counter() - clock
            wanted[mode] = result(root / mode / "whole")
        for attempt in range(9):
            go_on = "--resume" if (out / "last.pt").exists() else "--overwrite"
            run, stop = start(mode, out, *more, go_on), rng.choice(list(STOPS))
            if attempt < 2:
                try:
                    run.wait(seconds[mode] * rng.uniform(.5, 1))
                except subprocess.TimeoutExpired:
                    run.send_signal(stop)
                    done[stop] += 1
            if finish(run, (0, *STOPS.values(), -stop)) == 0:
                break
        assert same(result(out), wanted[mode]), out
        i += 1
    print(f"kills: {', '.join(f'{k} {stop.name}' for stop, k in done.items())} in {i} runs of five "
          "modes; all equal to the runs that nobody stopped, no row lost, no file left over")


def demo(root: Path, n: int):
    """Kill the demo at random moments; the table must be that of the whole demo."""
    def rows(out):      # the last row of the table is trained for a time on the clock
        found = json.loads((out / "evaluation" / "metrics.json").read_text())["rows"]
        return {name: row for name, row in found.items() if name != "sft_longer"}
    more, rng, done = ["--steps", "5", "--rewards", "offline"], random.Random(0), 0
    clock = time.perf_counter()
    finish(start("demo", root / "whole", *more))
    seconds = time.perf_counter() - clock
    while done < n:
        out = root / f"after_{done}"
        for attempt in range(9):
            go_on = ["--resume"] if out.exists() else []
            run, stop = start("demo", out, *more, *go_on), rng.choice(list(STOPS))
            if attempt < 3:
                try:
                    run.wait(seconds * rng.uniform(.3, .9))
                except subprocess.TimeoutExpired:
                    run.send_signal(stop)
                    done += 1
            if finish(run, (0, *STOPS.values(), -stop)) == 0:
                break
        assert rows(out) == rows(root / "whole"), out
    print(f"demo: killed {done} times; every table is that of the demo that nobody stopped")


def disk(root: Path, n: int):
    """Run on a small disk until it is full, enlarge it, go on."""
    finish(start("sft", root / "whole", "--steps", "8"))
    small, said = root / "small", set()
    small.mkdir()
    for kilobytes in DISK_SIZES:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", small],
                       check=True)
        try:
            run = start("sft", small / "sft", "--steps", "8")
            said.add(finish(run, (0, 1)))
            assert not [*small.glob("sft/*.part"), *small.glob("sft/trial")]
            subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
            last = small / "sft/last.pt"
            finish(start("sft", small / "sft", "--steps", "8",
                         "--resume" if last.exists() else "--overwrite"))
            assert same(result(small / "sft")[0], result(root / "whole")[0]), kilobytes
        finally:
            subprocess.run(["umount", small], check=True)
    print(f"disk: {len(DISK_SIZES)} sizes, exit codes {said}; each run went on to the same end")


class Evil:
    """Runs code when it is unpickled carelessly."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self):
        return Path.touch, (self.sign,)


def hostile_files(root: Path, base: dict[str, dict]):
    """Yields (mode or None, function that writes the file): every kind of bad checkpoint."""
    rng, evil = random.Random(0), Evil(root / "EXECUTED")
    for protocol in (0, 2, 4):
        yield None, lambda p: p.write_bytes(pickle.dumps(evil, protocol=protocol))
    yield None, lambda p: torch.save({"x": evil}, p)
    yield None, lambda p: torch.save(evil, p, _use_new_zipfile_serialization=False)
    yield "sft", lambda p: torch.save(base["sft"] | {"method": {"x": evil}}, p)

    def bomb(p):        # 256 MB of zeros in a small file
        with zipfile.ZipFile(p, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("archive/data.pkl", pickle.dumps({"a": 1}, 2))
            z.writestr("archive/data/0", bytes(1 << 28))
    yield None, bomb
    for mode, state in base.items():
        for k in state:
            yield mode, lambda p: torch.save({a: b for a, b in state.items() if a != k}, p)
            for v in rng.sample(BAD, 3):
                yield mode, lambda p: torch.save(state | {k: v}, p)
        for part in ("args", "config", "model", "ema"):
            for k in rng.sample(list(state[part]), min(12, len(state[part]))):
                yield mode, lambda p: torch.save(
                    state | {part: state[part] | {k: rng.choice(BAD)}}, p)
        raw = (root / mode / "last.pt").read_bytes()
        for length in (0, 1, 100, len(raw) // 2, len(raw) - 1):
            yield mode, lambda p: p.write_bytes(raw[:length])
        for flips in (1, 20, 2000) * 5:
            broken = bytearray(raw)
            for _ in range(flips):
                broken[rng.randrange(len(raw))] = rng.randrange(256)
            yield mode, lambda p: p.write_bytes(broken)


def hostile(root: Path, n: int):
    """Give each bad checkpoint to every program that reads one."""
    for mode in ("sft", "frm", "lrpo"):
        flags = [] if mode == "sft" else ["--init", str(root / "sft/last.pt")]
        finish(start(mode, root / mode, "--steps", "3", *flags,
                     *(["--rewards", "ssim=1"] if mode == "lrpo" else [])))
    base = {mode: torch.load(root / mode / "last.pt", weights_only=True)
            for mode in ("sft", "frm", "lrpo")}
    photo, bad, files, uses = root / "photo.png", root / "resumed/bad/last.pt", 0, 0
    evaluate.sheet([torch.zeros(1, 3, 20, 20)]).save(photo)
    score = ["--n", "2", "--rewards", "ssim=1", "--out", str(root / "table")]
    for mode, write in hostile_files(root, base):
        shutil.rmtree(root / "resumed", ignore_errors=True)
        bad.parent.mkdir(parents=True)
        write(bad)
        files += 1
        programs = [
            lambda: evaluate.compare(evaluate.parser().parse_args(["--ckpt", str(bad), *score])),
            lambda: sample.main(sample.parser().parse_args(
                ["--ckpt", str(bad), "--input", str(photo), "--output", str(root / "restored"),
                 "--overwrite"])),
            lambda: frm.load_face_reward(bad),
            lambda: train.main(["--mode", mode or "sft", "--out", str(bad.parent), *SMALL,
                                "--steps", "4", "--resume", "--init", str(root / "sft/last.pt")])]
        for program in programs:
            uses += 1
            with contextlib.suppress(UserError), contextlib.redirect_stdout(io.StringIO()), \
                    contextlib.redirect_stderr(io.StringIO()):
                program()
    assert not (root / "EXECUTED").exists()
    print(f"hostile: {files} files, {uses} uses, no trace, no code executed")


def main():
    p = argparse.ArgumentParser(description="Long trials of what the programs promise.")
    p.add_argument("trial", choices=["kills", "demo", "disk", "hostile"])
    p.add_argument("--n", type=whole, default=40, help="how many kills (40)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"kills": kills, "demo": demo, "disk": disk, "hostile": hostile}[args.trial](
            Path(folder), args.n)


if __name__ == "__main__":
    run_main(main)
