"""How long a run stands still after a fault, and what it loses, beside torchrun.

One job of 8 ranks trains under a cluster of its own and takes every fault, one after the other, each at a random moment
of a random step; at the end its weights and every loss must be those of a run that was left alone.

ranks        a rank is killed (SIGKILL)            native   beside ranks: torchrun, the same number of idle C programs
daemons      a worker daemon is killed; a spare    trainer  beside ranks: torchrun, PyTorch that saves every step
             worker takes over                     node     beside daemons: torchrun, one of two agents is killed
coordinator  killed, and started again at once     stop     a rank is stopped (SIGSTOP)
partition    the host of a worker with ranks is cut off from all others, on a network of namespaces; then healed
durability   killed 0 to 5 s after it answered a submission, and started again: is the job there?
false-kills  busy cores, synchronous writes, a stopped coordinator, lost packets: is anything killed that is healthy, and
             a killed rank missed? Only where --only names it: with the default --minutes it takes over an hour
copies       runs with and without copies of the state in other workers' memory: cost of a step, and daemons killed. Only
             where --only names it

native, trainer and node need --torch-python and take turns with the parts they stand beside; --quick leaves the last
two out, since eight processes that import PyTorch take longer than it may.
"""
import contextlib
import http.client
import os
import pathlib
import random
import re
import signal
import socket
import statistics
import sys
import tempfile
import time

import copies
import false_kills
from cluster import Cluster, PATIENCE_SECONDS, seconds
from network_cluster import NetworkCluster, wait_for
from peer_torchrun import Torchrun, idle_rank

DESCRIPTION = "time from a fault to the next finished step, steps replayed, jobs lost, beside torchrun"
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FAULTS = ("ranks", "daemons", "coordinator", "stop")
BESIDE = {"native": "ranks", "trainer": "ranks", "node": "daemons"}
PARTS = (*FAULTS, "partition", "durability", *BESIDE)
LONG_PARTS = ("false-kills", "copies")
RANKS, WORKERS, DEVICES = 8, 5, 2  # one worker is the spare
TRAINER_KILLS = 2  # a round: each takes as long as PyTorch takes to start
HANG_TIMEOUT_SECONDS = 3  # of the job, whose steps take some 0.03 s
FIRST_FAULT_STEP = 12  # after the first checkpoint
# Steps from one fault to the next: so many that what a fault brings about is over, and training goes on.
STRETCH = {"ranks": 20, "daemons": 40, "coordinator": 60, "stop": 20, "partition": 40}
GONE = (OSError, http.client.HTTPException)  # how a coordinator looks that is not there


def add_arguments(parser):
    parser.add_argument("--spec", default=str(ROOT / "docs/examples/quickstart.yaml"))
    parser.add_argument("--torch-python", help="a Python that imports torch 2: also measure torchrun")
    parser.add_argument("--only", default=",".join(PARTS),
                        help="comma separated; default: %(default)s; there is also " + ", ".join(LONG_PARTS))
    parser.add_argument("--minutes", type=float, help="of each disturbance of false-kills (10, 0.05 with --quick)")
    parser.add_argument("--at-once", type=int, default=1, help="disturbances of false-kills side by side, each with a "
                                                               "cluster of its own; default: %(default)s")
    parser.add_argument("--kills", type=int, help="of ranks (default: 30, 3 with --quick)")
    parser.add_argument("--repeats", type=int, help="of the other faults (default: 5, 1 with --quick)")
    parser.add_argument("--submissions", type=int, help="default: 200, 3 with --quick")
    parser.add_argument("--rounds", type=int, help="turns that ours and torchrun take (default: 3, 1 with --quick)")
    parser.add_argument("--interval", type=int, default=10, help="steps between checkpoints; default: %(default)s")
    parser.add_argument("--stop-seconds", type=float, help="how long a stopped rank is waited for (20, 4 with --quick)")
    parser.add_argument("--seed", type=int, default=1)


class Run:
    """A job and what is known of its steps and events."""

    def __init__(self, cluster, spec, name, steps, interval, recovery=None):
        self.cluster, self.name, self.steps = cluster, name, []
        # The quickstart's model on twice its ranks, with a quarter of its tokens: 512 a step.
        self.id = cluster.submit(spec, name, {
            "data": {"seq_length": 32}, "parallelism": {"pipeline": 4, "expert": 2, "microbatches": 8,
                                                        "micro_batch_size": 1},
            "training": {"steps": steps, "evaluation_interval": 0}, "checkpoint": {"interval": interval},
            "recovery": {"max_restarts": 100000, "hang_timeout": HANG_TIMEOUT_SECONDS,
                         **(recovery or {})}})
        self.cursor = 0

    def wait(self, what, enough, patience=PATIENCE_SECONDS):
        """The first of `enough()` that is not false, looked at after every step; None after `patience` seconds."""
        end = time.monotonic() + patience
        while not (found := enough()):
            if time.monotonic() > end:
                if patience < PATIENCE_SECONDS:
                    return None
                raise RuntimeError(f"{what} of {self.name} did not come in {PATIENCE_SECONDS} s, at {self.steps[-1:]}")
            try:
                news = self.cluster.get(f"jobs/{self.name}/steps?after={self.cursor}&wait_ms=200&limit=10000")
            except GONE:
                time.sleep(0.01)
                continue
            self.steps += news["items"]
            self.cursor = news["next_after"]
            if news["terminal"] and not news["items"]:
                time.sleep(0.05)
        return found

    def reached(self):
        return max((step["step"] for step in self.steps), default=0)

    def epoch(self):
        return max((step["epoch"] for step in self.steps), default=0)

    def state(self):
        return self.cluster.get(f"jobs/{self.name}")["state"]

    def step_seconds(self):
        return statistics.median(step["step_seconds"] for step in self.steps)

    def wait_state(self, state):
        def enough():
            now = self.state()
            if now in ("FAILED", "SUCCEEDED") and now != state:
                raise RuntimeError(f"{self.name} is {now}: {self.cluster.get(f'jobs/{self.name}')['reason']}")
            return now == state
        self.wait(state, enough)
        self.wait("the last steps", lambda: self.steps)

    def outcome(self):
        """Every loss, those that were trained again with the epoch; and the digest of the final weights."""
        self.wait_state("SUCCEEDED")
        steps = self.cluster.items(self.name, "steps")
        return ({(step["step"], step["loss"]) for step in steps},
                self.cluster.get(f"jobs/{self.name}")["checkpoint"]["weights_digest"])


def at(line):
    return seconds({"time": line.split(" ", 1)[0]})


def path_of_recovery(run, begin, before, epoch):
    """When each part of a recovery was done, in seconds after `begin`: by events, logs of daemons and of ranks."""
    events = [e for e in run.cluster.items(run.name, "events") if seconds(e) >= begin - 0.002]
    folder = pathlib.Path(run.cluster.folder.name)
    logs = [line for log in folder.glob("worker-*.log") for line in log.read_text(encoding="utf-8").splitlines()]
    ranks = [line for log in folder.glob(f"worker-*/logs/job-{run.id}/epoch-{epoch}.rank-*.log")
             for line in log.read_text(encoding="utf-8").splitlines()]

    def last(lines, pattern):
        return max((at(line) - begin for line in lines if re.search(pattern, line)), default=None)

    def first(what):
        return next((seconds(e) - begin for e in events if what(e)), None)
    old = f"job {run.id} epoch {before} rank"
    return {"noticed": first(lambda e: e["state"] == "RECOVERING"),
            "gone": last([line for line in logs if at(line) >= begin], f"{old} [0-9]+ (killed|exited)"),
            "worker_lost": first(lambda e: e["code"] == "worker_lost"),
            "placed": first(lambda e: e["code"] == "starting" and e["epoch"] == epoch),
            "executing": last(logs, f"job {run.id} epoch {epoch} rank [0-9]+ runs as process"),
            "built": last(ranks, f"job {run.id} epoch {epoch}: rank [0-9]+ of"),
            "restored": last(ranks, "restored step"),
            "running": first(lambda e: e["code"] == "running" and e["epoch"] == epoch)}


def recover(run, fault):
    """Lets `fault` happen, which says when, and waits for a finished step that no epoch before had reached."""
    begin = fault()
    before = run.epoch()

    def beyond():
        done = max(step["step"] for step in run.steps if step["epoch"] <= before)
        return next((step for step in run.steps if step["epoch"] > before and step["step"] > done), None)
    step = run.wait("a step beyond", beyond)
    again = [s for s in run.steps if s["epoch"] > before]
    return {**path_of_recovery(run, begin, before, step["epoch"]), "first": seconds(again[0]) - begin,
            "beyond": seconds(step) - begin, "replayed": sum(s["replayed"] for s in again)}


class Bench:
    def __init__(self, options, parts):
        def count(given, quick, full):
            return given if given is not None else quick if options.quick else full
        self.options, self.parts = options, parts
        self.python = options.torch_python
        self.peers = {part for part in BESIDE if part in parts and self.python is not None}
        if options.quick:
            self.peers &= {"native"}
        self.kills = count(options.kills, 3, 30)
        self.repeats = count(options.repeats, 1, 5)
        self.submissions = count(options.submissions, 3, 200)
        self.rounds = count(options.rounds, 1, 3)
        self.stop_seconds = count(options.stop_seconds, 4.0, 20.0)
        self.random = random.Random(options.seed)
        self.faults, self.next_fault_step = 0, FIRST_FAULT_STEP
        self.rows, self.bars = [], []

    def row(self, what, unit, values, bar="", peer=()):
        values = [v for v in values if v is not None]
        if not values and not peer:
            return
        ours, theirs = (statistics.median(side) if side else "" for side in (values, peer))
        self.rows.append({"what": what, "unit": unit, "n": len(values), "median": ours,
                          "worst": max(values) if values else "", "bar": bar, "torchrun": theirs,
                          "torchrun worst": max(peer) if peer else "",
                          "ratio": theirs / ours if values and peer else ""})

    def bar(self, what, unit, value, bar, at_least=False):
        self.bars.append({"what": what, "unit": unit, "value": value, "bar": bar, "at_least": at_least})

    def random_moment(self, run, part):
        """Waits for the next fault's turn: a random step of its stretch, and a random moment in that."""
        step = self.next_fault_step + self.random.randrange(STRETCH[part] // 2)
        self.faults += 1
        self.next_fault_step += STRETCH[part]
        run.wait(f"step {step}", lambda: run.reached() >= step)
        time.sleep(self.random.random() * run.step_seconds())

    def steps_planned(self):
        counts = {"ranks": self.kills, "daemons": self.repeats, "coordinator": self.repeats, "stop": 1}
        return FIRST_FAULT_STEP + sum(counts[part] * STRETCH[part] for part in FAULTS if part in self.parts)


def measure_faults(bench):
    steps = bench.steps_planned()
    with Cluster(bench.options.build, DEVICES, WORKERS) as cluster:
        alone = Run(cluster, bench.options.spec, "undisturbed", steps, bench.options.interval)
        expected = alone.outcome()
        run = Run(cluster, bench.options.spec, "disturbed", steps, bench.options.interval)
        for part, measure in (("ranks", measure_ranks), ("daemons", measure_daemons),
                              ("coordinator", measure_coordinator), ("stop", measure_stop)):
            if part in bench.parts:
                measure(bench, cluster, run)
        equal = run.outcome() == expected
        bench.row("median step of the undisturbed run", "s", [alone.step_seconds()])
        bench.bar(f"weights and all losses after {bench.faults} faults equal to the undisturbed run's", "of 1",
                  int(equal), 1, at_least=True)
        if "ranks" in bench.parts:
            bench.bar("rank killed: next finished step, median, less one step", "s",
                      next(r["median"] for r in bench.rows if "next finished step" in r["what"])
                      - alone.step_seconds(), 0.5)


def measure_ranks(bench, cluster, run):
    """In rounds: some kills of ours, the job is cancelled, some of theirs, the job is resumed."""
    paths, executing, beyond = [], [], []
    for turn in range(bench.rounds):
        for _ in range(bench.kills * turn // bench.rounds, bench.kills * (turn + 1) // bench.rounds):
            victim = bench.random.randrange(RANKS)

            def kill():
                bench.random_moment(run, "ranks")
                pid = cluster.rank_pid(victim)
                begin = time.time()
                os.kill(pid, signal.SIGKILL)
                return begin
            paths.append(recover(run, kill))
        if not bench.peers & {"native", "trainer"}:
            continue
        with cancelled(run):
            if "native" in bench.peers:
                executing += torchrun_native(bench, cluster, len(paths) - len(executing))
            if "trainer" in bench.peers:
                beyond += torchrun_trainer(bench, cluster)
    parts = (("failure noticed by the coordinator", "noticed", "", ()), ("last old rank gone", "gone", "", ()),
             ("newest good step known, ranks placed", "placed", "", ()),
             ("last new rank executing", "executing", 0.1, executing), ("every engine built", "built", "", ()),
             ("every state restored", "restored", "", ()), ("every rank ready", "running", "", ()),
             ("first step, replayed or not", "first", "", ()),
             ("next finished step", "beyond", "0.5 + step", beyond))
    for what, key, bar, peer in parts:
        bench.row(f"rank killed: {what}", "s", [path[key] for path in paths], bar, peer)
    replayed = [path["replayed"] for path in paths]
    bench.row("rank killed: steps replayed", "", replayed, 1)
    bench.bar("rank killed: last new rank executing, median", "s",
              statistics.median(path["executing"] for path in paths), 0.1)
    bench.bar("rank killed: steps replayed, worst", "", max(replayed), 1)


@contextlib.contextmanager
def cancelled(run):
    """The cores are torchrun's meanwhile."""
    epoch = run.epoch()
    run.cluster.penstock("cancel", run.name, "--grace", "0s")
    run.wait_state("CANCELLED")
    yield
    run.cluster.penstock("resume", run.name)
    run.wait("steps after the resume", lambda: run.epoch() > epoch)


def torchrun_native(bench, cluster, kills):
    folder = pathlib.Path(tempfile.mkdtemp(dir=cluster.folder.name))
    with Torchrun(bench.python, folder / "native", ["--no-python", idle_rank(folder)]) as peer:
        peer.start("--standalone", f"--nproc-per-node={RANKS}")
        peer.wait_executing(RANKS, 0)
        times = []
        for _ in range(kills):
            time.sleep(0.2 + 0.3 * bench.random.random())
            begin = peer.kill_rank(bench.random.randrange(RANKS))
            times.append(peer.wait_executing(RANKS, begin) - begin)
    return times


def trainer(bench, cluster):
    folder = pathlib.Path(tempfile.mkdtemp(dir=cluster.folder.name)) / "trainer"
    # As it comes, new ranks of PyTorch 2.15 find the addresses of dead ones in the store of torchrun's agent.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return Torchrun(bench.python, folder, [str(ROOT / "tests/bench/peer_torchrun.py")], environment)


def torchrun_trainer(bench, cluster):
    with trainer(bench, cluster) as peer:
        peer.start("--standalone", f"--nproc-per-node={RANKS}")
        peer.wait("its third step", lambda: len(peer.steps()) >= 3)
        times = []
        for _ in range(TRAINER_KILLS):
            time.sleep(0.3 * bench.random.random())
            begin = peer.kill_rank(bench.random.randrange(RANKS))
            times.append(peer.wait_step_beyond(begin) - begin)
    return times


def torchrun_node(bench, cluster, settings=""):
    """One of two agents of 4 ranks each is killed with its ranks, not the one that holds torchrun's store."""
    with trainer(bench, cluster) as peer:
        port = free_port()
        arguments = ["--nnodes=1:2", f"--nproc-per-node={RANKS // 2}", "--rdzv-backend=c10d", "--rdzv-id=recovery",
                     f"--rdzv-endpoint=127.0.0.1:{port}"]
        peer.start(*arguments, "--rdzv-conf=is_host=1" + settings)
        peer.start(*arguments, "--rdzv-conf=is_host=0" + settings)
        all_ranks = peer.wait_executing(RANKS, 0)
        peer.wait("a step of all ranks", lambda: [s for s in peer.steps() if s[1] > all_ranks][2:])
        begin = peer.kill_agent(1)
        return peer.wait_step_beyond(begin) - begin


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def measure_daemons(bench, cluster, run):
    paths, peer, tuned = [], [], []
    for _ in range(bench.repeats):
        def kill():
            bench.random_moment(run, "daemons")
            ranks = cluster.get(f"jobs/{run.name}")["ranks"]
            return cluster.kill(bench.random.choice(ranks)["worker"])
        paths.append(recover(run, kill))
        cluster.up()  # it is the spare from now on
    if "node" in bench.peers:
        with cancelled(run):
            peer.append(torchrun_node(bench, cluster))
            tuned.append(torchrun_node(bench, cluster, ",last_call_timeout=1"))
    for what, key, theirs in (("its ranks' peers noticed", "noticed", ()), ("given up as lost", "worker_lost", ()),
                              ("ranks placed", "placed", ()), ("last new rank executing", "executing", ()),
                              ("every rank ready", "running", ()), ("next finished step", "beyond", peer),
                              ("the same beside torchrun with last_call_timeout=1", "beyond", tuned)):
        if theirs or "beside" not in what:
            bench.row(f"worker daemon killed: {what}", "s", [path[key] for path in paths], "", theirs)
    bench.row("worker daemon killed: steps replayed", "", [path["replayed"] for path in paths], 1)


def measure_coordinator(bench, cluster, run):
    away, while_away, gaps, lost, restarted = [], [], [], 0, 0
    for _ in range(bench.repeats):
        bench.random_moment(run, "coordinator")
        processes = {rank: cluster.rank_pid(rank) for rank in range(RANKS)}
        reached, epoch = run.reached(), run.epoch()
        begin = cluster.kill("coordinator")
        answered = answers_again(cluster, run)
        away.append(answered - begin)
        run.wait("steps after the coordinator", lambda: any(seconds(s) > answered for s in run.steps))
        run.wait("3 more steps", lambda wanted=run.reached() + 3: run.reached() >= wanted)
        since = [step for step in run.steps if step["step"] >= reached and step["epoch"] >= epoch]
        while_away.append(sum(begin < seconds(step) < answered for step in since))
        gaps.append(max(seconds(b) - seconds(a) for a, b in zip(since, since[1:])))
        lost += sum(b["step"] != a["step"] + 1 for a, b in zip(since, since[1:]))
        restarted += sum(cluster.rank_pid(rank) != pid for rank, pid in processes.items())
    bench.row("coordinator killed: API answers again", "s", away)
    bench.row("coordinator killed: steps finished meanwhile", "", while_away)
    bench.row("coordinator killed: longest time between two steps", "s", gaps)
    bench.bar("coordinator killed: steps lost or trained again", "", lost, 0)
    bench.bar("coordinator killed: ranks restarted", "", restarted, 0)


def answers_again(cluster, run):
    """Starts it again as a user would; when the API first told the job's state."""
    starting = cluster.popen("dev", "up")
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        try:
            run.state()
            answered = time.time()
            break
        except GONE:
            time.sleep(0.002)
            if starting.poll():  # as whatever supervises it would
                starting = cluster.popen("dev", "up")
    else:
        raise RuntimeError(f"the coordinator did not answer in {PATIENCE_SECONDS} s")
    if starting.wait(timeout=PATIENCE_SECONDS) != 0:
        raise RuntimeError("penstock dev up failed after the coordinator was killed")
    return answered


def measure_stop(bench, cluster, run):
    """One rank is stopped. When that is not noticed in time it goes on, and so must the run."""
    bench.random_moment(run, "stop")
    epoch, victim = run.epoch(), bench.random.randrange(RANKS)
    pid = cluster.rank_pid(victim)
    begin = time.time()
    os.kill(pid, signal.SIGSTOP)
    try:
        moved_on = run.wait("a new epoch", lambda: run.epoch() > epoch, patience=bench.stop_seconds)
    finally:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass  # it was noticed, and killed
    noticed = [e for e in cluster.items(run.name, "events") if e["state"] == "RECOVERING" and seconds(e) >= begin]
    what = f"rank stopped: noticed within {bench.stop_seconds:.0f} s"
    named = noticed and f"rank {victim} " in noticed[0]["message"]
    bench.row(what + (f" ({'names it' if named else 'does not name it'})" if noticed else ": no"), "s",
              [seconds(noticed[0]) - begin] if noticed else [])
    bench.bar(what + ", and the verdict names it", "of 1", int(bool(moved_on and named)), 1, at_least=True)
    run.wait("steps after the stop", lambda wanted=run.reached() + 2: run.reached() >= wanted)


def measure_partition(bench):
    """Nothing is refused and nothing closes: all that anybody sees of the host is silence."""
    steps = FIRST_FAULT_STEP + bench.repeats * STRETCH["partition"]
    bench.next_fault_step = FIRST_FAULT_STEP
    paths = []
    with NetworkCluster(bench.options.build, DEVICES, WORKERS, apart=True) as cluster:
        alone = Run(cluster, bench.options.spec, "undisturbed", steps, bench.options.interval)
        expected = alone.outcome()
        run = Run(cluster, bench.options.spec, "disturbed", steps, bench.options.interval)
        for _ in range(bench.repeats):
            def cut():
                bench.random_moment(run, "partition")
                worker = bench.random.choice(cluster.get(f"jobs/{run.name}")["ranks"])["worker"]
                cut.worker = int(worker.rsplit("-", 1)[1])
                return cluster.set_cut_off(cut.worker, True)
            paths.append(recover(run, cut))
            cluster.set_cut_off(cut.worker, False)  # it is the spare from now on
            wait_for("the host that was cut off", lambda: all(
                worker["state"] == "up" and worker["devices"] - worker["free_devices"] == len(worker["ranks"])
                for worker in cluster.get("workers")["items"]))
        equal = run.outcome() == expected
    for what, key in (("noticed", "noticed"), ("ranks placed", "placed"), ("next finished step", "beyond")):
        bench.row(f"host cut off: {what}", "s", [path[key] for path in paths])
    bench.row("host cut off: steps replayed", "", [path["replayed"] for path in paths])
    bench.bar(f"weights and all losses after {bench.repeats} hosts were cut off equal to the undisturbed run's", "of 1",
              int(equal), 1, at_least=True)


def measure_durability(bench):
    """Acknowledged means durable: submit, wait 0 to 5 s (more often short), kill, start again, look; at the end every
    job, of one step on one rank, must have succeeded."""
    acknowledged, lost, twice, submitting = {}, set(), 0, []
    with Cluster(bench.options.build, 1) as cluster:
        spec = cluster.spec(bench.options.spec, "kept", {
            "model": {"hidden_size": 32, "num_hidden_layers": 2}, "data": {"seq_length": 32, "validation": []},
            "parallelism": {"pipeline": 1, "expert": 1, "schedule": "1f1b", "microbatches": 1, "micro_batch_size": 1},
            "schedule": {"warmup_steps": 0}, "training": {"steps": 1}})

        def jobs():
            return {item["id"]: item for item in cluster.get("jobs?limit=10000")["items"]}
        for turn in range(bench.submissions):
            spec["metadata"]["name"] = f"kept-{turn}"
            begin = time.monotonic()
            job = cluster.post_job(spec)
            submitting.append(time.monotonic() - begin)
            twice += job in acknowledged
            acknowledged[job] = f"kept-{turn}"
            time.sleep(5 * bench.random.random() ** 2)
            cluster.kill("coordinator")
            cluster.up()
            there = jobs()
            lost |= {job for job, name in acknowledged.items() if job not in there or there[job]["name"] != name}
        end = time.monotonic() + PATIENCE_SECONDS
        while any(job["state"] not in ("SUCCEEDED", "FAILED") for job in jobs().values()) and time.monotonic() < end:
            time.sleep(0.2)
        others = [job for job in jobs().values() if job["state"] != "SUCCEEDED"]
        for job in others:
            print(f"ops/bench recovery: {job['name']} is {job['state']}: {job['reason']['message']}", file=sys.stderr)
    bench.row("submission answered, one at a time", "s", submitting)
    bench.bar(f"coordinator killed after each of {bench.submissions} submissions: jobs lost", "", len(lost), 0)
    bench.bar("the same: ids given twice", "", twice, 0)
    bench.bar("the same: jobs that ran to their end", "", bench.submissions - len(others), bench.submissions,
              at_least=True)


def run(options):
    parts = options.only.split(",")
    if unknown := sorted(set(parts) - {*PARTS, *LONG_PARTS}):
        raise RuntimeError(f"--only: no measurement {', '.join(unknown)}; there are: {', '.join(PARTS + LONG_PARTS)}")
    bench = Bench(options, [*parts, *(BESIDE[part] for part in parts if part in BESIDE)])
    if bench.python is None:
        print("ops/bench recovery: measured without torchrun (--torch-python names a Python with PyTorch)",
              file=sys.stderr)
    if set(bench.parts) & set(FAULTS):
        measure_faults(bench)
    if "partition" in parts:
        measure_partition(bench)
    if "durability" in parts:
        measure_durability(bench)
    if "false-kills" in parts:
        false_kills.measure(bench, lambda cluster, name, steps: Run(cluster, options.spec, name, steps, options.interval),
                            options.minutes or (0.05 if options.quick else 10))
    if "copies" in parts:
        copies.measure(bench, lambda: Cluster(options.build, DEVICES, WORKERS),
                       lambda cluster, name, *rest: Run(cluster, options.spec, name, *rest), recover)
    return {"ranks": RANKS, "interval": options.interval, "seed": options.seed, "rows": bench.rows,
            "bars": bench.bars}
