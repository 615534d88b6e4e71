"""How long experts take to move (penstock rebalance, a planned restart), and what a step gains.

A cluster of its own (penstock dev up) trains a model whose router is not balanced on purpose, on two expert ranks, one
per core, and is asked to move experts. Measured: from the event `rebalancing`, which ends the epoch, to the first step
of the next one, that step not counted; the steps trained again; and the median step before and after.
"""
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
import urllib.request

import train

DESCRIPTION = "duration of a planned restart that moves experts, and the step time before and after"
PATIENCE_SECONDS = 240
# Free choice among all experts, and no bias that evens it out: what text and seed make of it.
SKEWED = {"model": {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 384},
          "optimizer": {"bias_update_speed": 0},
          "parallelism": {"pipeline": 1, "expert": 2, "schedule": "1f1b", "microbatches": 4},
          "checkpoint": {"interval": 20}}


def add_arguments(parser):
    parser.add_argument("--spec", default=str(train.ROOT / "docs/examples/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=60, help="steps measured before the move, and after it")


class Cluster:
    """penstock dev up in a folder that is gone afterwards, with everything that runs in it."""

    def __init__(self, options):
        self.program = str(pathlib.Path(options.build) / "bin/penstock")

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.environment = dict(os.environ, PENSTOCK_DEV_STATE_DIR=self.folder.name)
        try:
            up = self.penstock("dev", "up", "--workers", "1", "--devices-per-worker", "2", "--port", "0")
            self.server = up["server"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        subprocess.run([self.program, "dev", "down"], env=self.environment, capture_output=True, timeout=60)
        self.folder.cleanup()

    def penstock(self, *arguments):
        done = subprocess.run([self.program, *arguments, "-o", "json"], env=self.environment, capture_output=True,
                              text=True, timeout=60)
        if done.returncode != 0:
            raise RuntimeError(f"penstock {' '.join(arguments)} exited {done.returncode}: {done.stderr.strip()[-400:]}")
        return json.loads(done.stdout)

    def items(self, path):
        with urllib.request.urlopen(f"{self.server}/api/v1/jobs/skewed/{path}?limit=10000", timeout=30) as answer:
            return json.load(answer)["items"]

    def steps_when(self, enough):
        """The job's step items as soon as `enough` of them."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            steps = self.items("steps")
            if enough(steps):
                return steps
            time.sleep(0.2)
        raise RuntimeError(f"no such steps in {PATIENCE_SECONDS} s, at {steps[-1:]}")


def seconds(item):
    return time.mktime(time.strptime(item["time"][:19], "%Y-%m-%dT%H:%M:%S")) + float(item["time"][19:-1])


def run(options):
    count = 20 if options.quick else options.steps
    with Cluster(options) as cluster, tempfile.TemporaryDirectory() as folder:
        spec = cluster.penstock("submit", options.spec, "--dry-run")
        for section, keys in SKEWED.items():
            spec[section].update(keys)
        spec["metadata"]["name"] = "skewed"
        spec["training"].update(steps=100000, evaluation_interval=0)
        path = pathlib.Path(folder) / "job.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        cluster.penstock("submit", str(path))
        cluster.steps_when(lambda steps: len(steps) >= count + 20)
        plan = cluster.penstock("rebalance", "skewed")
        steps = cluster.steps_when(lambda steps: sum(step["epoch"] == 2 for step in steps) >= count + 1)
        moved = next(event for event in cluster.items("events") if event["code"] == "rebalancing")
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
