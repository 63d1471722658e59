"""tools/trials.py: the long trials can tell what is broken. They themselves take too long here."""
import pickle
from pathlib import Path

import torch

from tools import trials


def test_a_difference_of_one_bit_or_row_is_seen():
    a = [{"x": torch.tensor([1.0, 2.0]), "step": 3}, [["1", "24.0"]], ["last.pt"]]
    bit = torch.tensor([1.0, torch.nextafter(torch.tensor(2.0), torch.tensor(3.0))])
    assert trials.same(a, [{"x": torch.tensor([1.0, 2.0]), "step": 3}, *a[1:]])
    for b in ([{"x": bit, "step": 3}, *a[1:]], [a[0], [], a[2]], [a[0], a[1], ["last.pt", "x"]],
              [{"x": a[0]["x"]}, *a[1:]]):
        assert not trials.same(a, b)


def test_the_hostile_files_are_many_and_would_run_code(tmp_path):
    for mode in ("sft", "frm"):
        (tmp_path / mode).mkdir()
        (tmp_path / mode / "last.pt").write_bytes(bytes(3000))
    base = {mode: {"args": {"size": 1}, "config": {}, "model": {"w": 0}, "ema": {"w": 0}}
            for mode in ("sft", "frm")}
    written = []
    for mode, write in trials.hostile_files(tmp_path, base):
        path = tmp_path / f"{len(written)}.pt"
        write(path)
        written.append(path)
    assert len(written) > 80 and not (tmp_path / "EXECUTED").exists()
    pickle.loads(Path(written[0]).read_bytes())     # the careless way of reading
    assert (tmp_path / "EXECUTED").exists()
