"""tools/arms.py: every arm is a command; runs go on; the table is plain statistics."""
import json
import statistics

import pytest

import evaluate
import settings
from support.cli import UserError
from tools import arms

SEEDS = ({"sft": [20.0, .25, .5], "a": [20.5, .5, .5]},
         {"sft": [21.0, .75, .5], "a": [22.5, .5, .5]})


def test_every_arm_is_a_command_and_no_two_are_the_same():
    seen = []
    for name, flags in arms.ARMS.items():
        given = settings.parse(["--mode", *flags.split(), "--preset", "drawn64"])
        run = settings.resolve(given.pop("mode"), given)
        settings.method_values(run)
        assert vars(run) not in seen, name
        seen.append(vars(run))


@pytest.fixture
def root(tmp_path):
    """Two seeds as evaluate.py leaves them, the second with an arm more."""
    for seed, rows in enumerate(SEEDS):
        rows = rows | ({"b": [1, 1, 1]} if seed else {})
        facts = {"ckpt": dict.fromkeys(rows), "beyond": {"lpips": {"a": [.01 * (seed + 1), .1]}},
                 "rows": {"LQ": {"psnr": 1}} | {name: dict(zip(("psnr", "r_face", "ssim"), row))
                                                | {"r_ssim": 1} for name, row in rows.items()}}
        (tmp_path / str(seed) / "evaluation").mkdir(parents=True)
        (tmp_path / str(seed) / "evaluation" / "metrics.json").write_text(json.dumps(facts))
    return tmp_path


def test_the_table_is_the_change_against_the_first_row_over_the_seeds(root, capsys):
    arms.main(["table", "--root", str(root), "--json", str(root / "t.json")])
    text = capsys.readouterr().out
    change = [22.5 - 21, 20.5 - 20]
    want = [["", "psnr ↑", "r_face ↑", "ssim ↑", "beyond, lpips ↑"], ["---"] * 5,
            ["sft", f"20.5000 ±{statistics.stdev([20, 21]):.4f}", f"0.5000 ±{.5 / 2 ** .5:.4f}",
             "0.5000", ""],
            ["a", f"{sum(change) / 2:+.4f} ±{statistics.stdev(change):.4f}",
             f"+0.0000 ±{.5 / 2 ** .5:.4f}", "+0.0000", f"+0.0150 ±{.01 / 2 ** .5:.4f}"]]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()] == want
    arms.main(["table", "--from", str(root / "t.json")])
    assert capsys.readouterr().out == text
    with pytest.raises(UserError, match="run arms first"):
        arms.main(["table", "--root", str(root / "none")])


def test_arms_that_are_done_are_left_and_those_that_were_stopped_go_on(tmp_path, monkeypatch):
    calls, home = [], tmp_path / "1"
    monkeypatch.setattr(arms, "call", lambda *words: calls.append(" ".join(map(str, words))))
    for name, file in (("sft", "last.pt"), ("offline", "done"), ("refl", "last.pt"),
                       ("darl_rl", "nothing"), ("sft_longer", "nothing")):
        (home / name).mkdir(parents=True)
        (home / name / file).touch()
    command = ["run", "sft_longer", "offline", "refl", "darl_rl", "--root", str(tmp_path),
               "--seeds", "1", "--lpips_weights", "FILE", "--frontier", "--tflop", "7",
               "--preset", "small", "--judge_weights", "ALEX"]
    arms.main(command)
    def begun(mode, arm):
        return (f"train.py --mode {mode} --seed 1 --out {home}/{arm} --init {home}/sft/last.pt "
                "--tflop 7 --preset small ")
    assert calls == [
        begun("sft", "sft_longer") + "--steps 1000000",
        begun("refl", "refl") + "--lpips_weights FILE --resume",
        begun("darl", "darl_rl") + "--lpips_weights FILE --blend 1",
        f"evaluate.py --out {home}/evaluation --rewards default --lpips_weights FILE "
        "--judge_weights ALEX --frontier "
        "--ckpt " + " ".join(f"{home}/{name}/last.pt" for name in (
            "sft", "sft_longer", "offline", "refl", "darl_rl"))]
    calls.clear()
    arms.main([*command, "--init", "X.pt"])
    assert len(calls) == 1 and "--frontier --ckpt X.pt " in calls[0]
    (home / "refl" / "done").unlink()
    arms.main([*command, "--init", "X.pt"])
    assert "--init X.pt" in calls[1] and calls[1].startswith("train.py --mode refl")
    for program, *flags in map(str.split, calls[1:]):       # both take what they are given
        evaluate.parser().parse_args(flags) if program == "evaluate.py" else settings.parse(flags)
