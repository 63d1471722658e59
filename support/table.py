"""The markdown table of evaluate.py: means over the images, each row compared with the first."""
from support.frontier import standard_error


def means(rows: dict[str, dict]) -> dict[str, dict[str, float]]:
    """The mean over the images of every metric of every row."""
    return {label: {k: v.mean().item() for k, v in row.items()} for label, row in rows.items()}


def table(rows: dict[str, dict], base: str, names: list[str] = None, tflop: dict = None) -> str:
    """A markdown table of the means of the metrics `names` (or all), with the standard error of the
    difference to the row `base`. `tflop`: the numbers of a last column, by row."""
    names = [name for name in names or next(iter(rows.values())) if name in rows[base]]
    title = [*names, *["TFLOP"] * bool(tflop)]
    lines = ["| | " + " | ".join(title) + " |", "|---" * (len(title) + 1) + "|"]
    for label, row in rows.items():
        cells = []
        for name in names:
            error = standard_error(row[name] - rows[base][name])
            cells.append(f"{row[name].mean():.4g}" + (f" ±{error:.2g}" if error > 0 else ""))
        if tflop:
            cells.append(f"{tflop[label]:,.1f}" if tflop.get(label) else "")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
