"""Tokens per second of the quickstart model, beside the same model in plain PyTorch on the same cores.

Penstock trains it as it does in production: one process per rank, UCX between them. PyTorch trains it in one
process with as many threads as there are cores (peer_torch.py). The two are alternated; each round gives one ratio.
"""
import json
import os
import pathlib
import statistics
import subprocess
import sys

DESCRIPTION = "training throughput of the quickstart model, beside PyTorch"
HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WARMUP_STEPS = 2


def add_arguments(parser):
    parser.add_argument("--spec", default=str(ROOT / "docs/examples/quickstart.yaml"))
    parser.add_argument("--torch-python", default="/usr/bin/python3",
                        help="a Python that can import torch, numpy and yaml (Debian: python3-torch)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the peer (needs PyTorch 2)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help="steps a round; the first two are dropped")


def tokens_per_second(command, environment):
    """Median over the steps after the warm-up of one run that prints a JSON line per step."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} exited {done.returncode}: {done.stderr.strip()[-400:]}")
    steps = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rates = [s["tokens_per_second"] for s in steps if "tokens_per_second" in s][WARMUP_STEPS:]
    if not rates:
        raise RuntimeError(f"{command[0]} printed no step")
    return statistics.median(rates), steps[0]["loss"]


def spread(values):
    return f"{min(values):.4g}..{max(values):.4g}"


def run(options):
    rounds, steps = (2, 5) if options.quick else (options.rounds, options.steps)
    cores = str(os.cpu_count())
    ours = [str(pathlib.Path(options.build) / "bin/penstock-standalone"), "--processes", "--spec",
            options.spec, "--steps", str(steps), "--json"]
    peer = [options.torch_python, str(HERE / "peer_torch.py"), "--spec", options.spec, "--steps", str(steps),
            "--threads", cores] + (["--compile"] if options.compile else [])
    can_peer = subprocess.run([options.torch_python, "-c", "import torch, numpy, yaml"], capture_output=True)
    have_peer = can_peer.returncode == 0
    if not have_peer:
        print(f"ops/bench train: {options.torch_python} cannot import torch, numpy and yaml: measured without a "
              "peer (--torch-python names another)", file=sys.stderr)
    environment = dict(os.environ, OMP_NUM_THREADS=cores)
    mine, theirs, first_losses = [], [], []
    for _ in range(rounds):
        rate, loss = tokens_per_second(ours, dict(os.environ))
        mine.append(rate)
        first_losses.append(loss)
        if have_peer:
            theirs.append(tokens_per_second(peer, environment)[0])
    ratios = [a / b for a, b in zip(mine, theirs)]
    rows = [{"program": "penstock, one process per rank", "tokens_per_second": statistics.median(mine),
             "spread": spread(mine), "first_loss": first_losses[0]}]
    if have_peer:
        rows.append({"program": "PyTorch" + (" compiled" if options.compile else " eager") + f", {cores} threads",
                     "tokens_per_second": statistics.median(theirs), "spread": spread(theirs), "first_loss": ""})
        rows.append({"program": f"ratio over {rounds} alternated rounds", "tokens_per_second":
                     statistics.median(ratios), "spread": spread(ratios), "first_loss": ""})
    return {"rows": rows, "bars": [{"what": "tokens/s, ours over PyTorch", "unit": "x", "bar": 1.5,
                                    "value": statistics.median(ratios) if ratios else None}]}
