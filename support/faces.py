"""Drawn faces: an endless, seeded, licence-free data set, rendered with tensors.

Face n of a seed is some eighty named numbers (skin, yaw, fringe, ...) painted from back to front:
each part is a function that turns signed distances (negative inside) into soft masks and lays a
colour over what is there. All of it is ours. Instead of a random generator, an integer hash of
(name, seed, n), exact on every device, gives each number: no batch, machine or size changes a face.

Coordinates: x points right, y down. The canvas spans -1 to 1. On the face y is -1 at the top of the
skull, 0 about the eyes, 1 at the chin; edges and textures are given in these units, so that every
size shows one picture, and what is finer than a pixel averages out.
"""
import zlib
from functools import reduce

import torch

MASK32 = 0xFFFFFFFF
EXTENT = 1.25              # half the canvas in face units: the head fills four fifths of its height
CHUNK_SAMPLES = 1 << 17    # painted at a time: a plane of so many floats (0.5 MB) stays in cache
WHITE, DARK, RED = torch.tensor([(.97, .96, .94), (.1, .06, .06), (.74, .22, .26)])[..., None, None]


def hash32(x):
    """Mix 32-bit values, an int or an int64 tensor; constants from Wellons' hash-prospector."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):   # < 2**31: products fit an int64
        x = ((x ^ (x >> shift)) * factor) & MASK32
    return x ^ (x >> 15)


def uniform(name, index, seed):
    """The number in [0, 1) that the parameter `name` has in each face of `index`, (B,) -> (B,)."""
    key = hash32(seed ^ hash32(zlib.crc32(name.encode())))
    return (hash32(index ^ key) >> 8).float() * 2.0 ** -24       # 24 bits: exact in a float32


class Face:
    """B faces being painted: their numbers, their coordinates and the canvas `rgb`."""
    def __init__(self, index, seed, size):
        self.index, self.seed = index, seed
        self.canvas_x = (torch.arange(2 * size, device=index.device) + 0.5) / size - 1
        self.canvas_y = self.canvas_x[:, None]
        zoom, tilt = EXTENT * self.u("zoom", .92, 1.1), self.u("tilt", -.2, .2)
        x = zoom * (self.canvas_x - self.u("shift_x", -.1, .1))              # (B, 1, 1, S)
        y = zoom * (self.canvas_y - self.u("shift_y", -.15, -.02))           # (B, 1, S, 1)
        self.x = x * tilt.cos() + y * tilt.sin()                             # (B, 1, S, S)
        self.y = y * tilt.cos() - x * tilt.sin()                             # (B, 1, S, S)
        self.sharpness = size / zoom                                         # samples per unit
        # Yaw moves the middle of the face and keeps its outline, so the far side gets narrower.
        self.turned = self.x - self.u("yaw", -.16, .16) * (1 - self.x ** 2)
        self.width, self.light = self.u("width", .66, .80), self.u("light_x", -.45, .45)
        tone, bright = self.u("skin") ** 1.4, self.u("hair_brightness")
        self.skin = hsv(self.u("skin_hue", .05, .08), .2 + .35 * tone.sqrt(), .99 - .63 * tone)
        self.shade = 1 + self.light * self.x - .1 * self.y - .16 * (self.x / self.width) ** 4
        hue = torch.where(self.u("dyed") < .08, self.u("dye"), self.u("hair_hue", .04, .105))
        vivid = (self.u("hair_colour", .6, .9) - .3 * bright) * (self.u("grey") > .15)
        self.hair = hsv(hue, vivid, .1 + .8 * bright ** 1.4)
        volume = .05 + .26 * self.u("hair_volume") ** 2          # most lies close, some stands off
        # The hair's outline, a distance: a dome that is open downwards, with wavy edges.
        self.cap = ellipse(self.x, (self.y + .1).clamp(max=0), self.width + volume, .88 + volume)
        self.cap += self.u("curl", 0, .04) * torch.sin(13 * (self.x.abs() + self.y))
        self.cap += 9.0 * (self.u("bald") < .1)                  # 9: outside, wherever it is

    def u(self, name, low=0.0, high=1.0):
        return (low + (high - low) * uniform(name, self.index, self.seed)).view(-1, 1, 1, 1)

    def inside(self, *distances):
        """Soft mask of where all distances are negative: 1 to 0 within a sample of the edge."""
        return (0.5 - reduce(torch.maximum, distances) * self.sharpness).clamp_(0, 1)

    def paint(self, mask, colour):
        self.rgb = torch.lerp(self.rgb, colour.to(mask.device), mask)        # (B, 3, S, S)


def hsv(hue, saturation, value):
    """Hue (B, 1, 1, 1), saturation and value, tensors or floats -> RGB (B, 3, 1, 1)."""
    k = (6 * hue + torch.tensor([5., 3., 1.], device=hue.device).view(3, 1, 1)) % 6
    return value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))


def ellipse(x, y, a, b):
    """Distance to an ellipse: exact for a circle, rough (by a scale) for others."""
    return (torch.hypot(x / a, y / b) - 1) * (a * b) ** 0.5


def spot(x, y, a, b):
    return torch.exp(-(x / a) ** 2 - (y / b) ** 2)


def pattern(f, name, x, y, frequency):
    """Stripes, checks or nothing, in [-1, 1]."""
    angle, kind = f.u(name + "_angle", 0, 3.14), f.u(name + "_kind")
    stripes = torch.sin(frequency * (x * angle.cos() + y * angle.sin()))
    across = torch.sin(frequency * (y * angle.cos() - x * angle.sin()))
    return stripes * torch.where(kind < .35, 1.0, across) * (kind < .75)


def strands(f, x, y):
    """Brightness of hair, in [-1, 1]: strands along y, or curls."""
    coarse, fine = f.u("coarse", 24, 34), f.u("fine", 54, 66)    # 3 pixels of 32 px, and of 64 px
    bend = f.u("bend", 0, 3) * torch.sin(f.u("wave", 2, 7) * y + 4 * x)
    curls = torch.where(f.u("curly") < .25, torch.sin(coarse * y - 2 * bend), 1.0)
    return .55 * curls * torch.sin(coarse * x + bend) + .45 * torch.sin(fine * x + 2 * bend)


def background(f):
    top = hsv(f.u("back_hue"), f.u("back_saturation", .05, .45), f.u("back_value", .3, .95))
    low = hsv(f.u("back_hue") + f.u("back_drift", -.2, .2), .25, f.u("low_value", .25, .95))
    f.rgb = (torch.lerp(top, low, (f.canvas_y + 1) / 2)
             + .07 * pattern(f, "back", f.canvas_x, f.canvas_y, f.u("back_scale", 3, 20)))


def hair_behind(f):
    ends = f.y - f.u("hair_length", -.2, 1.5) + .03 * torch.sin(20 * f.x)
    f.paint(f.inside(f.cap, ends), f.hair * (.72 + .3 * strands(f, f.x, f.y)))


def neck_and_clothes(f):
    x = f.x.abs()
    f.paint(f.inside(x - f.width * .55, .5 - f.y), f.skin * (1 - .45 * spot(x, f.y - .85, .6, .32)))
    collar = f.u("collar_depth", -.05, .2) * (1 - x / f.u("collar_width", .35, .6))
    edge = 1.07 + .35 * (x - .3).clamp(min=0) ** 2 + collar.clamp(min=0) - f.y
    cloth = hsv(f.u("cloth_hue"), f.u("cloth_saturation", .1, .75), f.u("cloth_value", .2, .95))
    f.paint(f.inside(edge), cloth * (1 + .35 * pattern(f, "cloth", f.x, f.y, f.u("knit", 18, 36))))
    f.paint(f.inside((edge + .035).abs() - .03), cloth * f.u("collar_tone", .5, 1.3))


def head(f):
    ear_x, ear_y, lit = f.x.abs() - f.width, f.y - .06, f.skin * f.shade
    f.paint(f.inside(ellipse(ear_x, ear_y, f.u("ear_width", .07, .13), .19)), lit)
    f.paint(.4 * f.inside(ellipse(ear_x - .02, ear_y, .035, .1)), RED)
    f.paint((f.u("earring") < .25) * f.inside(ellipse(ear_x - .02, ear_y - .2, .04, .04)), WHITE)
    chin = 1 - f.u("jaw", .12, .38) * f.y.clamp(min=0) ** 2      # narrower than the skull
    f.outline = ellipse(f.x / chin, f.y, f.width, 1.0)
    f.paint(f.inside(f.outline), lit)
    x, y = f.turned, f.y
    f.paint(f.u("blush", 0, .4) * spot(x.abs() - .4, y - .38, .17, .13), RED)
    # Two waves of bent phase are high together only in small spots, scattered as freckles are.
    waves = torch.sin(31 * x + 3 * torch.sin(7 * y)) * torch.sin(33 * y + 3 * torch.sin(8 * x))
    where = (f.u("freckles") < .3) * spot(x.abs() - .28, y - .3, .25, .16)
    f.paint(where * (4 * waves - 2).clamp(0, .7), f.skin * .45)


def beard(f):
    jaw = f.u("beard_line", .3, .5) + .9 * (f.width * .8 - f.x.abs()).clamp(min=0) - f.y
    region = torch.minimum(jaw, ellipse(f.turned, f.y - .53, .3, .07))       # or a moustache
    mask = (f.u("beard") < .2) * f.u("beard_cover", .4, .95) * f.inside(region, f.outline - .02)
    f.paint(mask, f.hair * (.85 + .35 * strands(f, f.x + .3 * f.x * f.y, f.y)))


def nose(f):
    x, y, wide = f.turned, f.y - f.u("nose_length", .34, .46), f.u("nose_width", .08, .14)
    f.paint(.45 * spot(x + .25 * f.light, y + .16, .05, .2), f.skin * .45)   # away from the light
    f.paint(.45 * spot(x - .08 * f.light, y + .06, .05, .1), WHITE)
    f.paint(.6 * spot(x, y - .07, wide * 1.2, .04), f.skin * .4)
    f.paint(.8 * f.inside(ellipse(x.abs() - wide * .6, y - .04, .04, .028)), DARK)


def mouth(f):
    x, y, wide = f.turned, f.y - f.u("mouth_height", .64, .71), f.u("mouth_width", .2, .34)
    bow = 1 - (x / wide) ** 2                                    # 1 in the middle, 0 at corners
    y = y - f.u("smile", -.02, .17) * (bow - .5)                 # from here on, the line is y = 0
    gap = f.u("mouth_open", -.10, .11).clamp(min=0) * bow        # half the opening; mostly closed
    upper, lower = gap + f.u("upper_lip", .02, .06) * bow, gap + f.u("lower_lip", .03, .08) * bow
    f.paint(f.inside(-upper - y, y - lower) * f.u("lipstick", .3, .95), RED)
    f.paint(f.inside(y.abs() - gap - .014, -bow), DARK)
    f.paint(f.inside(-gap - y, y - .3 * gap, .03 - gap) * (.8 + .2 * torch.sin(70 * x)), WHITE)


def eyes(f):
    x, y = f.turned.abs() - f.u("eye_apart", .28, .34), f.y - f.u("eye_height", -.03, .05)
    wide, tilted = f.u("eye_width", .15, .19), y + f.u("eye_slant", -.1, .2) * x
    bow = f.u("eye_open", .065, .12) * (1 - (x / wide) ** 2)
    f.paint(.35 * spot(x, y + .07, .19, .1), f.skin * .55)       # the socket's shadow
    f.paint(white := f.inside(-tilted - bow, tilted - .7 * bow), WHITE)
    gaze_x = x * f.turned.sign() - f.u("gaze_x", -.05, .05)      # x is mirrored, a gaze is not
    iris = hsv(f.u("iris_hue", .03, .62), f.u("iris_colour", .3, .8), f.u("iris_value", .25, .75))
    for radius, shift, colour in ((.088, 0, iris), (.044, 0, DARK), (.024, .03, WHITE)):
        ball = ellipse(gaze_x + shift, y - f.u("gaze_y", -.02, .03) + shift, radius, radius)
        f.paint(white * f.inside(ball), colour)
    lash = .016 + f.u("lashes", 0, .035) * (.5 + .5 * torch.sin(60 * x - 30 * y))
    f.paint(f.inside((tilted + bow + .6 * lash).abs() - lash, x.abs() - wide), DARK)


def brows(f):
    x, y = f.turned.abs() - .3, f.y + f.u("brow_height", .17, .26)
    curve = f.u("brow_arch", .1, 1.5) * x ** 2 + f.u("brow_slant", -.12, .18) * x
    hairs = f.u("brow_thickness", .018, .05) * (1 - 2.5 * x) * (1 + .4 * torch.sin(48 * x + 40 * y))
    f.paint(f.inside((y - curve).abs() - hairs, x.abs() - f.u("brow_width", .17, .23)), f.hair * .6)


def hair_in_front(f):
    away = f.x - f.u("parting", -.4, .4)
    line = (f.u("fringe", -.75, -.3) + f.u("fringe_drop", -.1, .5) * away.abs()
            + f.u("fringe_slope", -.25, .25) * f.x + 1.2 * f.x.abs() ** 5)   # lower at the temples
    locks = f.u("lock_size", .01, .06) * torch.sin(f.u("locks", 14, 30) * f.x + 6 * away.abs())
    fan = away / (f.y + 1.9).clamp(min=.4)                       # strands spread from the crown
    tone = 1 + .34 * strands(f, fan, f.y) + f.u("gloss", 0, .5) * spot(away, f.y + .82, .6, .09)
    f.paint(f.inside(f.cap, f.y - line - locks), f.hair * tone)


def glasses(f):
    x, y, worn = (f.turned.abs() - .31).abs(), f.y - .03, f.u("glasses") < .25
    a, b = f.u("lens_width", .2, .26), f.u("lens_height", .15, .23)
    lens = torch.where(f.u("round") < .5, ellipse(x, y, a, b), torch.maximum(x - a, y.abs() - b))
    f.paint(worn * torch.where(f.u("dark") < .2, .85, .08) * f.inside(lens), DARK)
    f.paint(worn * .5 * f.inside(lens, (f.turned.abs() + y - .2).abs() - .02), WHITE)   # reflection
    bar = reduce(torch.maximum, ((y + .04).abs() - .018, -lens, f.x.abs() - f.width))
    rim = torch.minimum(lens.abs() - .022, bar)                  # bar: the bridge and the arms
    f.paint(worn * f.inside(rim), hsv(f.u("rim_hue"), .5, f.u("rim_value", .05, .6)))


def draw_faces(index, seed=0, size=32, device="cpu"):
    """Draw the faces numbered `index` (an int64 tensor, range or list, (B,)) of a seed.

    Returns float32 (B, 3, size, size), RGB, in [-1, 1]. Raises ValueError if a number or the seed
    is outside [0, 2**32), or if the size is odd or less than 8.
    """
    if size < 8 or size % 2:
        raise ValueError(f"size must be an even number of at least 8, not {size}")
    index = torch.as_tensor(index, dtype=torch.int64, device=device)
    if not 0 <= seed <= MASK32 or ((index < 0) | (index > MASK32)).any():
        raise ValueError("seed and face numbers must lie in [0, 2**32)")
    pictures = []
    for chunk in index.split(max(1, CHUNK_SAMPLES // (2 * size) ** 2)):
        face = Face(chunk, seed, size)
        for part in (background, hair_behind, neck_and_clothes, head, beard, nose, mouth, eyes,
                     brows, hair_in_front, glasses):             # from back to front
            part(face)
        pictures.append(torch.nn.functional.avg_pool2d(face.rgb.clamp(0, 1), 2) * 2 - 1)
    return torch.cat(pictures)                                               # (B, 3, S, S)
