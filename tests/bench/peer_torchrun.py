"""The other side of `ops/bench recovery`: torchrun and what runs under it.

Started by torchrun this file is a trainer: a gloo all-reduce of 64k floats and 50 ms of sleep a step, rank 0 saves
every step, and a new attempt begins after the newest one saved. Needs PyTorch; nothing of it is synced to the disk.
Imported it is the class that starts, kills and reads torchrun.
"""
import os
import pathlib
import signal
import subprocess
import time

PATIENCE_SECONDS = 240
# Says when it executes, and then waits to be killed.
IDLE_RANK = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
int main(void) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  char path[4096];
  snprintf(path, sizeof path, "%s/rank-%s", getenv("STAMPS"), getenv("RANK"));
  dprintf(open(path, O_WRONLY | O_CREAT | O_APPEND, 0600), "%d %ld.%09ld\n", getpid(), now.tv_sec, now.tv_nsec);
  for (;;) pause();
}
"""


def idle_rank(folder):
    """That program, compiled."""
    source = folder / "idle_rank.c"
    source.write_text(IDLE_RANK, encoding="utf-8")
    subprocess.run(["cc", "-O2", "-o", str(folder / "idle_rank"), str(source)], check=True)
    return str(folder / "idle_rank")


def parent_of(pid):
    try:
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
    except OSError:
        return None  # it ended meanwhile


def tree(root):
    """A process and all below it: torchrun's workers have sessions of their own."""
    parents = {int(p.name): parent_of(p.name) for p in pathlib.Path("/proc").iterdir() if p.name.isdigit()}
    found, grown = {root}, True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found, grown = found | children, bool(children)
    return found


def lines_of(path):
    """The whole lines of a file that is written meanwhile, as lists of numbers."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [[float(word) for word in line.split()] for line in text[:text.rfind("\n") + 1].splitlines()]


class Torchrun:
    """One torchrun, one agent for each list of its arguments; they share a folder for what their ranks say."""

    def __init__(self, python, folder, worker, environment=()):
        """`worker`: what follows torchrun's own arguments."""
        folder.mkdir(parents=True)
        self.python, self.folder, self.worker, self.environment = python, folder, worker, dict(environment)
        self.agents = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for agent in range(len(self.agents)):
            self.kill_agent(agent)

    def start(self, *arguments):
        environment = {**os.environ, "STAMPS": str(self.folder), **self.environment}
        with (self.folder / "log").open("ab") as log:
            self.agents.append(subprocess.Popen(
                [self.python, "-m", "torch.distributed.run", *arguments, "--monitor-interval=0.1",
                 "--max-restarts=1000", *self.worker], env=environment, stdout=log, stderr=log))

    def kill_agent(self, agent):
        """Kills an agent with all its ranks, as the loss of its host would."""
        begin = time.time()
        for pid in tree(self.agents[agent].pid) if self.agents[agent].poll() is None else ():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended meanwhile
        self.agents[agent].wait()
        return begin

    def ranks(self):
        """Of each rank the newest process and when it began to execute."""
        return {path.name: lines_of(path)[-1] for path in self.folder.glob("rank-*") if lines_of(path)}

    def steps(self):
        """[step, when it was saved], as trained."""
        return lines_of(self.folder / "steps")

    def wait(self, what, enough):
        end = time.monotonic() + PATIENCE_SECONDS
        while not (found := enough()):
            if time.monotonic() > end or all(agent.poll() is not None for agent in self.agents):
                log = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"torchrun: {what} never came; it says: {log[-600:]}")
            time.sleep(0.005)
        return found

    def wait_executing(self, count, since):
        """When the last of so many ranks began, all of them after `since`."""
        def enough():
            began = [stamp[1] for stamp in self.ranks().values()]
            return len(began) == count and min(began) > since and max(began)
        return self.wait(f"{count} executing ranks", enough)

    def wait_step_beyond(self, since):
        """When the ranks that began after `since` saved the first step that none before had saved."""
        def enough():
            began = self.ranks()["rank-0"][1]
            done = max((step for step, when in self.steps() if when <= began), default=0)
            return began > since and next((when for step, when in self.steps() if step > done and when > began), None)
        return self.wait("a step beyond", enough)

    def kill_rank(self, rank):
        pid = int(self.ranks()[f"rank-{rank}"][0])
        begin = time.time()
        os.kill(pid, signal.SIGKILL)
        return begin


def train():
    folder = pathlib.Path(os.environ["STAMPS"])

    def say(name, *words):
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(" ".join(str(word) for word in words) + "\n")
    say(f"rank-{os.environ['RANK']}", os.getpid(), time.time())
    import torch  # after the line above: it takes seconds
    import torch.distributed as dist
    dist.init_process_group("gloo")
    saved = folder / "saved"
    state = torch.load(saved) if saved.exists() else {"step": 0, "weights": torch.zeros(65536)}
    while True:
        update = torch.full((65536,), 1.0)
        dist.all_reduce(update)
        time.sleep(0.05)
        state = {"step": state["step"] + 1, "weights": state["weights"] + update}
        if dist.get_rank() == 0:
            torch.save(state, folder / "saving")
            (folder / "saving").replace(saved)
            say("steps", state["step"], time.time())


if __name__ == "__main__":
    train()
