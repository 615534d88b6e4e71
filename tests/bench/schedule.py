"""Bubble of every schedule: by formula, in virtual time, and the ratio of the two.

Virtual time runs the programs that ranks get (penstock program) on a discrete-event clock, so it finds what the
formula leaves out. Seconds are those of operations: F = 1, W = 1, B = 2 and an overlapped pair 3, unless named.
"""
import json
import pathlib
import subprocess
import tempfile

DESCRIPTION = "bubble of each schedule: formula and virtual time"
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


def spec(schedule, ranks, microbatches):
    """A job whose pipeline is this one; what its layers are does not matter here."""
    return MODEL + f"parallelism: {{pipeline: {ranks}, schedule: {schedule}, microbatches: {microbatches}}}\n"


def cases(quick):
    """(schedule, ranks, micro-batches), all with as many stages as ranks but dualpipev, which has twice as many."""
    depths = [4, 8] if quick else [2, 4, 8, 16, 32]
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


def row_of(options, schedule, ranks, microbatches, pair):
    plan = in_virtual_time(options, schedule, ranks, microbatches, pair)
    formula, bubble = plan["bubble_by_formula"], plan["bubble"]
    return {"schedule": schedule, "ranks": ranks, "stages": plan["stages"], "microbatches": microbatches, "pair": pair,
            "formula": formula, "virtual": bubble, "virtual/formula": bubble / formula if formula else 1.0,
            "share_percent": 100 * bubble / plan["makespan"],
            "live_max": max(rank["live_activations_max"] for rank in plan["pipeline_ranks"])}


def run(options):
    rows = [row_of(options, *case, options.pair) for case in cases(options.quick)]
    worst = max(abs(row["virtual/formula"] - 1) for row in rows) + 1
    published = row_of(options, "dualpipe", 8, 20, 3.0)
    return {"rows": rows, "bars": [
        {"what": "dualpipe, 8 ranks, 20 micro-batches, pair 3: bubble's share of the step", "unit": "%",
         "value": published["share_percent"], "bar": SHARE_OF_DUALPIPE_MAX, "at_least": False},
        {"what": "worst ratio of virtual time to formula", "unit": "x", "value": worst, "bar": RATIO_MAX,
         "at_least": False}]}
