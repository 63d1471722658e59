"""The Face Reward Model, ours and the papers': losses, pairs, labels, files, and that it learns."""
import csv

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize
from torchvision.transforms import Resize

from frm import (CAPTION, CAST, NOISE, FaceRewardModel, FaceRewardTraining, FRMSettings,
                 add_artefacts, load_face_reward, metric_vector, pair_loss)
from rewards import psnr
from support import labels
from support.cli import UserError
from support.data import Photos, graded, to_float, to_uint8
from test_rewards import images


def test_pair_loss_is_bradley_terry():
    a, b = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    want = -torch.log(torch.exp(a) / (torch.exp(a) + torch.exp(b))).mean()
    torch.testing.assert_close(pair_loss(a, b), want)


def test_graded_makes_the_second_worse():
    gt = images(0, n=32).clamp(-1, 1)
    mild, heavy = graded(gt, np.random.default_rng(0))
    assert (psnr(mild, gt) > psnr(heavy, gt)).float().mean() > 0.9


def test_artefacts_are_noise_or_a_colour_cast_of_random_strength():
    x = torch.zeros(400, 3, 16, 16)
    d = add_artefacts(x, torch.Generator().manual_seed(0))
    flat = d.std(dim=(2, 3)).amax(dim=1) == 0               # a cast: one colour all over
    assert 160 < flat.sum() < 240
    cast, noise = d[flat][:, :, 0, 0], d[~flat].std(dim=(1, 2, 3))
    assert noise.min() < 0.1 * 2 * NOISE and 0.9 * 2 * NOISE < noise.max() < 1.1 * 2 * NOISE
    assert d[~flat].mean(dim=(2, 3)).abs().max() < 5 * 2 * NOISE / 16       # noise has no colour
    # strength is uniform: E strength^2 = 1/3
    torch.testing.assert_close(cast.std(), torch.tensor(2 * CAST / 3 ** 0.5), rtol=0.1, atol=0)


def test_the_reward_model_is_not_fooled_by_noise_or_casts():
    """Blurred against sharp alone teaches that noise is detail; artefacts teach otherwise."""
    torch.manual_seed(0)
    gt = to_float(Photos.drawn(96, 0, 16, "train").images)
    lq = torch.nn.functional.avg_pool2d(gt, 3, 1, 1)
    held = to_float(Photos.drawn(64, 0, 16, "heldout").images)
    spoilt = {"noise": held + 40 / 255 * torch.randn(held.shape), "cast": held + torch.tensor(
        [0.2, 0.0, -0.2]).view(3, 1, 1)}
    face = FaceRewardModel()
    training = FaceRewardTraining(face, torch.Generator().manual_seed(0),
                                  FRMSettings(lr=2e-3), lq, gt)
    for i in range(80):
        part = lq[i % 3::3], gt[i % 3::3]
        training.step((*part, *reversed(part)))
    with torch.no_grad():
        for kind, x in {**spoilt, "blur": torch.nn.functional.avg_pool2d(held, 3, 1, 1)}.items():
            assert (face.score(held) > face.score(x)).float().mean() > 0.7, kind


def test_face_reward_model_learns_to_order_pairs():
    torch.manual_seed(0)
    gt = torch.cat([images(s, n=16) for s in range(4)]).clamp(-1, 1)
    lq = torch.nn.functional.avg_pool2d(gt, 3, 1, 1)
    face = FaceRewardModel()
    training = FaceRewardTraining(face, torch.Generator().manual_seed(0),
                                  FRMSettings(lr=1e-3), lq, gt)
    for _ in range(30):
        stats = training.step((lq[:16], gt[:16], gt[:16], lq[:16]))
    assert stats["accuracy_degraded"] > 0.95 and stats["accuracy_restored"] > 0.9
    held = images(9, n=16).clamp(-1, 1)
    assert (face.score(held) > face.score(torch.nn.functional.avg_pool2d(held, 3, 1, 1))).all()
    r = face(held)
    assert r.shape == (16,) and 0 < r.min() and r.max() < 1
    order = face.score(held).argsort()
    assert torch.equal(order, r.argsort())      # squashing keeps the order


VIT = {"embed_dim": 16, "text_cfg": {"width": 16, "heads": 2, "layers": 13},
       "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8,
                      "layers": 22}}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny CLIP in the layout of the published FaceRewardModel.pth, and its file."""
    torch.manual_seed(0)
    clip, path = open_clip.CLIP(**VIT).eval(), tmp_path_factory.mktemp("frm") / "published.pth"
    torch.save({"epoch": 1, "state_dict": clip.state_dict()}, path)
    return clip, path


def test_the_papers_model_is_a_cosine(published):
    clip, path = published
    torch.manual_seed(5)        # what is read must not hang on any random start
    face, x = load_face_reward(path, VIT).eval(), images(0).clamp(-1, 1)     # 32 px: not resized
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN,
                                                         open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        image = clip.encode_image(((x + 1) / 2 - mean) / std)
        text = clip.encode_text(open_clip.tokenize([CAPTION]))
        want = torch.nn.functional.cosine_similarity(image, text)
        torch.testing.assert_close(face(x), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(face.score(x), want * clip.logit_scale.exp())
        assert face(images(1, side=48)).shape == (4,)       # another size is resized


# open_clip counts groups from the end of a tower, and both towers are grouped alike: the
# embeddings, each block but the last, the last block with the norm after it, the projection. So of
# 22 blocks 20 groups leave 3 to 21, and of 13 blocks 11 groups leave 3 to 12. logit_scale is in
# neither tower.
TRAINED = {"logit_scale", "visual.ln_post.weight", "visual.ln_post.bias", "visual.proj",
           "ln_final.weight", "ln_final.bias", "text_projection"} | {
    f"{tower}.resblocks.{i}.{name}"
    for tower, n in (("visual.transformer", 22), ("transformer", 13)) for i in range(3, n)
    for name in ("ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias",
                 "attn.out_proj.weight", "attn.out_proj.bias", "ln_2.weight", "ln_2.bias",
                 "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")}


def test_the_papers_model_trains_the_last_groups_of_both_towers(published):
    face = load_face_reward(published[1], VIT)
    for _ in range(2):                      # the second time from what the first left
        moved = {id(p) for p in face.trained()}
        assert {name for name, p in face.clip.named_parameters() if id(p) in moved} == TRAINED
        assert not any(p.requires_grad for p in face.parameters())


def test_the_papers_model_resizes_as_the_published_code(published):
    """By torchvision's Resize of tensors, bilinear without antialiasing, up and down."""
    face = load_face_reward(published[1], VIT).eval()
    for side in (20, 48):
        x = images(1, side=side).clamp(-1, 1)
        with torch.no_grad():
            want = face(Resize(32, antialias=False)(x))
            torch.testing.assert_close(face(x), want, rtol=0, atol=1e-5)
    assert (face(Resize(32, antialias=True)(x)) - want).abs().max() > 1e-4      # it would matter


def test_the_papers_model_learns_and_its_run_is_read_back(published, tmp_path):
    face = load_face_reward(published[1], VIT)
    kept = face.clip.token_embedding.weight.clone()
    gt = images(0, n=8).clamp(-1, 1)
    lq = torch.nn.functional.avg_pool2d(gt, 3, 1, 1)
    training = FaceRewardTraining(face, torch.Generator().manual_seed(0),
                                  FRMSettings(lr=1e-3), lq, gt)
    first, *_, last = [training.step((lq, gt, gt, lq))["loss"] for _ in range(8)]
    assert last < first and torch.equal(face.clip.token_embedding.weight, kept)
    torch.save({"mode": "frm", "ema": face.state_dict()}, tmp_path / "last.pt")
    again = load_face_reward(tmp_path / "last.pt", VIT)
    with torch.no_grad():
        torch.testing.assert_close(again(gt), face(gt))


def test_a_wrong_face_reward_file_gets_one_sentence(published, tmp_path):
    state = dict(published[0].state_dict())
    state.pop("ln_final.bias")
    for content, message in (({"state_dict": state}, "not all of them"), ([1], "not a checkpoint"),
                             ({"mode": "sft", "ema": {}}, "not a checkpoint"),
                             ({"state_dict": 7}, "not a checkpoint")):
        torch.save(content, tmp_path / "f.pth")
        with pytest.raises(UserError, match=message):
            load_face_reward(tmp_path / "f.pth", VIT)
    with pytest.raises(UserError, match="no such file; train one with"):
        load_face_reward(tmp_path / "none.pth")


def test_svm_minimises_the_hinge_loss():
    """Against a general solver on the same problem, with slack variables."""
    rng = np.random.default_rng(0)
    d = rng.standard_normal((60, 3)) * [1, 10, .1]
    label = np.sign(d @ [1, .05, 3] + rng.standard_normal(60))
    z = label[:, None] * d / np.sqrt((d ** 2).mean(axis=0))

    def loss(w):
        return w @ w / 2 + np.maximum(0, 1 - z @ w).sum()
    want = minimize(lambda u: u[:3] @ u[:3] / 2 + u[3:].sum(), np.r_[np.zeros(3), np.ones(60)],
                    method="SLSQP", bounds=[(None, None)] * 3 + [(0, None)] * 60,
                    constraints={"type": "ineq", "fun": lambda u: z @ u[:3] - 1 + u[3:]})
    w = labels.fit_svm(d, label) * np.sqrt((d ** 2).mean(axis=0))
    assert loss(w) == pytest.approx(want.fun, rel=1e-3)
    np.testing.assert_allclose(w, want.x[:3], atol=0.02)
    np.testing.assert_allclose(labels.fit_svm(-d, -label), labels.fit_svm(d, label))    # no side


def test_svm_labels_pairs_of_known_order():
    photos = images(3, n=40).clamp(-1, 1)
    mild, heavy = graded(photos, np.random.default_rng(7))
    for gt in (photos, None):       # with the ground truth's metrics, and without
        assert metric_vector(mild, gt).shape == (40, 6 if gt is not None else 3)
    flip = torch.arange(40).view(-1, 1, 1, 1) % 2 == 0
    a, b = torch.where(flip, heavy, mild), torch.where(flip, mild, heavy)
    better, worse = labels.label_pairs("svm", images(4, n=40).clamp(-1, 1), (a, b, photos),
                                       metric_vector, 0)
    right = (better == mild).flatten(1).all(dim=1)
    assert right.float().mean() > 0.9 and torch.equal(better + worse, a + b)


def write_csv(folder, preferred, columns=labels.COLUMNS, n=12):
    """n pairs of a clear picture and a flat one, clear first in even lines."""
    x = to_uint8(images(5, n=n)).permute(0, 2, 3, 1).numpy()
    with open(folder / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for i in range(n):
            Image.fromarray(x[i]).save(folder / f"{i}.png")
            Image.fromarray(x[i] // 16 + 120).save(folder / f"{i}_flat.png")
            names = [f"{i}.png", f"{i}_flat.png"]
            table.writerow([*names[::1 if i % 2 == 0 else -1], preferred(i), f"{i}.png"])
    return folder / "pairs.csv"


@pytest.mark.parametrize("columns", [labels.COLUMNS, labels.COLUMNS[:3]])
def test_a_persons_labels_teach_the_svm(tmp_path, columns):
    path = write_csv(tmp_path, lambda i: "" if i == 3 else "ab"[i % 2], columns)
    a, b, gt, label = labels.read_labels(path, 32)
    assert len(a) == 11 and label.tolist() == [1, -1, 1] + [1, -1] * 4
    assert (gt is None) == (len(columns) == 3)
    clear = images(6, n=6).clamp(-1, 1)
    better, worse = labels.label_pairs(str(path), clear, (clear / 16, clear, clear),
                                       metric_vector, 0)
    assert torch.equal(better[:6], clear) and len(better) == 6 + 11
    spread = lambda u: u.flatten(1).std(dim=1)
    assert (spread(better[6:]) > spread(worse[6:])).all()       # the person's own, put in order


@pytest.mark.parametrize("preferred, columns, message", [
    (lambda i: "left", labels.COLUMNS, "line 2: preferred must be a, b or empty, not 'left'"),
    (lambda i: "a" if i < 9 else "", labels.COLUMNS, "9 pairs are labelled, 10 is the least"),
    (lambda i: "a", ["a", "b", "c"], "must name path_a, path_b, pref")])
def test_a_wrong_csv_gets_one_sentence(tmp_path, preferred, columns, message):
    with pytest.raises(UserError, match=message):
        labels.read_labels(write_csv(tmp_path, preferred, columns), 32)
    path = write_csv(tmp_path, lambda i: "a")
    (tmp_path / "3_flat.png").unlink()
    with pytest.raises(UserError, match="3_flat.png"):
        labels.read_labels(path, 32)
