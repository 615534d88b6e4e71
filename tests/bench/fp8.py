"""Loss of a run in emulated FP8 beside the same run in fp32: same start, same data, same steps.

Each seed (initial weights and data order) is trained twice by penstock-standalone. The difference of a pair is what
FP8 costs; the spread of the fp32 runs over the seeds says how much of it is chance. A run is one rank on one core
with the spec's batch, and as many run at once as there are cores: losses are measured here, not speed.
"""
import concurrent.futures
import copy
import json
import os
import pathlib
import statistics
import subprocess
import tempfile

DESCRIPTION = "final loss in emulated FP8 beside fp32 from the same start"
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BAR_PERCENT = 0.25


def add_arguments(parser):
    parser.add_argument("--spec", default=str(ROOT / "docs/examples/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the spec's)")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of runs")
    parser.add_argument("--precision", default="fp8", help="fp8, or fp8_hopper: with the short accumulator, slow")
    parser.add_argument("--tail", type=int, default=50, help="last steps whose training loss is averaged")


def resolved_spec(options):
    """The spec with every default written out."""
    done = subprocess.run([str(pathlib.Path(options.build) / "bin/penstock"), "submit", options.spec, "--dry-run",
                           "-o", "json"], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"penstock submit --dry-run exited {done.returncode}: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout)


def on_one_rank(spec):
    layout = spec["parallelism"]
    replicas = layout["expert"] * layout["data"]
    layout.update(pipeline=1, expert=1, data=1, microbatches=layout["microbatches"] * replicas)
    return spec


def train(options, spec, directory, seed, precision, steps):
    """(training losses by step, held-out loss after the last step)"""
    spec = copy.deepcopy(spec)
    spec["training"].update(seed=seed, precision=precision, steps=steps, evaluation_interval=0, evaluation_batches=32)
    spec["schedule"]["warmup_steps"] = min(spec["schedule"]["warmup_steps"], steps)
    if options.lr:
        spec["optimizer"]["lr"] = options.lr
    path = pathlib.Path(directory) / f"{precision}-{seed}.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    done = subprocess.run([str(pathlib.Path(options.build) / "bin/penstock-standalone"), "--spec", str(path),
                           "--evaluate", "--json"], capture_output=True, text=True, timeout=3600)
    if done.returncode != 0:
        raise RuntimeError(f"{precision} run of seed {seed} exited {done.returncode}: {done.stderr.strip()[-400:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    if len(losses) != steps or not held_out:
        raise RuntimeError(f"{precision} run of seed {seed} printed {len(losses)} of {steps} steps")
    return losses, held_out[-1]


def percent(value, base):
    return 100.0 * (value - base) / base


def run(options):
    steps, seed_count = (40, 2) if options.quick else (options.steps, options.seeds)
    tail = min(options.tail, max(1, steps // 5))
    spec = on_one_rank(resolved_spec(options))
    seeds = range(spec["training"]["seed"], spec["training"]["seed"] + seed_count)
    with tempfile.TemporaryDirectory() as directory, \
            concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {(seed, precision): pool.submit(train, options, spec, directory, seed, precision, steps)
                for seed in seeds for precision in (options.precision, "fp32")}
        results = {key: run.result() for key, run in runs.items()}
    finals = {key: (statistics.mean(losses[-tail:]), held_out) for key, (losses, held_out) in results.items()}
    rows, bars = [], []
    for seed in seeds:
        fp32, fp8 = finals[seed, "fp32"], finals[seed, options.precision]
        rows.append({"seed": seed, "steps": steps, "fp32_train": fp32[0], "fp8_train": fp8[0],
                     "difference_%": percent(fp8[0], fp32[0]), "fp32_held_out": fp32[1], "fp8_held_out": fp8[1],
                     "held_out_difference_%": percent(fp8[1], fp32[1])})
    for index, what in ((0, f"training loss of the last {tail} steps"), (1, "held-out loss")):
        fp32 = [finals[seed, "fp32"][index] for seed in seeds]
        fp8 = [finals[seed, options.precision][index] for seed in seeds]
        mean = statistics.mean(fp32)
        spread = 100.0 * (max(fp32) - min(fp32)) / mean
        bars.append({"what": f"{what}, means over {seed_count} seeds, {options.precision} from fp32 (fp32 seeds spread {spread:.2f} %)",
                     "value": abs(percent(statistics.mean(fp8), mean)), "unit": "%", "bar": BAR_PERCENT,
                     "at_least": False})
    return {"rows": rows, "bars": bars}
