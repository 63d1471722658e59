"""CLIP-IQA: is a picture nearer to "good" or to "bad", as CLIP reads the words?

Papers   CLIP-IQA (Wang et al. 2023, arXiv 2207.12396), on CLIP RN50 (Radford et al. 2021).
Departs  The default averages five antonym pairs, the form that pyiqa made common and that LRPO's
         code runs; the paper's single pair is PROMPTS["paper"]. They give different numbers.

CLIP's pooling adds an embedding for each of its 7 x 7 positions, which fixes the size to 224 px.
CLIP-IQA leaves that out (`attention_pool`), so images of any size from 32 px on need no resizing.
"""
import hashlib
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from support.checkpoint import load_tensors
from support.cli import UserError

ARCHITECTURE = "RN50-quickgelu"     # open_clip's "RN50" has another GELU than OpenAI's weights
# OpenAI's RN50.pt. A TorchScript archive is a program, so no other one is opened.
OPENAI_SHA256 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)     # CLIP's preprocessing, of images in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIPIQA_MIN_SIDE = 32                       # the trunk halves the side five times
PROMPTS = {                         # pairs: good, bad, good, bad, ...
    "paper": ["Good photo.", "Bad photo."],                             # CLIP-IQA, section 3
    "five": ["Good image", "bad image", "Sharp image", "blurry image",  # pyiqa's `clipiqa`
             "sharp edges", "blurry edges", "High resolution image", "low resolution image",
             "Noise-free image", "noisy image"]}


def normalise(x: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], normalised as for CLIP's training: (B, 3, H, W)."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return ((x + 1) / 2 - mean) / std


def attention_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """CLIP's attention pooling without position embeddings, the query being the mean position:
    (B, C, h, w) -> (B, E)."""
    x = x.flatten(2).transpose(1, 2)                                    # (B, hw, C)
    mean = x.mean(dim=1, keepdim=True)                                  # (B, 1, C)
    x = torch.cat([mean, x], dim=1)                                     # (B, 1 + hw, C)
    q, k, v = (proj(u).unflatten(2, (pool.num_heads, -1)).transpose(1, 2) for proj, u in
               ((pool.q_proj, mean), (pool.k_proj, x), (pool.v_proj, x)))
    y = F.scaled_dot_product_attention(q, k, v)                         # (B, heads, 1, C / heads)
    return pool.c_proj(y.transpose(1, 2).flatten(1))                    # (B, E)


class CLIPIQA(nn.Module):
    """The probability of "good" against "bad", averaged over the antonym pairs of `prompts`.

    `clip` is the whole CLIP. Its text tower encodes the prompts once and is not kept.
    """

    def __init__(self, clip: nn.Module, prompts: str = "five"):
        super().__init__()
        import open_clip
        tokens = open_clip.get_tokenizer(ARCHITECTURE)(PROMPTS[prompts])        # (2P, 77)
        with torch.no_grad():
            text = clip.logit_scale.exp() * clip.encode_text(tokens, normalize=True)
        self.register_buffer("text", text)                              # (2P, E), logit scale in
        self.visual = clip.visual
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        """Stays in evaluation mode, so that its batch norms keep CLIP's statistics."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor = None) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> (B,) in (0, 1); y is not used. Raises UserError below 32
        px."""
        if min(x.shape[-2:]) < CLIPIQA_MIN_SIDE:
            raise UserError(f"CLIP-IQA needs images of {CLIPIQA_MIN_SIDE} px or more")
        v = self.visual
        h = v.stem(normalise(x))                                        # (B, 64, H/4, W/4)
        h = v.layer4(v.layer3(v.layer2(v.layer1(h))))                   # (B, 2048, H/32, W/32)
        image = F.normalize(attention_pool(v.attnpool, h), dim=1)       # (B, E)
        pairs = (image @ self.text.T).unflatten(1, (-1, 2))             # (B, P, 2)
        return pairs.softmax(dim=2)[..., 0].mean(dim=1)                 # (B,)


# ---------------------------------------------------------------------------------------------
# Weights: every tensor is read from a file. open_clip alone would silently use random ones.

def build_clip(config: dict, state: dict, source: str) -> nn.Module:
    """open_clip's CLIP of this config with exactly the tensors of `state`, frozen, in float32.
    UserError, naming `source`, if names or shapes differ."""
    import open_clip        # slow to import, so it is imported only when it is needed
    clip = open_clip.CLIP(**config)
    try:
        clip.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError):       # names, shapes, or no tensors at all
        raise UserError(f"{source}: not the weights of this CLIP, or not all of them; "
                        "--rewards offline needs none") from None
    return clip.float().eval().requires_grad_(False)


def read_clip(path: Path) -> dict:
    """The tensors of a CLIP file: safetensors, a PyTorch file of tensors, or OpenAI's RN50.pt.
    Raises UserError for any other file."""
    if path.suffix == ".safetensors" and path.is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"--clip_weights {path}: a damaged file ({error})") from None
    if not zipfile.is_zipfile(path) or not any(
            name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        return load_tensors(path, "--clip_weights", "leave it out to fetch OpenAI's, or use "
                            "--rewards offline")
    if hashlib.sha256(path.read_bytes()).hexdigest() != OPENAI_SHA256:
        raise UserError(f"--clip_weights {path}: a TorchScript archive, which can carry code, and "
                        "not OpenAI's RN50.pt; convert it where you trust it, by safetensors' "
                        "save_file(torch.jit.load(path).state_dict(), 'clip.safetensors')")
    with warnings.catch_warnings():     # torch warns that TorchScript is deprecated
        warnings.simplefilter("ignore")
        state = torch.jit.load(path, map_location="cpu").state_dict()
    facts = ("input_resolution", "context_length", "vocab_size")        # no weights
    return {name: v for name, v in state.items() if name not in facts}


def load_clipiqa(path=None, prompts: str = "five") -> CLIPIQA:
    """CLIP-IQA with the weights of a file; without a file open_clip fetches OpenAI's. Raises
    UserError if neither works."""
    import open_clip
    if path is None:
        openai = open_clip.get_pretrained_cfg(ARCHITECTURE, "openai")
        try:
            path = open_clip.download_pretrained(openai)
        except Exception:       # of urllib, of the hub's client, of the disk: all mean the same
            raise UserError("CLIP-IQA: OpenAI's RN50 could not be fetched; give the file with "
                            "--clip_weights FILE, or use --rewards offline") from None
    config = open_clip.get_model_config(ARCHITECTURE)
    return CLIPIQA(build_clip(config, read_clip(Path(path)), f"--clip_weights {path}"), prompts)
