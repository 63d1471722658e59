"""CLIP-IQA against open_clip's pool, closed forms and pyiqa; and that nothing runs untrained."""
import copy
import pickle

import open_clip
import pytest
import torch
import torch.nn.functional as F

from rewards import (CLIP_MEAN, CLIP_RN50, CLIP_STD, CLIPIQA, PROMPTS, attention_pool,
                     load_clipiqa)
from support.cli import UserError
from test_rewards import images

TINY = {"embed_dim": 16, "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2,
                     "layers": 1}}


def random_clip(config, seed=0):
    """Random weights that see: batch norms hold the statistics of some pictures, as trained ones
    do, and none starts at zero. Without that every picture would get the same score."""
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**config)
    norms = [m for m in clip.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms:
        torch.nn.init.uniform_(m.weight, 0.5, 1.5)
        torch.nn.init.normal_(m.bias, std=0.1)
        m.momentum = 1.0
    v = clip.visual
    with torch.no_grad():
        v.layer4(v.layer3(v.layer2(v.layer1(v.stem(pictures(9, 64))))))
    clip.logit_scale.data.fill_(100.).log_()
    return clip.eval()


def pictures(seed, side, n=4):
    """No two alike: smooth or grainy, dark or bright."""
    strength = torch.linspace(0.1, 1.5, n).view(-1, 1, 1, 1)
    x = images(seed, n=n, side=(side + 3) // 4 * 4)[..., :side, :side]
    return (strength * x + torch.randn(n, 3, 1, 1) / 3).clamp(-1, 1)


@pytest.fixture(scope="module")
def rn50():
    return random_clip(open_clip.get_model_config(CLIP_RN50))


@pytest.mark.parametrize("side", [224, 64])
def test_the_pool_is_open_clips_without_places(rn50, side):
    torch.manual_seed(1)
    x = torch.randn(2, 2048, side // 32, side // 32, dtype=torch.float64)
    pool = copy.deepcopy(rn50.visual.attnpool).double()     # float64: no last bits to hang on
    theirs = open_clip.modified_resnet.AttentionPool2d(side // 32, 2048, pool.num_heads, 1024)
    theirs.load_state_dict({k: v for k, v in pool.state_dict().items() if "positional" not in k},
                           strict=False)
    theirs.positional_embedding.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(attention_pool(pool, x), theirs.double()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_the_score_is_the_softmax_over_each_pair(rn50, prompts):
    """The whole path by other hands: open_clip's own trunk and pool at its size, then by hand."""
    x = pictures(0, 224)
    places = rn50.visual.attnpool.positional_embedding
    kept = places.data.clone()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        places.zero_()
        image = rn50.encode_image(((x + 1) / 2 - mean) / std)
        text = rn50.encode_text(open_clip.tokenize(PROMPTS[prompts]))
        places.copy_(kept)
    cosine = F.cosine_similarity(image[:, None], text[None], dim=2)     # (B, 2P)
    want = torch.sigmoid(100 * (cosine[:, ::2] - cosine[:, 1::2])).mean(dim=1)
    got = CLIPIQA(rn50, prompts)(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert len(PROMPTS[prompts]) == {"paper": 2, "five": 10}[prompts] and got.std() > 1e-3


def test_equal_to_pyiqa(rn50, monkeypatch):
    """20 images of 5 sizes. pyiqa's dependencies are many: where it is not there, see the docs."""
    arch = pytest.importorskip("pyiqa.archs.clipiqa_arch")
    from pyiqa.archs.clip_model import build_model
    theirs = build_model(dict(rn50.state_dict())).float().eval()
    theirs.load_state_dict(rn50.state_dict())       # building it rounded them to half precision
    monkeypatch.setattr(arch, "load", lambda *args: theirs)
    judge, ours = arch.CLIPIQA(), CLIPIQA(rn50)
    for side in (32, 50, 64, 128, 256):
        x = pictures(side, side)
        with torch.no_grad():
            want = judge((x + 1) / 2)[:, 0]
            torch.testing.assert_close(ours(x), want, rtol=0, atol=1e-4)


def test_any_size_a_gradient_and_no_text_tower():
    score = CLIPIQA(random_clip(TINY))
    for height, width in ((32, 32), (33, 70), (128, 64)):
        x = torch.rand(2, 3, height, width).requires_grad_()
        y = score(x)
        assert y.shape == (2,) and 0 < y.min() and y.max() < 1
        (g,) = torch.autograd.grad(y.sum(), x)
        assert torch.isfinite(g).all() and g.abs().max() > 0
    with pytest.raises(UserError, match="32 px or more"):
        score(torch.zeros(1, 3, 31, 64))
    assert not any("transformer" in name or "token" in name for name in score.state_dict())
    torch.nn.ModuleList([score]).train()
    assert not any(m.training for m in score.modules())
    assert not any(p.requires_grad for p in score.parameters())


@pytest.fixture
def tiny_world(monkeypatch, tmp_path):
    """RN50 is a tiny CLIP here, and what open_clip would fetch is a file of ours."""
    clip, path = random_clip(TINY, seed=5), tmp_path / "clip.pt"
    torch.save(clip.state_dict(), path)
    monkeypatch.setattr(open_clip.factory, "get_model_config", lambda name: copy.deepcopy(TINY))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(path))
    return clip, path


def test_no_random_weight_slips_in(tiny_world, tmp_path, monkeypatch):
    clip, path = tiny_world
    x, state = images(0, side=64), clip.state_dict()
    want = CLIPIQA(random_clip(TINY, seed=5))(x)
    torch.manual_seed(99)
    torch.testing.assert_close(load_clipiqa()(x), want)             # as fetched: all of the file
    from safetensors.torch import save_file
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "clip.safetensors")
    for given in (path, tmp_path / "clip.safetensors"):
        torch.testing.assert_close(load_clipiqa(given)(x), want, rtol=.05, atol=0)
    for name in ("visual.layer4.0.conv2.weight", "text_projection", "logit_scale"):
        for broken in ({k: v for k, v in state.items() if k != name},       # one tensor short
                       state | {name: torch.zeros(1, 2)}):
            torch.save(broken, path)
            with pytest.raises(UserError, match="could not be fetched"):
                load_clipiqa()
            with pytest.raises(UserError, match=f"--clip_weights {path}: not the tensors of"):
                load_clipiqa(path)

    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", no_network)
    with pytest.raises(UserError, match="--clip_weights FILE, or use --rewards offline"):
        load_clipiqa()


class Trap:
    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.filterwarnings("ignore:.*jit.*")
def test_a_wrong_file_gets_one_sentence_and_runs_no_code(tiny_world, tmp_path, capsys):
    from safetensors.torch import save_file
    save_file({"a": torch.zeros(100)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:200])
    (tmp_path / "trap.pt").write_bytes(pickle.dumps(Trap()))
    torch.save({"model": Trap()}, tmp_path / "trap2.pt")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "jit.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("cut.safetensors", "trap.pt", "trap2.pt", "jit.pt", "list.pt", "none.pt", "."):
        with pytest.raises(UserError, match="not the tensors of|no such file") as raised:
            load_clipiqa(tmp_path / name)
        assert f"--clip_weights {tmp_path / name}" in str(raised.value)
        assert "\n" not in str(raised.value)
    assert capsys.readouterr().out == ""
