"""Bubble of every schedule: by formula, in virtual time, on real rank processes, and the ratios.

Virtual time runs the programs that ranks get (penstock program) on a discrete-event clock, so it finds what the
formula leaves out. Seconds are those of operations: F = 1, W = 1, B = 2 and an overlapped pair 3, unless named.

Real is what penstock-timed measures: engine, lanes and UCX as in production, one process per rank, every boundary
tensor sent; only compute is waits on absolute deadlines, so that 32 ranks need little of two cores. A step lasts from
the first pass that any rank begins to the last that any rank ends; the bubble is what a rank did not compute of it.
"""
import json
import pathlib
import statistics
import subprocess
import tempfile

import timed

DESCRIPTION = "bubble of each schedule: formula, virtual time, real processes"
REAL_MICROBATCHES_MAX = 64  # more take minutes and show nothing new: no bubble grows with their number
SHARE_OF_DUALPIPE_MAX = 9.5  # percent of the step, 8 ranks, 20 micro-batches
RATIO_MAX = 1.1

MODEL = """apiVersion: penstock/v1
kind: TrainingRun
metadata: {name: bubble}
model:
  {vocab_size: 257, hidden_size: 8, num_hidden_layers: 64, num_attention_heads: 1, kv_lora_rank: 8,
   qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8, intermediate_size: 8, first_k_dense_replace: 64,
   moe_intermediate_size: 8, n_routed_experts: 1, n_shared_experts: 0, num_experts_per_tok: 1}
data: {train: [none], tokenizer: bytes, seq_length: 1}
optimizer: {lr: 1.0e-3}
training: {steps: 1}
"""


def add_arguments(parser):
    parser.add_argument("--pair", type=float, default=3.0, help="seconds of an overlapped pair (3: nothing gained)")
    parser.add_argument("--unit-ms", type=float, default=25.0, help="what a forward pass of a real rank takes")
    parser.add_argument("--steps", type=int, default=3, help="of a real run; the first is dropped")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="pipeline depths")


def spec(schedule, ranks, microbatches):
    """A job whose pipeline is this one; what its layers are does not matter here."""
    return MODEL + f"parallelism: {{pipeline: {ranks}, schedule: {schedule}, microbatches: {microbatches}}}\n"


def cases(options):
    """(schedule, ranks, micro-batches), all with as many stages as ranks but dualpipev, which has twice as many."""
    depths = [4, 8] if options.quick else options.ranks
    return [(schedule, ranks, microbatches) for schedule in ("1f1b", "zb1p", "dualpipe", "dualpipev")
            for ranks in depths for microbatches in (2 * ranks, 2 * ranks + 4, 8 * ranks)]


def in_virtual_time(options, schedule, ranks, microbatches, pair):
    """Document of `penstock program` for that pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "job.yaml"
        path.write_text(spec(schedule, ranks, microbatches), encoding="utf-8")
        done = subprocess.run([str(pathlib.Path(options.build) / "bin/penstock"), "program", str(path),
                               "--pair", str(pair), "-o", "json"], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"penstock program exited {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def real_bubble(options, schedule, ranks, microbatches):
    """Of a run of real processes, in forward passes: median over its steps but the first."""
    steps = 2 if options.quick else options.steps
    measured = timed.run_timed(
        options.build, ["--schedule", schedule, "--pipeline", ranks, "--microbatches", microbatches, "--steps", steps],
        {name: options.unit_ms / 2 for name in timed.COMPUTE})
    bubbles = []
    for step in range(1, steps):
        span = max(r[step]["end_ns"] for r in measured) - min(r[step]["begin_ns"] for r in measured)
        bubbles.append(span - measured[0][step]["busy_ns"])
    return statistics.median(bubbles) / (1e6 * options.unit_ms)


def is_run_for_real(options, schedule, ranks, microbatches, pair):
    chosen = microbatches == 2 * ranks + 4 if options.quick else microbatches <= REAL_MICROBATCHES_MAX
    return chosen and pair == 3.0  # timed ranks compute one operation at a time


def row_of(options, schedule, ranks, microbatches, pair):
    plan = in_virtual_time(options, schedule, ranks, microbatches, pair)
    formula, bubble = plan["bubble_by_formula"], plan["bubble"]
    real = real_bubble(options, schedule, ranks, microbatches) if is_run_for_real(
        options, schedule, ranks, microbatches, pair) else None
    busy = plan["makespan"] - bubble
    return {"schedule": schedule, "ranks": ranks, "stages": plan["stages"], "microbatches": microbatches, "pair": pair,
            "formula": formula, "virtual": bubble, "virtual/formula": bubble / formula if formula else 1.0,
            "real": "" if real is None else real,
            "real/formula": real / formula if real is not None and formula else "",
            "share_percent": 100 * bubble / plan["makespan"],
            "real_share_percent": "" if real is None else 100 * real / (busy + real),
            "live_max": max(rank["live_activations_max"] for rank in plan["pipeline_ranks"])}


def run(options):
    rows = [row_of(options, *case, options.pair) for case in cases(options)]
    worst = max(abs(row["virtual/formula"] - 1) for row in rows) + 1
    real = [row["real/formula"] for row in rows if row["real/formula"] != ""]
    published = row_of(options, "dualpipe", 8, 20, 3.0)
    return {"rows": rows, "bars": [
        {"what": "dualpipe, 8 ranks, 20 micro-batches, pair 3: bubble's share of the step", "unit": "%",
         "value": published["share_percent"], "bar": SHARE_OF_DUALPIPE_MAX, "at_least": False},
        {"what": "worst ratio of virtual time to formula", "unit": "x", "value": worst, "bar": RATIO_MAX,
         "at_least": False},
        {"what": "the same share on real processes", "unit": "%", "value": published["real_share_percent"],
         "bar": SHARE_OF_DUALPIPE_MAX, "at_least": False},
        {"what": "worst ratio of real processes to formula", "unit": "x", "value": max(real, default=None),
         "bar": RATIO_MAX, "at_least": False}]}
