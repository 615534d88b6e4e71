"""Whether a disturbed cluster kills what is healthy, and misses what is not: a part of recovery.py.

A job trains while one thing disturbs its host or its coordinator, for --minutes each. Every attempt that ends meanwhile
is false: its ranks were healthy. In the last third of the time one rank is killed (SIGKILL), at a random moment, with the
disturbance going on; that must be noticed.
"""
import contextlib
import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

from cluster import Cluster, PATIENCE_SECONDS, seconds

RANKS, WORKERS, DEVICES = 8, 5, 2
CLONE_NEWNET = 0x40000000
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


class LossyCluster(Cluster):
    """The coordinator on one host, all workers on another; what they say to each other crosses a link that loses a
    share of all packets, both ways. The ranks' own traffic does not leave their host. This process looks on from the
    coordinator's."""

    def __init__(self, build, devices, workers, loss):
        super().__init__(build, devices, workers)
        self.bin, self.loss, self.running = pathlib.Path(build) / "bin", loss, []

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.home = os.open("/proc/self/ns/net", os.O_RDONLY)
        try:
            self.network = subprocess.Popen([str(self.bin / "penstock-lossy-network"), "--loss", str(self.loss)],
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            line = self.network.stdout.readline()
            if not line:
                raise RuntimeError("no network that loses packets here: it needs root, or the right to make namespaces")
            hosts = [f"/proc/{pid}/ns/net" for pid in json.loads(line)["members"]]
            enter_namespace(hosts[0])
            endpoints = self.start_coordinator()
            enter_namespace(hosts[1])
            for i in range(self.workers):
                self.spawn(f"worker-{i}", "penstock-worker", "--coordinator",
                           f"tcp://10.73.0.1:{endpoints['control_port']}", "--devices", str(self.devices), "--name",
                           f"worker-{i}", "--data-interface", "lo", "--http-port", "0")
            enter_namespace(hosts[0])
            self.server = f"http://10.73.0.1:{endpoints['http_port']}"
            self.environment = dict(os.environ, PENSTOCK_SERVER=self.server)
            wait_for("every worker", lambda: len(self.get("workers")["items"]) == self.workers)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self.running:
            process.kill()
            process.wait()
        enter_namespace(self.home)
        self.network.stdin.close()
        self.network.wait()
        os.close(self.home)
        self.folder.cleanup()

    def spawn(self, name, program, *arguments):
        with open(f"{self.folder.name}/{name}.log", "a", encoding="utf-8") as log:
            self.running.append(subprocess.Popen([str(self.bin / program), "--state-dir", f"{self.folder.name}/{name}",
                                                  *arguments], stdout=log, stderr=log))

    def start_coordinator(self):
        self.spawn("coordinator", "penstock-coordinator", "--bind", "10.73.0.1", "--http-port", "0", "--control-port",
                   "0")
        path = pathlib.Path(self.folder.name) / "coordinator/endpoints.json"
        wait_for("the coordinator", path.exists)
        return json.loads(path.read_text(encoding="utf-8"))


def enter_namespace(which):
    """Of this thread, and of what it starts."""
    fd = which if isinstance(which, int) else os.open(which, os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        raise RuntimeError(f"enter a network namespace: {os.strerror(ctypes.get_errno())}")
    if not isinstance(which, int):
        os.close(fd)


def wait_for(what, there):
    end = time.monotonic() + PATIENCE_SECONDS
    while not there():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not come in {PATIENCE_SECONDS} s")
        time.sleep(0.02)


DISTURBANCES = (
    ("nothing", DevCluster, nothing),
    ("every core busy", DevCluster, busy_cores),
    ("synchronous writes beside the state", DevCluster, synced_writes),
    ("coordinator stopped for 1 s", DevCluster, stopped_coordinator(1.0)),
    ("coordinator stopped for 5 s", DevCluster, stopped_coordinator(5.0)),
    ("coordinator stopped for 30 s", DevCluster, stopped_coordinator(30.0)),
    ("20% of packets lost", lambda *arguments: LossyCluster(*arguments, loss=0.2), nothing),
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
    for name, make_cluster, disturb in DISTURBANCES:
        try:
            ours, noticed, gap = measure_one(bench, make_run, minutes, make_cluster, disturb)
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
            time.sleep(60 * minutes * (2 + bench.random.random()) / 3)
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
