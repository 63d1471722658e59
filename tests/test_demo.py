"""The demo on tiny networks: what it trains, shows and says, and twice the same."""
import json
import warnings

import lpips
import pytest
import torch

import evaluate
import settings
import train
from common import log_of, small_presets

TINY = ["--mode", "demo", "--batch_size", "4", "--device", "cpu", "--ddim_steps", "3",
        "--every", "1000"]


@pytest.fixture(scope="module")
def squeeze(tmp_path_factory):
    """A file of a random squeezenet's features."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).net
    path = tmp_path_factory.mktemp("squeeze") / "squeeze.pth"
    torch.save({k.split(".", 1)[1]: v for k, v in net.state_dict().items()}, path)
    return str(path)


@pytest.fixture
def demo(runs, tmp_path, monkeypatch, capsys):
    """Runs the demo in a folder; the shipped restorer and drawn64 are tiny. Returns what it printed
    and the text of metrics.json."""
    shipped = tmp_path / "faces64.pt"
    shipped.write_bytes((runs / "sft" / "last.pt").read_bytes())
    monkeypatch.setattr(train, "SHIPPED", shipped)

    def demo(name, *flags):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        with small_presets(), monkeypatch.context() as patch:
            small = {k: v for k, v in settings.PRESETS["tiny"].items() if k != "rewards"}
            patch.setitem(settings.PRESETS, "drawn64", small)
            patch.setattr(evaluate, "held_out", lambda data, size, n, device: (
                settings.held_out(data, size, 8, device)))
            train.main([*TINY, *flags])
        out = tmp_path / name / "runs" / "demo"
        return capsys.readouterr().out, (out / "evaluation" / "metrics.json").read_text(), out
    return demo


def args_of(folder):
    return json.loads((folder / "args.json").read_text())


def test_the_demo_compares_its_methods_with_sft_for_as_many_operations_twice_the_same(demo,
                                                                                       squeeze):
    flags = ["--steps", "2", "--lpips_weights", squeeze]
    said, metrics, out = demo("one", *flags)
    assert {path.name for path in out.iterdir()} == {"frm", "lrpo", "refl", "sft", "evaluation"}
    logs = {name: log_of(out / name) for name in ("frm", "lrpo", "refl", "sft")}
    assert [logs[name][-1]["step"] for name in ("frm", "lrpo", "refl")] == [3, 2, 2]
    assert args_of(out / "lrpo")["credit"] == 8             # of the preset drawn64
    assert {args_of(out / name)["init"][-10:] for name in logs} == {"faces64.pt"}
    spent = {name: log[-1]["tflop"] for name, log in logs.items()}
    dearest, step = max(spent["lrpo"], spent["refl"]), logs["sft"][1]["tflop"]
    assert spent["lrpo"] != spent["refl"] and dearest <= spent["sft"] < dearest + step

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()
            if line.startswith("|")]
    assert rows[0] == ["", "psnr", "haarpsi", "TFLOP"]      # ssim and lpips are rewarded
    assert [row[0] for row in rows[2:7]] == ["LQ", "faces64", "sft", "lrpo", "refl"]
    facts = json.loads(metrics)
    assert {name: facts["tflop"][name] for name in ("sft", "lrpo", "refl")} == {
        name: spent[name] for name in ("sft", "lrpo", "refl")}
    assert (out / "evaluation" / "comparison.png").exists()

    assert demo("two", *flags)[1] == metrics
    assert demo("one", *flags, "--resume")[1] == metrics    # nothing is left to do


def test_without_lpips_the_demo_says_first_that_it_runs_refl_on_what_needs_none(demo, monkeypatch):
    assert train.OFFLINE["steps"] > 300     # it smooths first and sharpens later
    monkeypatch.setattr(train, "OFFLINE", train.OFFLINE | {"steps": 4})
    said, metrics, out = demo("one")
    first = next(line for line in said.splitlines() if not line.startswith("Downloading"))
    assert first.startswith("demo goes on with --methods refl --rewards offline. LPIPS: its "
                            "squeeze backbone could not be fetched")
    assert {path.name for path in out.iterdir()} == {"frm", "refl", "sft", "evaluation"}
    assert log_of(out / "refl")[-1]["step"] == 4 and args_of(out / "refl")["rewards"] == "offline"
    assert json.loads(metrics)["rewards"] == {"face": 1.0, "ssim": 0.3}
