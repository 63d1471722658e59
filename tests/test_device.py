"""One step of each method as on a GPU, without one: nothing mixes devices, or waits more than once.

The meta device stands for the GPU. It computes shapes alone, so that whoever reads a number from it
gets an error. `GPU` counts the copies that a GPU waits for besides.
"""
import contextlib
import sys
import time

import open_clip
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rewards
import settings
from common import run
from frm import FaceRewardModel
from model import Config, Diffusion, UNet
from rewards import CLIPIQA, CompositeReward
from sft import EMA, frozen_copy
from support import data
from support.checkpoint import has_bfloat16
from test_clipiqa import TINY
from test_credit import random_lpips
from tools import gpu_check

pytestmark = pytest.mark.usefixtures("little_work")
MODES = {"sft": {}, "frm": {}, "lrpo": {}, "lrpo full": dict(own_steps=0), "refl": {},
         "lrpo paper": dict(own_steps=0, steps_per_update=1, minibatch=1, adv_std="batch",
                            gt_target="noised", gt_weight=.001, gt_last=2),
         "refl paper": dict(refl_last=2, struct_weight=.1, reg_weight=.1, eta="random",
                            fidelity_weight=0., frm_update_every=2),
         "darl": dict(kl_weight=.1), "darl stepwise": dict(own_steps=0, stepwise="on")}
ALL, FEW = ("ssim", "dwt", "lpips", "clipiqa", "face"), ("dwt", "face")     # terms of the reward


class GPU(TorchDispatchMode):
    """Sees every function of PyTorch that is called inside. Raises where a GPU refuses tensors of
    two devices, or waits to copy an index. `waits` has the copies between the CPU and it, but those
    to it from memory that was pinned when it was made."""

    def __init__(self):
        super().__init__()
        self.pinned, self.waits = {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        pin = kwargs.pop("pin_memory", False)       # refused where there is no GPU
        out = func(*args, **kwargs)
        given, made = ([u for u in tree_leaves(us) if isinstance(u, torch.Tensor)]
                       for us in ((args, kwargs), out))
        before, after = ({u.is_meta for u in us if u.dim()} for us in (given, made))
        name = func.overloadpacket.__name__
        if pin:
            self.pinned[out.untyped_storage()._cdata] = out     # alive, else another gets its place
        if name in ("_to_copy", "copy_"):
            source = given[-1]
            pinned = not source.is_meta and source.untyped_storage()._cdata in self.pinned
            self.waits += [name] * (len(before | after) == 2 and not pinned)
        elif len(before) == 2:
            raise RuntimeError(f"{name}: tensors of two devices")
        return out


@contextlib.contextmanager
def as_on_a_gpu(reads: list):
    """The meta device passes for CUDA. `reads` gets an entry for each reading of metrics."""
    make = torch.tensor

    def tensor(*given, device=None, **more):        # a GPU's constant is made here, and copied
        return make(*given, **more) if device is None else make(*given, **more).to(device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.device.type == "meta"))
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices",
                      lambda: ["cpu", "meta"])
        for module in ("sft", "frm", "lrpo", "refl"):
            patch.setattr(f"{module}.to_floats", lambda metrics: reads.append("metrics")
                          or dict.fromkeys(metrics, 0.0))
        with GPU() as gpu:
            yield gpu


def waits(mode: str) -> list[list[str]]:
    """What a GPU waits for in each of two steps of a mode, and of the average after it."""
    name, values = mode.split()[0], dict(batch_size=2) | MODES[mode]
    values |= dict(ddim_steps=3) if name not in ("sft", "frm") else {}
    values |= dict(group=2) if name in ("lrpo", "darl") else {}
    entry, reads, found = settings.METHODS[name], [], []
    net, face, images = UNet(Config(32, 8, (1, 2))), FaceRewardModel(), torch.zeros(4, 2, 3, 32, 32)
    models, terms = {"face": face}, ALL if mode in ("lrpo", "refl") else FEW
    if terms is ALL:
        models |= {"lpips": random_lpips.__wrapped__(), "clipiqa": CLIPIQA(open_clip.CLIP(**TINY))}
    with as_on_a_gpu(reads) as gpu:
        for model in (net, *models.values()):
            model.to("meta")
        lq, gt, mild, heavy = (u.to("meta") for u in images)
        options, generator = entry.settings(**values), torch.Generator()
        if name == "frm":
            method = entry.make(face, generator, options, lq, gt, labelled=(lq, gt))
        else:
            method = entry.make(net, Diffusion(net.config, "meta"),
                                CompositeReward(dict.fromkeys(terms, .2), **models), generator,
                                options)
        ema = EMA(method.net, .9)
        for _ in range(2):
            gpu.waits.clear()
            reads.clear()
            method.step((lq, gt, mild, heavy) if name == "frm" else (lq, gt))
            ema.update(method.net)
            found.append(gpu.waits + reads)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_step_waits_only_when_its_metrics_are_read(mode):
    assert waits(mode) == [["metrics"]] * 2


def constant(x, y):
    return [(x - torch.zeros(3, 1, 1)).mean(dim=1)]


def item(x, y):
    return [x.mean(dim=1) * x.mean().item()]


def pageable(x, y):
    return [(x - torch.zeros(3, 1, 1).to(x.device)).mean(dim=1)]


def listed(x, y):
    return [(x - torch.tensor([.1, .2, .3], device=x.device).view(3, 1, 1)).mean(dim=1)]


@pytest.mark.parametrize("fault, said", [(constant, "not on the expected device"),
                                         (item, "meta tensors"), (pageable, None), (listed, None)])
def test_faults_in_a_reward_are_found(monkeypatch, fault, said):
    monkeypatch.setattr(rewards, "dwt_map", lambda x, y: fault(x, y)[0])
    if said:
        with pytest.raises(RuntimeError, match=said):
            waits("darl")
    else:
        assert waits("darl") == [["_to_copy", "metrics"]] * 2


def test_a_gpu_without_bfloat16_computes_in_float32(monkeypatch, capsys):
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
        assert has_bfloat16(torch.device("cuda")) == has
        assert ("float32" in capsys.readouterr().out) != has
        assert has_bfloat16(torch.device("cpu"))


def test_the_copies_of_a_compiled_network_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self) or setattr(
        self, "_compiled_call_impl", self._call_impl))
    net = UNet(Config(32, 8, (1, 2)))
    frozen_copy(net)
    assert not compiled
    net.compile()
    copied = frozen_copy(net)
    assert len(compiled) == 2 and compiled[1] is copied


def test_a_loop_that_waits_for_data_says_so(runs, tmp_path, monkeypatch, capsys):
    make = data.train_batch
    for delay, said in ((0.0, 0), (0.5, 1)):
        monkeypatch.setattr(data, "train_batch", lambda *given: time.sleep(delay) or make(*given))
        run("sft", tmp_path / f"{delay}")
        assert capsys.readouterr().out.count("waiting for data") == said


def test_gpu_check_passes_on_a_cpu(capsys):
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--device", "cpu", "--quick", "--only", "agree lrpo", "resume sft",
                        "waits", "data", "rate small darl"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "0 of 9 lines failed" in said
    assert "| agree lrpo | 0.0e+00" in said and "resumed 0.0e+00, repeated 0.0e+00" in said
    assert "images/s" in said and said.count("pairs/s") == 2


def test_gpu_check_reports_what_failed_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "data", lambda *_: 1 / 0)
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--device", "cpu", "--quick", "--only", "data", "waits sft"])
    said = capsys.readouterr().out
    assert end.value.code == 1 and said.count("FAILED") == 2
    assert "ZeroDivisionError" in said and "| waits sft |" in said
