"""How far training in every layout ends from training on one rank, on the same global batch.

One model with skewed routing, an expert that gets no token and a rank that gets all of them, three steps: losses,
gradient norms, gradients (through Adam's moments) and weights. Relative differences; of tensors in the L2 norm, the
worst of all. --quick leaves out layouts of more than 16 ranks.
"""
import json
import pathlib
import subprocess

DESCRIPTION = "losses, gradients and weights of every layout beside one rank"


def add_arguments(parser):
    del parser


def run(options):
    command = [str(pathlib.Path(options.build) / "bin/penstock-parity")]
    if options.quick:
        command += ["--ranks-max", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} exited {done.returncode}: {done.stderr.strip()[-400:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    columns = ["loss", "grad_norm", "gradients", "weights"]
    bars = [{"what": f"worst relative difference of {column} over {len(rows)} layouts", "unit": "", "bar": 1e-5,
             "value": max(row[column] for row in rows), "at_least": False} for column in columns]
    return {"rows": rows, "bars": bars}
