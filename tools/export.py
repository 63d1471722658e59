"""A restorer to ship: the averaged weights of a run of mode sft in half precision, and its facts.

    python -m tools.export runs/sft/last.pt pretrained/faces64.pt

The file is a checkpoint that every program takes for --init or --ckpt. What only --resume needs
(optimiser, weights that are not averaged) is left out, so that it has 2 bytes a parameter.
"""
import argparse

import torch

from support.checkpoint import load_run, save
from support.cli import run_main


def main():
    p = argparse.ArgumentParser(description="Write a restorer to ship.")
    p.add_argument("ckpt", help="last.pt of a run of mode sft")
    p.add_argument("out", help="the file to write")
    args = p.parse_args()
    state = load_run(args.ckpt, "export")
    run = {name: value for name, value in state["args"].items()
           if name not in ("out", "resume", "overwrite", "init", "tflop", "device")}
    save(args.out, state | {
        "finished": True, "args": run, "ema": {k: v.half() for k, v in state["ema"].items()},
        "model": {}, "optimizer": {}, "method": {}, "generator": torch.zeros(0)})
    print(f"{args.out}: {state['step']} steps of {run['batch_size']} images")


if __name__ == "__main__":
    run_main(main)
