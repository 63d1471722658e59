"""From settings to objects: the network, the reward and the method that a run is made of."""
from pathlib import Path

import evaluate
from darl import DARL
from frm import (FaceRewardModel, FaceRewardTraining, load_face_reward, metric_vector,
                 unknown_pairs)
from lrpo import LRPO
from model import EVAL_ETA, Config, Diffusion, UNet, load_restorer, restore
from refl import ReFL
from rewards import parse_rewards
from settings import PRESETS, method_values
from sft import SFT
from steered import SteeredLRPO
from support.checkpoint import check_finished
from support.cli import UserError
from support.data import sheet, train_batch
from support.labels import label_pairs
from support.lpips_reward import LPIPS

VALIDATION = 64         # ours: held-out images measured during training
RESTORED_PAIRS = 512    # ours: restorations that the face reward model learns from
REWARDED_WITHOUT_FRM = "ssim=.5,dwt=.5"     # chooses best.pt in sft, when no frm exists yet


def network(run, device) -> UNet:
    """A new network for sft, otherwise the restorer that the run starts from. Raises UserError if
    there is none, or if it contradicts the flags."""
    init = run.init or (None if run.mode == "sft" else Path(run.out).parent / "sft" / "last.pt")
    if init is None:
        mults = tuple(int(m) for m in run.mults.split(","))
        net = UNet(Config(run.size, run.channels, mults, patch=run.patch))
    else:
        if not run.init and not init.exists():
            raise UserError(f"--mode {run.mode} starts from {init}, not there yet: run --mode sft "
                            "first, or give --init CKPT")
        net, state = load_restorer(init, device, "--init")
        check_finished(state, init, "--init")
        if net.config.size != run.size:
            raise UserError(f"--init {init}: made for {net.config.size} px, not --size {run.size}; "
                            "train --mode sft with the same --preset and --size first")
        if state["args"]["data"] and not run.data:
            raise UserError(f"--init {init}: trained on {state['args']['data']}; give its --data")
        if run.data and not state["args"]["data"]:
            print(f"--init {init}: trained on drawn faces, not on {run.data}")
        for name, has in (("channels", net.config.channels), ("patch", net.config.patch),
                          ("mults", ",".join(map(str, net.config.mults)))):
            if getattr(run, name) not in (PRESETS[run.preset][name], has):
                raise UserError(f"--{name} {getattr(run, name)}: --init {init} has {has}; leave it "
                                "out")
            setattr(run, name, has)         # for args.json
        net.train().requires_grad_(True)
    net.bf16 = run.bf16 == "on"
    if run.compile:
        net.compile()
    return net.to(device)


def frm_path(run):
    """The path of a run's face reward model, which may not exist yet."""
    return run.frm_weights or Path(run.out).parent / "frm" / "last.pt"


def build_method(run, net, device, generator):
    """The method of mode sft, lrpo, refl or darl, and a function validate(averaged net) ->
    (metrics, picture)."""
    rewards = REWARDED_WITHOUT_FRM if run.mode == "sft" else run.rewards
    reward = evaluate.load_reward(parse_rewards(rewards), run, frm_path(run), device, run.size)
    lq, gt = evaluate.held_out(run.data, run.size, VALIDATION, device)
    diffusion, settings = Diffusion(net.config, device), method_values(run)
    if run.mode == "sft":
        method = SFT(net, diffusion, generator, settings)
    elif run.mode == "refl":
        method = ReFL(net, diffusion, reward, generator, settings)
    elif run.mode == "lrpo":
        lrpo = LRPO if run.recipe == "paper" else SteeredLRPO
        method = lrpo(net, diffusion, reward, generator, settings)
    else:
        lpips = reward.terms.get("lpips")
        if run.lpips_weights and lpips is None:
            lpips = LPIPS(run.lpips_net, run.lpips_weights).to(device)
        print(f"darl: rewards {run.rewards}; difficulty by {'LPIPS' if lpips else 'L1'}")
        method = DARL(net, diffusion, reward, generator, settings, lpips)

    def validate(averaged):
        averaged.bf16 = False       # float32, as in evaluate.py
        x = restore(averaged, lq, run.ddim_steps, EVAL_ETA, seed=0)
        metrics = {f"heldout_{name}": values.mean().item()
                   for name, values in evaluate.measure(x, gt, reward).items()}
        return metrics, sheet([lq[:8], x[:8], gt[:8]], scale=2)
    return method, validate


def build_frm(run, net, device, generator, photos):
    """The same for mode frm, with pairs restored by `net`."""
    settings = method_values(run)
    face = (load_face_reward(run.frm_weights, size=run.size) if run.frm_weights
            else FaceRewardModel())
    n = min(RESTORED_PAIRS, len(photos))
    lq, gt = (u.to(device) for u in train_batch(photos, n, run.seed + 1, 0))
    held_lq, held_gt = evaluate.held_out(run.data, run.size, VALIDATION, device)
    print(f"frm: restoring {n} training photos, which the face reward model learns to tell apart")
    restored = restore(net, lq, run.ddim_steps, settings.eta, run.seed)
    held = restore(net, held_lq, run.ddim_steps, settings.eta, run.seed)
    labelled = None
    if settings.labels != "known":
        unknown = unknown_pairs(net, photos, n, run.ddim_steps, settings.eta, run.seed + 2)
        labelled = label_pairs(settings.labels, gt, unknown, metric_vector, run.seed)
    method = FaceRewardTraining(face.to(device), generator, settings, restored, gt, labelled)

    def validate(averaged):
        photo, degraded, worse = (averaged.score(u) for u in (held_gt, held_lq, held))
        return {"heldout_accuracy_degraded": (photo > degraded).float().mean().item(),
                "heldout_accuracy_restored": (photo > worse).float().mean().item()}, None
    return method, validate
