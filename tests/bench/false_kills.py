"""Whether a disturbed cluster kills what is healthy, and misses what is not: a part of recovery.py.

A job trains while one thing disturbs its host or its coordinator, for --minutes each. Every attempt that ends meanwhile
is false: its ranks were healthy. Then, up to a fifth of that time later, one rank is killed (SIGKILL) with the
disturbance going on; that must be noticed.
"""
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

from cluster import Cluster, PATIENCE_SECONDS, seconds
from network_cluster import NetworkCluster

RANKS, WORKERS, DEVICES = 8, 5, 2
BUSY = "while True: pass"
WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_DSYNC)
block, at = os.urandom(1 << 20), 0
while True:
    os.pwrite(fd, block, at)
    at = (at + len(block)) % (64 << 20)
"""


@contextlib.contextmanager
def processes(commands):
    started = [subprocess.Popen(command) for command in commands]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


@contextlib.contextmanager
def nothing(_):
    yield


def busy_cores(_):
    return processes([[sys.executable, "-c", BUSY] for _ in range(os.cpu_count())])


def synced_writes(cluster):
    """On the file system of the state folder, two at a time."""
    return processes([[sys.executable, "-c", WRITER, f"{cluster.folder.name}/written-{i}"] for i in range(2)])


def stopped_coordinator(span):
    """Stopped for `span` seconds, then for as long (at least 3 s) not, and so on."""
    @contextlib.contextmanager
    def disturb(cluster):
        pid, over = cluster.coordinator_pid(), threading.Event()

        def stop_and_go():
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(span)
                os.kill(pid, signal.SIGCONT)
                over.wait(max(span, 3.0))
        thread = threading.Thread(target=stop_and_go)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
    return disturb


class DevCluster(Cluster):
    def coordinator_pid(self):
        return next(p["pid"] for p in self.penstock("dev", "status")["processes"] if p["name"] == "coordinator")


DISTURBANCES = (
    ("nothing", DevCluster, nothing),
    ("every core busy", DevCluster, busy_cores),
    ("synchronous writes beside the state", DevCluster, synced_writes),
    ("coordinator stopped for 1 s", DevCluster, stopped_coordinator(1.0)),
    ("coordinator stopped for 5 s", DevCluster, stopped_coordinator(5.0)),
    ("coordinator stopped for 30 s", DevCluster, stopped_coordinator(30.0)),
    ("20% of packets lost", lambda *arguments: NetworkCluster(*arguments, apart=False, loss=0.2), nothing),
)


def attempts_ended(cluster, run):
    """Events that ended an attempt of the job."""
    return [e for e in cluster.items(run.name, "events") if e["state"] in ("RECOVERING", "STOPPING", "FAILED") and e["from"]]


def longest_gap(steps):
    times = [seconds(step) for step in steps]
    return max((b - a for a, b in zip(times, times[1:])), default=0.0)


def measure(bench, make_run, minutes):
    """`make_run(cluster, name, steps)`: a job that trains, as recovery.Run."""
    killed, missed, rows = 0, 0, 0
    with concurrent.futures.ThreadPoolExecutor(bench.options.at_once) as pool:
        results = [pool.submit(measure_one, bench, make_run, minutes, make_cluster, disturb)
                   for _, make_cluster, disturb in DISTURBANCES]
    for (name, make_cluster, _), result in zip(DISTURBANCES, results):
        try:
            ours, noticed, gap = result.result()
        except RuntimeError as error:
            if make_cluster is DevCluster:
                raise
            print(f"ops/bench recovery: {name}: not measured: {error}", file=sys.stderr)
            bench.bar(f"false kills, {name}: healthy ranks killed", "", None, 0)
            continue
        bench.row(f"{name}: healthy ranks killed", "", [ours], 0)
        bench.row(f"{name}: killed rank noticed after", "s", [noticed])
        bench.row(f"{name}: longest time between two steps before that", "s", [gap])
        killed, missed, rows = killed + ours, missed + (noticed is None), rows + 1
    bench.bar(f"{rows} disturbances of {minutes:g} minutes each: healthy ranks killed", "", killed, 0)
    bench.bar("the same: ranks that were killed and it was not noticed", "", missed, 0)


def measure_one(bench, make_run, minutes, make_cluster, disturb):
    """Healthy ranks killed; after how long the one that was killed on purpose was noticed (None: not); longest step."""
    with make_cluster(bench.options.build, DEVICES, WORKERS) as cluster:
        run = make_run(cluster, "disturbed", 1_000_000)
        run.wait("the first steps", lambda: run.reached() >= 20)
        with disturb(cluster):
            # Not by asking a coordinator, which would answer only while it is not stopped.
            time.sleep(60 * minutes * (1 + bench.random.random() / 5))
            victim = bench.random.randrange(RANKS)
            fault = time.time()
            os.kill(cluster.rank_pid(victim), signal.SIGKILL)

            def named():  # a rank that lost its peer may be heard first
                return (cluster.get(f"jobs/{run.name}")["last_failure"] or {}).get("rank") == victim
            found = run.wait("the failure", named, patience=PATIENCE_SECONDS - 1)
            run.wait("steps after the fault", lambda: any(seconds(step) > fault + 1 for step in run.steps))
        after = [e for e in attempts_ended(cluster, run) if seconds(e) >= fault - 0.002]
        noticed = seconds(after[0]) - fault if found and after else None
        false = [e for e in attempts_ended(cluster, run) if seconds(e) < fault - 0.002]
        for e in false:
            print(f"ops/bench recovery: ended while healthy: {e['time']} {e['code']}: {e['message']}", file=sys.stderr)
        return RANKS * len(false), noticed, longest_gap([s for s in run.steps if seconds(s) < fault])
