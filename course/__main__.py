"""The commands of the course.

    python -m course list                       the exercises, in order
    python -m course hint NAME N                the first or the second hint
    python -m course check [HANDIN] [--only NAME ...] [--json FILE] [--limit SECONDS]
    python -m course submit ASSIGNMENT          pack what it asks for
    python -m course make DIR                   a student's copy: the code of the exercises is out
    python -m course autograder OUT.zip         the bundle for Gradescope
    python -m course score CKPT                 an entry of the open assignment
    python -m course leaderboard ENTRY.json ... the table of the entries

Run them in the folder of the project or of the copy. `check` runs every exercise by itself: no
check needs the solution of another exercise.
"""
import argparse

from course import copies, grade
from course.list import EXERCISES
from support.cli import at_least_two, not_empty, positive, run_main, seed_number

SETS = list(dict.fromkeys(e.set for e in EXERCISES))
SCORE_SEED = 1_000_003      # of the new faces, unless the instructor chooses another
LIMIT = 60                  # seconds for one check, which takes two or three


def show(args):
    """Print the exercises of each set: points, what it teaches, the experiment."""
    for kind in SETS:
        chosen = [e for e in EXERCISES if e.set == kind]
        grade.say(f"\n{kind}: {len(chosen)} exercises, {sum(e.points for e in chosen)} points, "
                  f"{sum(e.minutes for e in chosen)} minutes")
        for e in chosen:
            grade.say(f"  {e.name}, {e.points} points, {e.file}: {e.teaches}\n      {e.task}\n"
                      f"      Then try: {e.experiment}\n      {e.question}")
    grade.say("\nAfter a training run: python evaluate.py --frontier --ckpt pretrained/faces64.pt "
              "runs/demo/NAME/last.pt")


def hint(args):
    """Print one hint."""
    print(getattr(copies.named([args.name])[0], f"hint_{args.number}"))


def board(command: str):
    """A command of course/board.py, which is slow to import."""
    def run(args):
        from course import board
        getattr(board, command)(args)
    return run


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    p = argparse.ArgumentParser(prog="python -m course", description="The course.")
    commands = p.add_subparsers(required=True, metavar="COMMAND")

    def command(run, name, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def choice(sub):
        sub.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these exercises")
        sub.add_argument("--limit", type=positive, default=LIMIT,
                         help=f"seconds for each check ({LIMIT})")
    command(show, "list", "list the exercises")
    sub = command(hint, "hint", "print a hint")
    sub.add_argument("name", help="of the exercise")
    sub.add_argument("number", type=int, choices=[1, 2], help="1, then 2")
    sub = command(grade.check, "check", "check the exercises")
    sub.add_argument("handin", nargs="?", default=str(copies.ROOT),
                     help="a folder or a zip; left out: this folder")
    sub.add_argument("--json", type=not_empty, help="a file for an autograder")
    choice(sub)
    sub = command(copies.submit, "submit", "pack what an assignment asks for")
    sub.add_argument("assignment", choices=[*SETS, "open"])
    sub.add_argument("--out", type=not_empty, help="the zip (ASSIGNMENT.zip)")
    command(copies.make, "make", "write a student's copy").add_argument("dir", help="a new folder")
    sub = command(copies.autograder, "autograder", "write the bundle for Gradescope")
    sub.add_argument("out", type=not_empty, help="the zip")
    sub.add_argument("--set", choices=SETS, help="the exercises of one assignment; left out: all")
    choice(sub)
    sub = command(board("score"), "score", "score a checkpoint of the open assignment")
    sub.add_argument("ckpt", help="the checkpoint")
    sub.add_argument("--sft", type=not_empty, default=str(copies.ROOT / "pretrained/faces64.pt"),
                     help="the restorer that all start from; left out: pretrained/faces64.pt")
    sub.add_argument("--name", type=not_empty, default="anonymous", help="what the table calls it")
    sub.add_argument("--json", type=not_empty, help="the entry; left out: entry.json beside CKPT")
    sub.add_argument("--seed", type=seed_number, default=SCORE_SEED,
                     help=f"of the faces and the sampler's noise ({SCORE_SEED})")
    sub.add_argument("--n", type=at_least_two, default=200, help="how many faces (200)")
    sub.add_argument("--judge_weights", type=not_empty, help="as for evaluate.py")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub = command(board("leaderboard"), "leaderboard", "print the table of the entries")
    sub.add_argument("entries", nargs="+", metavar="ENTRY.json")
    return p


def main():
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    run_main(main)
