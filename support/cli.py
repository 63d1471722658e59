"""What all programs share on the command line: mistakes of the user, numbers, settings as flags."""
import argparse
import csv
import errno
import io
import math
import os
import re
import signal
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import monotonic


class UserError(ValueError):
    """A mistake of the user (a bad path, file or flag). The program prints it as one sentence,
    without a trace. Every other error is a bug and keeps its trace."""


def run_main(main):
    """Run a program. A UserError ends it with its sentence and exit code 1, and so do a disk that
    cannot be written to and a memory that is too small."""
    if hasattr(sys.stdout, "reconfigure"):          # a notebook's has no encoding
        sys.stdout.reconfigure(errors="replace")    # one that lacks "±" shows "?"
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except NotImplementedError as error:
        if not str(error).startswith("exercise "):     # of a student, see course/
            raise
        sys.exit(f"error: {error}")
    except BrokenPipeError:         # as in: sample.py ... | head
        os._exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            sys.exit("error: --compile: no compiler works on this machine; leave it out")
        if isinstance(error, RuntimeError) and not lacks_memory(error):
            raise
        amount = re.search(r"[Tt]r\w+ to allocate ([\d.]+ ?\w+)", str(error))
        wanted = f" ({amount[1]} more was wanted)" if amount else ""
        sys.exit(f"error: the memory is too small{wanted}; try --bf16 on, a smaller --batch_size, "
                 "--size or photo")
    except KeyboardInterrupt:
        sys.exit(130)


def lacks_memory(error: RuntimeError) -> bool:
    """Whether torch says by this error that the memory of the CPU or GPU is full."""
    return any(text in str(error) for text in ("allocate", "out of memory", "ALLOC_FAILED"))


def read_table(path) -> tuple[list[dict], list[str]]:
    """The rows and column names of a CSV file, also as a spreadsheet saves it: with semicolons, a
    mark at its start and any line ends. Raises OSError, UnicodeDecodeError or csv.Error."""
    text = Path(path).read_text(encoding="utf-8-sig")
    table = csv.DictReader(io.StringIO(text), restkey="", restval="", strict=True,
                           delimiter=";" if ";" in text.partition("\n")[0] else ",")
    return list(table), table.fieldnames or []


class StopSignal:
    """Notes Ctrl-C and SIGTERM, so that a run can finish its step and save. Another one more than a
    second later stops the program at once (torchrun and its caller may both send the first).
    `number` is that of the signal, or 0."""

    def __enter__(self):
        self.number, self.time = 0, math.inf
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, _):
        """Called at the signal."""
        if monotonic() - self.time > 1:
            self.__exit__()
            signal.raise_signal(number)
        self.number, self.time = number, min(self.time, monotonic())

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def is_blocked(folder) -> bool:
    """Whether a file stands where this folder, or one above it, would be."""
    return any(path.is_file() for path in (Path(folder), *Path(folder).parents))


def make_folder(path, flag: str = "--out") -> Path:
    """The folder `path`, created if needed. Raises UserError if that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: not a folder to write to ({error.strerror})") from None
    return Path(path)


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of this kind (int or float) from low to high."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            name = "whole number" if kind is int else "number"
            limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name} {limits}")
        return value
    return parse


positive, at_least_two, whole = number(int, 1), number(int, 2), number(int, 0)
amount, share = number(float, 0), number(float, 0, 1)
policy_eta = number(float, 0.1, 1)      # ours: as eta goes to 0 the likelihood of a step explodes
seed_number = number(int, 0, 2 ** 32 - 2)       # 2^32 - 1 is the seed of the held-out degradations


def one_of(*words: str, otherwise):
    """An argparse type: one of these words, or what the type `otherwise` takes."""
    def parse(text: str):
        try:
            return text if text in words else otherwise(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, nor {' or '.join(words)}") from None
    return parse


def not_empty(text: str) -> str:
    """An argparse type: any text but an empty one, which a shell makes of an unset variable."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def multiples(text: str) -> str:
    """An argparse type: whole numbers of 1 or more, with commas between them."""
    return ",".join(str(positive(item)) for item in text.split(","))


def setting(default, paper, meaning: str, **more):
    """A field of a settings dataclass: its default, the published value and a line for --help.
    `more`: choices, or type, an argparse type other than the one that TYPES has for the field."""
    return field(default=default, metadata={"paper": paper, "meaning": meaning, **more})


TYPES = {int: positive, float: amount, str: not_empty}


def settings_fields(dataclass) -> dict:
    """The fields of a settings dataclass that can be set, by name."""
    return {f.name: f for f in fields(dataclass) if f.init}


def add_flags(p: argparse.ArgumentParser, known: dict, by_preset=frozenset(), published=False,
              only_given=False):
    """One flag for each field in `known`. A preset may replace the defaults of those in
    `by_preset`. `published`: the help names the paper's values. `only_given`: a flag that is not on
    the command line is left out of the parsed result."""
    for name, f in known.items():
        default = argparse.SUPPRESS if only_given else f.default
        if f.type is bool:
            p.add_argument(f"--{name}", action="store_true", default=default,
                           help=f.metadata["meaning"])
            continue
        text = f.metadata["meaning"]
        if f.default is not None:
            text += f"; default: {f.default}" + (", or by preset" if name in by_preset else "")
        if published and f.metadata["paper"] is not None:
            text += f"; paper: {f.metadata['paper']}"
        p.add_argument(f"--{name}", default=default, choices=f.metadata.get("choices"), help=text,
                       type=f.metadata.get("type") or TYPES[f.type])


@dataclass
class RewardFiles:
    """Where a reward's models are, for every program that scores pictures."""
    frm_weights: str = setting(None, None, "face reward model; left out: frm/last.pt beside the "
                               "run")
    lpips_net: str = setting("squeeze", "vgg", "backbone of LPIPS",
                             choices=["squeeze", "alex", "vgg"])
    lpips_weights: str = setting(None, None, "file of the LPIPS backbone; left out: fetched")
    clip_weights: str = setting(None, None, "file of CLIP RN50; left out: fetched")


@dataclass
class ModelSettings(RewardFiles):
    """The same and the device."""
    device: str = setting("auto", None, "auto, cpu or cuda")
