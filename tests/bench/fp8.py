"""Loss of a run in emulated FP8 beside the same run in fp32: same start, same data, same steps.

Each seed (initial weights and data order) is trained three times by penstock-standalone: in fp32, in FP8, and in fp32
from a start rounded to bf16. The last is the control: it costs nothing, so its difference from fp32 is chance, as part
of FP8's is. The final weights are evaluated in both precisions, which tells what training in FP8 loses from what the
roundings of the held-out pass itself cost. A run is one rank on one core with the spec's batch: losses are measured
here, not speed.
"""
import concurrent.futures
import copy
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

DESCRIPTION = "final loss in emulated FP8 beside fp32 from the same start"
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BAR_PERCENT = 0.25
FP32, CONTROL = "fp32", "fp32 from a rounded start"
# Most widths whole tiles of 128, and a third of the spec's learning rate, which ends at 0: less room for chance.
WIDE = {"model": {"hidden_size": 256, "num_hidden_layers": 3, "q_lora_rank": 128, "kv_lora_rank": 128,
                  "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64, "intermediate_size": 512,
                  "moe_intermediate_size": 128},
        "parallelism": {"microbatches": 2, "micro_batch_size": 4},
        "optimizer": {"lr": 1e-3}, "schedule": {"warmup_steps": 40, "min_lr_ratio": 0.0}}


def add_arguments(parser):
    parser.add_argument("--spec", default=str(ROOT / "docs/examples/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the spec's)")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of runs")
    parser.add_argument("--precision", default="fp8", help="fp8, or fp8_hopper: with the short accumulator, slow")
    parser.add_argument("--wide", action="store_true", help="twice as wide, and a learning rate that ends at 0")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
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


def standalone(options, arguments):
    """The lines that penstock-standalone prints."""
    command = [str(pathlib.Path(options.build) / "bin/penstock-standalone"), "--evaluate", "--json"] + arguments
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * 3600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited {done.returncode}: {done.stderr.strip()[-400:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def train(options, spec, directory, seed, what, steps):
    """One run: training loss of the last steps, and by precision the held-out loss of its final weights."""
    spec = copy.deepcopy(spec)
    spec["training"].update(seed=seed, steps=steps, evaluation_interval=0, evaluation_batches=32)
    spec["schedule"]["warmup_steps"] = min(spec["schedule"]["warmup_steps"], steps)
    spec["checkpoint"]["interval"] = 0
    if options.lr:
        spec["optimizer"]["lr"] = options.lr
    folder = pathlib.Path(directory) / f"{what}-{seed}"
    folder.mkdir()
    arguments = {}
    for precision in (FP32, options.precision):
        spec["training"]["precision"] = precision
        path = folder / f"{precision}.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        arguments[precision] = ["--spec", str(path)]
    own = options.precision if what == options.precision else FP32
    lines = standalone(options, arguments[own] + ["--checkpoint-dir", str(folder / "checkpoint")] +
                       (["--round-start"] if what == CONTROL else []))
    losses = [line["loss"] for line in lines if "loss" in line]
    if len(losses) != steps:
        raise RuntimeError(f"the run in {what} of seed {seed} printed {len(losses)} of {steps} steps")
    manifest = next((folder / "checkpoint").glob("*.manifest"))
    result = {"training loss": statistics.mean(losses[-min(options.tail, max(1, steps // 5)):])}
    for precision, spec_arguments in arguments.items():
        again = standalone(options, spec_arguments + ["--restore", str(manifest), "--restore-step", str(steps)])
        result[precision] = again[0]["held_out_loss"]
    print(f"seed {seed}, {what}: " + ", ".join(f"{key} {loss:.4f}" for key, loss in result.items()), file=sys.stderr)
    return result


def percent(value, base):
    return 100.0 * (value - base) / base


def above_fp32(runs, seeds, what, loss, base):
    """(mean over the seeds, its standard error) of how many percent `loss` of a run is above `base` of the fp32 run."""
    differences = [percent(runs[seed, what][loss], runs[seed, FP32][base]) for seed in seeds]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return statistics.mean(differences), error


def spread_percent(runs, seeds, loss):
    values = [runs[seed, FP32][loss] for seed in seeds]
    return f"{100.0 * (max(values) - min(values)) / statistics.mean(values):.2f} %"


def run(options):
    steps, seed_count = (40, 2) if options.quick else (options.steps, options.seeds)
    spec = on_one_rank(resolved_spec(options))
    if options.wide:
        for section, keys in WIDE.items():
            spec[section].update(keys)
    fp8, losses = options.precision, ("training loss", FP32, options.precision)
    kinds = (FP32, fp8, CONTROL)
    seeds = range(spec["training"]["seed"], spec["training"]["seed"] + seed_count)
    with tempfile.TemporaryDirectory() as directory, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        waiting = {(seed, what): pool.submit(train, options, spec, directory, seed, what, steps)
                   for seed in seeds for what in kinds}
        runs = {key: run.result() for key, run in waiting.items()}

    def row(seed, trained_in, values):
        columns = (losses[0], "held out, " + FP32, "held out, " + fp8)
        return {"seed": seed, "trained in": trained_in, **dict(zip(columns, values))}

    rows = [row(seed, what, [runs[seed, what][loss] for loss in losses]) for seed in seeds for what in kinds]
    bars = []
    for what in kinds:
        means = [above_fp32(runs, seeds, what, loss, losses[0] if loss == losses[0] else FP32) for loss in losses]
        rows.append(row("above fp32", what, [f"{mean:.2f} +- {error:.2f} %" for mean, error in means]))
        if what == fp8:
            bars = [{"what": f"{name}, {fp8} from fp32, mean of {seed_count} pairs", "value": abs(mean), "unit": "%",
                     "bar": BAR_PERCENT, "at_least": False}
                    for name, (mean, _) in (("training loss", means[0]), ("held-out loss", means[2]))]
    rows.append(row("spread of seeds", FP32, [spread_percent(runs, seeds, loss) for loss in losses]))
    return {"rows": rows, "bars": bars}
