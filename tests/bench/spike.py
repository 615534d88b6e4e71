"""Garbage in the data at known steps: what it costs a run, and a run with guards (docs/job-spec.md, `guards`).

One model, seed and spec, trained under a cluster of its own (penstock dev up): on clean data; on a copy in which all that
some steps read is random bytes (penstock-poison), without guards, with policy skip, and with policy rollback; and on clean
data with the guards, which must then do nothing. Compared: held-out loss after the last step.
"""
import json
import pathlib
import subprocess

import train
from cluster import Cluster

DESCRIPTION = "a loss spike by poisoned data: final loss without guards, with skip, with rollback"
SPIKE = {"sigmas": 8, "window": 64}


def add_arguments(parser):
    parser.add_argument("--spec", default=str(train.ROOT / "docs/examples/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--poisoned", type=int, default=8, help="steps that read garbage, from five sixths of the run on")


def finish(cluster, name):
    """The job once it has ended."""
    end = cluster.items_when(name, "events", lambda events: any(e["state"] in ("SUCCEEDED", "FAILED") for e in events))
    job = cluster.get(f"jobs/{name}")
    if job["state"] != "SUCCEEDED":
        raise RuntimeError(f"{name} is {job['state']}: {end[-1]['message']}")
    return job


def row_of(cluster, name, job, clean):
    newest = {step["step"]: step for step in cluster.items(name, "steps")}
    out = [n for n, step in sorted(newest.items()) if step["guard"] and step["guard"]["action"] == "skip"]
    loss = job["evaluations"][-1]["loss"]
    losses = [step["loss"] for step in newest.values() if step["loss"] is not None]
    return {"run": name, "held-out loss": loss, "beside clean, %": 100 * (loss / (clean or loss) - 1),
            "largest loss of the last quarter": max(losses[-len(losses) // 4:]),
            "steps left out": f"{out[0]}-{out[-1]}" if out else "none", "rollbacks": len(job["guards"]["rollbacks"])}


def run(options):
    steps = 120 if options.quick else options.steps
    first = steps * 5 // 6
    last = first + options.poisoned - 1
    changes = {"training": {"steps": steps, "evaluation_interval": 0}, "checkpoint": {"interval": 10, "keep_last": 4}}
    guards = {"skip": {"loss_spike": {"policy": "skip", **SPIKE}},
              "rollback": {"loss_spike": {"policy": "rollback", **SPIKE}, "rollback_steps": 4,
                           "max_rollbacks": options.poisoned}}
    rows = []
    with Cluster(options.build, 4) as cluster:
        clean = cluster.spec(options.spec, "clean", changes)
        path = pathlib.Path(cluster.folder.name) / "spec.json"
        path.write_text(json.dumps(clean), encoding="utf-8")
        poisoned = pathlib.Path(cluster.folder.name) / "poisoned"
        subprocess.run([str(pathlib.Path(options.build) / "bin/penstock-poison"), str(path), str(poisoned),
                        "--first", str(first), "--last", str(last)], check=True, timeout=60)
        data = {"data": {"train": [{"path": str(poisoned), "weight": 1.0}]}}
        runs = [("clean", {}), ("unguarded", data), ("skip", {**data, "guards": guards["skip"]}),
                ("rollback", {**data, "guards": guards["rollback"]}), ("clean-guarded", {"guards": guards["rollback"]})]
        for name, more in runs:
            cluster.submit(options.spec, name, {**changes, **more})
            rows.append(row_of(cluster, name, finish(cluster, name), rows[0]["held-out loss"] if rows else None))
    beside = {row["run"]: abs(row["beside clean, %"]) for row in rows}
    return {"rows": rows,
            "bars": [{"what": f"poisoned at steps {first} to {last}, policy {name}: held-out loss beside the clean run's",
                      "value": beside[name], "unit": "%", "bar": 1.0, "at_least": False} for name in ("skip", "rollback")]
            + [{"what": "clean data with guards: the same", "value": beside["clean-guarded"], "unit": "%", "bar": 0.0,
                "at_least": False}]}
