"""Bubble of every schedule: by formula, in virtual time, on real rank processes, and the ratios.

Virtual time runs the programs that ranks get (penstock program) on a discrete-event clock, so it finds what the
formula leaves out. Seconds are those of operations: F = 1, W = 1, B = 2 and an overlapped pair 3, unless named.

Real is what penstock-timed measures: engine, lanes and UCX as in production, one process per rank, every boundary
tensor sent; only compute is waits on absolute deadlines, so that 32 ranks need little of two cores. A step lasts from
the first pass that any rank begins to the last that any rank ends; the bubble is what a rank did not compute of it.

Each pipeline is run with two costs of the sub-operations, equal in all that publications count. "at the end": all
weight gradients come before attn(B), so that a pass hands over at its end, as the published formulas suppose.
"before the tail": each sub-operation takes F/2, and output and gradient leave before the last one, attn(W), as the
engine sends them; formula and virtual time leave out that tail where they wait for a neighbour.
"""
import json
import pathlib
import statistics
import subprocess
import tempfile

import timed

DESCRIPTION = "bubble of each schedule: formula, virtual time, real processes"
SHARE_OF_DUALPIPE_MAX = 9.5  # percent of the step, 8 ranks, 20 micro-batches
RATIO_MAX = 1.1
SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev")

# By when results leave: what is left of a backward or pair then, and what the sub-operations take.
HALVES = {name: 0.5 for name in timed.COMPUTE}
HAND_OVERS = {"at the end": (0.0, {**HALVES, "mlp(W)": 1.0, "attn(W)": 0.0}), "before the tail": (0.5, HALVES)}

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
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, choices=SCHEDULES)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="pipeline depths")


def spec(schedule, ranks, microbatches):
    """A job whose pipeline is this one; what its layers are does not matter here."""
    return MODEL + f"parallelism: {{pipeline: {ranks}, schedule: {schedule}, microbatches: {microbatches}}}\n"


def cases(options):
    """(schedule, ranks, micro-batches), all with as many stages as ranks but dualpipev, which has twice as many."""
    depths = [8] if options.quick else options.ranks
    return [(schedule, ranks, microbatches) for schedule in options.schedules
            for ranks in depths for microbatches in (2 * ranks, 2 * ranks + 4, 8 * ranks)]


def in_virtual_time(options, schedule, ranks, microbatches, pair, tail):
    """Document of `penstock program` for that pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "job.yaml"
        path.write_text(spec(schedule, ranks, microbatches), encoding="utf-8")
        command = [str(pathlib.Path(options.build) / "bin/penstock"), "program", str(path), "--pair", str(pair),
                   "--backward-tail", str(tail), "--pair-tail", str(tail), "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"penstock program exited {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def real_bubble(options, schedule, ranks, microbatches, costs):
    """Of a run of real processes, in forward passes: median over its steps but the first."""
    steps = 2 if options.quick else options.steps
    measured = timed.run_timed(
        options.build, ["--schedule", schedule, "--pipeline", ranks, "--microbatches", microbatches, "--steps", steps],
        {name: options.unit_ms * cost for name, cost in costs.items()})
    bubbles = []
    for step in range(1, steps):
        span = max(r[step]["end_ns"] for r in measured) - min(r[step]["begin_ns"] for r in measured)
        bubbles.append(span - measured[0][step]["busy_ns"])
    return statistics.median(bubbles) / (1e6 * options.unit_ms)


def row_of(options, schedule, ranks, microbatches, pair, hands_over):
    tail, costs = HAND_OVERS[hands_over]
    plan = in_virtual_time(options, schedule, ranks, microbatches, pair, tail)
    published = in_virtual_time(options, schedule, ranks, microbatches, pair, 0.0)["bubble_by_formula"]
    formula, bubble = plan["bubble_by_formula"], plan["bubble"]
    # One number of micro-batches a depth: no bubble grows with them. Timed ranks compute one operation at a time.
    is_real = microbatches == 2 * ranks + 4 and pair == 3.0
    real = real_bubble(options, schedule, ranks, microbatches, costs) if is_real else None
    busy = plan["makespan"] - bubble
    return {"schedule": schedule, "ranks": ranks, "stages": plan["stages"], "microbatches": microbatches,
            "hands over": hands_over, "published": published, "formula": formula, "virtual": bubble,
            "virtual/formula": bubble / formula if formula else 1.0, "real": real if is_real else "",
            "real/virtual": real / bubble if is_real and bubble else "",
            "real/published": real / published if is_real and published else "",
            "share_percent": 100 * bubble / plan["makespan"],
            "real_share_percent": 100 * real / (busy + real) if is_real else "",
            "live_max": max(rank["live_activations_max"] for rank in plan["pipeline_ranks"])}


def farthest(ratios):
    """The ratio farthest from 1, as what is above 1; None where there is none."""
    return max((max(ratio, 1 / ratio) for ratio in ratios), default=None)


def run(options):
    hand_overs = list(HAND_OVERS) if options.pair == 3.0 else ["at the end"]  # the tail is a share of a whole pair
    rows = [row_of(options, *case, options.pair, hands_over) for case in cases(options) for hands_over in hand_overs]
    bars = [{"what": "virtual time over formula, farthest from 1", "unit": "x", "bar": RATIO_MAX, "at_least": False,
             "value": farthest(row["virtual/formula"] for row in rows)}]
    for hands_over in hand_overs:
        real = [row["real/virtual"] for row in rows if row["hands over"] == hands_over and row["real/virtual"] != ""]
        bars.append({"what": f"real processes over virtual time, hand-over {hands_over}, farthest from 1", "unit": "x",
                     "value": farthest(real), "bar": RATIO_MAX, "at_least": False})
    for row in rows:
        if (row["schedule"], row["ranks"], row["microbatches"]) == ("dualpipe", 8, 20):
            for key, where in (("share_percent", "virtual time"), ("real_share_percent", "real processes")):
                bars.append({"what": f"dualpipe, 8 ranks, 20 micro-batches: share of the step, {where}, hand-over "
                             f"{row['hands over']}", "unit": "%", "bar": SHARE_OF_DUALPIPE_MAX, "at_least": False,
                             "value": None if row[key] == "" else row[key]})
    return {"rows": rows, "bars": bars}
