"""How long experts take to move (penstock rebalance, a planned restart), and what a step gains.

A cluster of its own (penstock dev up) trains a model whose router is not balanced on purpose, on two expert ranks, one
per core, and is asked to move experts. Measured: from the event `rebalancing`, which ends the epoch, to the first step
of the next one, that step not counted; the steps trained again; and the median step before and after.
"""
import statistics

import train
from cluster import Cluster, seconds

DESCRIPTION = "duration of a planned restart that moves experts, and the step time before and after"
# Free choice among all experts, and no bias that evens it out: what text and seed make of it.
SKEWED = {"model": {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 384},
          "optimizer": {"bias_update_speed": 0},
          "parallelism": {"pipeline": 1, "expert": 2, "schedule": "1f1b", "microbatches": 4},
          "checkpoint": {"interval": 20}}


def add_arguments(parser):
    parser.add_argument("--spec", default=str(train.ROOT / "docs/examples/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=60, help="steps measured before the move, and after it")


def run(options):
    count = 20 if options.quick else options.steps
    with Cluster(options.build, 2) as cluster:
        cluster.submit(options.spec, "skewed", {**SKEWED, "training": {"steps": 100000, "evaluation_interval": 0}})
        cluster.items_when("skewed", "steps", lambda steps: len(steps) >= count + 20)
        plan = cluster.penstock("rebalance", "skewed")
        steps = cluster.items_when("skewed", "steps",
                                   lambda steps: sum(step["epoch"] == 2 for step in steps) >= count + 1)
        moved = next(event for event in cluster.items("skewed", "events") if event["code"] == "rebalancing")
        cluster.penstock("cancel", "skewed")
    before = [step for step in steps if step["epoch"] == 1]
    after = [step for step in steps if step["epoch"] == 2]
    median = [statistics.median(step["step_seconds"] for step in part) for part in (before[-count:], after[1:])]
    restart = seconds(after[0]) - after[0]["step_seconds"] - seconds(moved)
    rows = [{"what": "imbalance of the worst layer, before", "value": plan["imbalance_before"]},
            {"what": "the same, after (planned)", "value": plan["imbalance_after"]},
            {"what": "experts moved", "value": plan["moved"]},
            {"what": "planned restart, s", "value": restart},
            {"what": "steps trained again", "value": sum(step["replayed"] for step in after)},
            {"what": f"median of {count} steps before, s", "value": median[0]},
            {"what": "the same, after, s", "value": median[1]},
            {"what": "after over before", "value": median[1] / median[0]}]
    return {"rows": rows, "bars": []}
