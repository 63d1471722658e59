"""tools/claims.py: every arm is a command that train.py takes; the table is plain arithmetic."""
import json

import pytest

import settings
from tools import claims


@pytest.mark.parametrize("mode", list(claims.ARMS))
def test_every_arm_is_a_command_and_no_two_are_the_same(mode):
    seen = []
    for arm, flags in claims.ARMS[mode].items():
        method = "darl" if mode == "darl" else "lrpo"
        given = settings.parse(["--mode", method, "--minutes", "1", *flags.split()])
        seen.append(vars(settings.resolve(given.pop("mode"), given)))
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    assert len({claims.folder(arm) for arm in claims.ARMS[mode]}) == len(seen)


def test_the_table_is_mean_and_standard_deviation_of_the_change_over_seeds(tmp_path):
    names = [claims.folder(arm) for arm in (claims.LONGER + " demo", *claims.DEMO)]
    for seed, gain in ((0, .01), (1, .03)):
        rows = {name: dict.fromkeys(claims.COLUMNS, .5 + gain) for name in
                [*names, "sft, best of 8"]} | {"sft": dict.fromkeys(claims.COLUMNS, .5)}
        beyond = {name: [gain / 10, .001] for name in rows}
        (tmp_path / str(seed) / "claims_demo").mkdir(parents=True)
        (tmp_path / str(seed) / "claims_demo" / "metrics.json").write_text(
            json.dumps({"rows": rows, "beyond": {"lpips": beyond}}))
    lines = claims.as_table(claims.collect(tmp_path, "demo", [0, 1])).splitlines()
    assert len(lines) == 2 + len(names) + 1
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert cells == ["+0.0200 ±0.0141"] * len(claims.COLUMNS) + ["+0.0020 ±0.0014"]
