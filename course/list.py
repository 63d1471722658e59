"""The exercises of the course, as exercises.ini has them: text for teachers and students to edit.

`python -m course` has the commands. What every check of an exercise looks at besides its values
(`gradient`, `random`, `results`, `float64`) is declared there, and looked at by `Call` in
tests/exercise_checks.py.
"""
from configparser import ConfigParser
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass
class Exercise:
    """One exercise: the body of one function. exercises.ini says what each field is."""
    name: str           # on the command line; its check is check_NAME
    set: str            # diffusion, policy or rewards
    place: str
    minutes: int
    teaches: str
    task: str           # one sentence
    hint_1: str
    hint_2: str
    experiment: str     # a command for the finished code
    question: str       # what to look at in its result
    gradient: tuple
    random: bool
    results: int
    float64: bool

    @property
    def file(self) -> str:
        """The file that the function stands in."""
        return self.place.split(".")[0] + ".py"

    @property
    def points(self) -> int:
        """One for each five minutes."""
        return self.minutes // 5


FROM_TEXT = {str: lambda text: " ".join(text.split()), tuple: lambda text: tuple(text.split()),
             int: int, bool: "yes".__eq__}


def read(path: Path) -> list[Exercise]:
    """The exercises of a file, in its order."""
    found = ConfigParser(delimiters="=")
    found.read_string(path.read_text(encoding="utf-8"))
    return [Exercise(name, *(FROM_TEXT[f.type](found[name][f.name]) for f in fields(Exercise)[1:]))
            for name in found.sections()]


EXERCISES = read(Path(__file__).with_name("exercises.ini"))
