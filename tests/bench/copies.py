"""What copies of ranks' state in other workers' memory (recovery.mirror) cost a step, and what they save when a worker
daemon is killed: runs with and without them in turn, of a job that saves so rarely that only copies are recent."""
import statistics

STEPS = 400  # of a run that is timed
WARM_UP = 20
INTERVAL = 100  # steps between checkpoints of the job whose daemons are killed
STRETCH = 60  # steps from one kill to the next
SIDES = {"without copies": {"mirror": 0}, "with copies": {"mirror": "auto"}}


def measure(bench, new_cluster, new_run, recover):
    """`new_run(cluster, name, steps, interval, recovery)` submits the job; `recover(run, fault)` as in recovery.py."""
    with new_cluster() as cluster:
        times = {side: [] for side in SIDES}
        for turn in range(bench.rounds):
            for side, recovery in SIDES.items():
                run = new_run(cluster, f"timed-{turn}-{recovery['mirror']}", STEPS, 0, recovery)
                run.wait_state("SUCCEEDED")
                times[side].append(statistics.median(step["step_seconds"] for step in run.steps[WARM_UP:]))
        for side, medians in times.items():
            bench.row(f"step {side}", "s", medians)
        steps = INTERVAL // 2 + bench.repeats * STRETCH + STRETCH
        expected = new_run(cluster, "undisturbed", steps, INTERVAL, {}).outcome()
        for side, recovery in SIDES.items():
            run = new_run(cluster, f"killed-{recovery['mirror']}", steps, INTERVAL, recovery)
            paths = [recover(run, lambda turn=turn, run=run: kill_one(bench, cluster, run, turn))
                     for turn in range(bench.repeats)]
            for what, key, unit in (("ranks placed", "placed", "s"), ("every rank ready", "running", "s"),
                                    ("next finished step", "beyond", "s"), ("steps replayed", "replayed", "")):
                bench.row(f"worker daemon killed, {side}: {what}", unit, [path[key] for path in paths])
            bench.bar(f"daemons killed, {side}: weights and all losses equal to the undisturbed run's", "of 1",
                      int(run.outcome() == expected), 1, at_least=True)


def kill_one(bench, cluster, run, turn):
    """A daemon that runs ranks, when training has gone on for a while; the one that was killed before is back."""
    cluster.up()
    step = INTERVAL // 2 + turn * STRETCH + bench.random.randrange(STRETCH // 2)
    run.wait(f"step {step}", lambda: run.reached() >= step)
    return cluster.kill(bench.random.choice(cluster.get(f"jobs/{run.name}")["ranks"])["worker"])
