"""Every table of figures in README.md and docs, from the data in docs/data.

    python -m tools.tables            print the tables
    python -m tools.tables --check    fail if a table in a document differs
    python -m tools.tables --write    replace the tables in the documents

A document marks a table by the line `<!-- tools.tables NAME -->` above it. In docs/data, lrpo.json,
darl.json, demo.json and long.json are by tools/claims.py, run.json, real.json and sampler.json
hold means and errors by evaluate.py; speed.json, growth.json and count.json are by
tools/throughput.py, and symptoms.json by tools/symptoms.py. A file with a "note" holds figures as
they were printed.
"""
import argparse
import json
import re
from statistics import mean, stdev

from settings import MODES, PRESETS
from support.cli import UserError, run_main
from tools.claims import COLUMNS, ROOT, as_table, lay_out
from tools.symptoms import PANELS

DOCUMENTS = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "metrics.md", \
    ROOT / "docs" / "reference.md"
MARKED = re.compile(r"(<!-- tools\.tables (\w+) -->\n)((?:\|.*\n)*)")
JUDGED = {"psnr": "PSNR", **{name: COLUMNS[name] for name in ("ssim", "lpips", "r_face", "r_dwt")}}


def read(name: str) -> dict:
    """A file of docs/data."""
    return json.loads((ROOT / "docs" / "data" / f"{name}.json").read_text())


def short(value: float, digits: int, sign: str = "") -> str:
    """A number with so many decimals and without the zero before the point."""
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{sign}.{digits}f}")


def run() -> str:
    """The demo's table, as evaluate.py prints it."""
    return lay_out("", {name: name for name in COLUMNS}, read("run")["rows"], lambda _, *values: (
        " ±".join(f"{value:.{digits}g}" for value, digits in zip(values, (4, 2)))))


def real() -> str:
    """Real faces, every row, with the standard error of the difference to SFT."""
    def cell(key, value, *error):
        digits = 2 if key == "psnr" else 4
        return short(value, digits, "+" if key == "beyond" else "") + "".join(
            f" ±{short(e, max(3, digits))}" for e in error)
    return lay_out("", JUDGED | {"beyond": "beyond"}, read("real")["rows"], cell)


def real_three() -> str:
    """Real faces in three rows: SFT, SFT trained on, LRPO's mean and deviation over the seeds."""
    rows, digits = read("real")["rows"], {"psnr": 2, "ssim": 3, "lpips": 4}
    three = {"SFT": ["SFT, K = 5"], "SFT, trained longer by LRPO's time": ["SFT trained on"],
             "LRPO, `--fidelity_margin 0`": [name for name in rows if "margin 0," in name]}

    def cell(key, *seeds):
        text = short(mean(seeds), digits[key])
        return text if len(seeds) == 1 else f"**{text}** ±{short(stdev(seeds), digits[key])}"
    return lay_out("", {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS (lower is better)"}, {
        name: {key: [rows[one][key][0] for one in ones] for key in digits}
        for name, ones in three.items()}, cell)


def reward(title: str) -> str:
    """What damage a term detects: Spearman, fall, and a star where the fall is not monotone."""
    data = read("rewards")
    return lay_out(title, {kind: kind for kind in data["kinds"]}, data[title], lambda _, *cell: (
        f"{short(cell[0], 2, '+' if cell[0] > 0 else '')}, {short(cell[1], 3)}"
        + "*" * len(cell[2:])))


def presets() -> str:
    """What each preset sets, for all modes and then for each."""
    rows = {f"`--{key}`": {name: [p[key]] for name, p in PRESETS.items() if key in p}
            for key, value in PRESETS["base"].items() if not isinstance(value, dict)}
    rows |= {f"{mode}: steps, batch, lr, every": {
        name: [p[mode][key] for key in ("steps", "batch_size", "lr", "every")]
        for name, p in PRESETS.items()} for mode in MODES if mode in PRESETS["base"]}
    return lay_out("", {name: f"`{name}`" for name in PRESETS}, rows, lambda _, *values: (
        ", ".join(f"{v:,}" if type(v) is int else str(v) for v in values)))


TABLES = {
    "presets": presets,
    "symptoms": lambda: lay_out("run", {key: f"`{key}`" for key in PANELS}, read("symptoms"), (
        lambda key, *points: f"{points[-1][1] - points[0][1]:+.4f}" if key.startswith("heldout")
        else f"{mean(value for _, value in points[-10:]):.4g}")),
    "sampler": lambda: lay_out("", {K: K for K in read("sampler")["rows"]["eta = 0"]}, (
        read("sampler")["rows"]), lambda _, *v: f"{v[0]:.2f}, {short(v[1], 4)}"),
    "count": lambda: lay_out("", {key: key for key in read("count")["rows"]["tiny"]}, (
        read("count")["rows"]), lambda _, v: f"{v:,}" if type(v) is int else f"{v:,.2f}"),
    "growth": lambda: lay_out("", {k: k for k in ("values", "seconds", "exponent")}, (
        read("growth")["rows"]), lambda _, *v: " ".join(f"{x:g}" for x in v)),
    "run": run, "real": real, "real_three": real_three,
    "half": lambda: lay_out("", JUDGED, read("demo")["means"], lambda key, *seeds: (
        f"{mean(seeds):.{2 if key == 'psnr' else 4}f}")),
    "refl": lambda: lay_out("", read("refl")["columns"], read("refl")["rows"], lambda key, *v: (
        " ±".join(f"{x:{sign}.{2 if key == 'psnr' else 4}f}" for x, sign in zip(v, ("+", ""))))),
    "rewards_real": lambda: reward("CelebA, 64 px"),
    "rewards_drawn": lambda: reward("drawn, 32 px"),
    "speed": lambda: lay_out("", read("speed")["columns"], read("speed")["rows"], lambda _, *v: (
        "{:.2f} ({:.2f} to {:.2f})".format(*v) if len(v) == 3 else f"{v[0]:.1f}")),
    **{mode: lambda mode=mode: as_table(read(mode)["arms"]) for mode in ("demo", "lrpo", "darl")}}


def main():
    p = argparse.ArgumentParser(description="The tables of README.md and docs.")
    p.add_argument("--check", action="store_true", help="fail if one differs in a document")
    p.add_argument("--write", action="store_true", help="replace those that differ")
    args, found = p.parse_args(), set()
    if not args.check and not args.write:
        return print("\n".join(f"{name}\n\n{table()}" for name, table in TABLES.items()))
    for path in DOCUMENTS:
        text = path.read_text()
        new = MARKED.sub(lambda m: m[1] + TABLES[m[2]](), text)
        found |= {name for _, name, _ in MARKED.findall(text)}
        if new != text and args.check:
            raise UserError(f"{path.name}: a table is not that of docs/data; --write replaces it")
        if new != text:
            path.write_text(new)
    if missing := TABLES.keys() - found:
        raise UserError(f"{', '.join(sorted(missing))}: no document has the mark of this table")


if __name__ == "__main__":
    run_main(main)
