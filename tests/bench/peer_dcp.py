"""The other side of `ops/bench checkpoint`: the same state saved and loaded by PyTorch Distributed Checkpoint.

Reads one JSON command a line from stdin, answers one JSON line on stdout: {"what": ..., ...} as the functions below.
Saves are made durable as ours are: files synced by DCP itself, then the directory by us. Each command has a process of
its own, forked when PyTorch is imported and has done nothing yet: memory that others used before is no part of a trainer
that has just started. Which PyTorch: dcp_api.py.
"""
import json
import os
import pathlib
import random
import statistics
import sys
import time

import dcp_api  # before torch, whose import it prepares
import torch
from dcp_api import default_planner, metadata, planner


def memory_kib(key):
    for line in pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {key} in /proc/self/status")


def io_count(key):
    for line in pathlib.Path("/proc/self/io").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {key} in /proc/self/io")


class Use:
    """What the kernel counts for this process while a piece of work runs."""

    def __init__(self):
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.resident, self.read, self.written = memory_kib("VmRSS"), io_count("rchar"), io_count("write_bytes")

    def report(self):
        return {"extra_bytes": max(0, memory_kib("VmHWM") - self.resident) * 1024,
                "rchar": io_count("rchar") - self.read, "write_bytes": io_count("write_bytes") - self.written}


def sync_directory(directory):
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def timed(work):
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def make(tensors, rows, columns):
    """The state all commands below work on."""
    generator = torch.Generator().manual_seed(1)
    return {f"model.layers.{t}.weight": torch.rand(rows, columns, generator=generator) for t in range(tensors)}


def save(directory, **size):
    state = make(**size)

    def work():
        dcp_api.save(state, directory)
        sync_directory(directory)
    use = Use()
    return {"seconds": timed(work), **use.report()}


def stall(directory, saves, **size):
    """What the caller of async_save waits for, as PyTorch stages by default, and until it is durable."""
    state = make(**size)
    result = {"stall_seconds": [], "durable_seconds": []}
    use = Use()
    for i in range(saves):
        folder = f"{directory}/{i}"
        begin = time.monotonic()
        done = dcp_api.async_save(state, folder)
        result["stall_seconds"].append(time.monotonic() - begin)
        done.result()
        sync_directory(folder)
        result["durable_seconds"].append(time.monotonic() - begin)
    return {**result, **use.report()}


def busy(directory, saves, steps, step_ms, **size):
    """Step-seconds lost to one save, as checkpoint_bench busy."""
    state = make(**size)
    torch.set_num_threads(2)
    values = torch.rand(2, 512, 512)

    def units(count):
        for _ in range(count):
            torch.bmm(values, values)
    units(8)
    count = max(1, round(16 * step_ms * 1e-3 / timed(lambda: units(16))))
    quiet = statistics.median(timed(lambda: units(count)) for _ in range(steps))
    lost = []
    for i in range(saves):
        folder = f"{directory}/{i}"
        begin = time.monotonic()
        done = dcp_api.async_save(state, folder)
        lost.append(time.monotonic() - begin)
        while not done.done():
            lost[-1] += timed(lambda: units(count)) - quiet
        done.result()
        sync_directory(folder)
    return {"quiet_step_seconds": quiet, "lost_seconds": lost}


def load(directory, **size):
    state = make(**size)
    use = Use()
    seconds = timed(lambda: dcp_api.load(state, directory))
    return {"seconds": seconds, **use.report()}


def rows_of(rank, ranks, rows):
    return rows * rank // ranks, rows * (rank + 1) // ranks


def chunk_of(begin, end, columns):
    return metadata.ChunkStorageMetadata(offsets=torch.Size([begin, 0]), sizes=torch.Size([end - begin, columns]))


class RowsSavePlanner(default_planner.DefaultSavePlanner):
    """Saves every tensor in row shards, as so many ranks with sharded tensors would."""

    def __init__(self, ranks):
        super().__init__(**dcp_api.AS_GIVEN)
        self.ranks = ranks

    def create_local_plan(self):
        items = []
        for name, tensor in self.state_dict.items():
            rows, columns = tensor.shape
            for rank in range(self.ranks):
                chunk = chunk_of(*rows_of(rank, self.ranks, rows), columns)
                items.append(planner.WriteItem(
                    index=metadata.MetadataIndex(name, chunk.offsets), type=planner.WriteItemType.SHARD,
                    tensor_data=planner.TensorWriteData(chunk=chunk, size=tensor.size(),
                                                        properties=dcp_api.TensorProperties.create_from_tensor(tensor))))
        self.plan = planner.SavePlan(items)
        return self.plan

    def resolve_data(self, write_item):
        chunk = write_item.tensor_data.chunk
        whole = self.state_dict[write_item.index.fqn]
        return whole[chunk.offsets[0]:chunk.offsets[0] + chunk.sizes[0]].clone()


class RowsLoadPlanner(default_planner.DefaultLoadPlanner):
    """Loads one rank's row shard of every tensor: the state dict holds the shards."""

    def __init__(self, rank, ranks, rows):
        super().__init__(**dcp_api.AS_GIVEN)
        self.begin, self.end = rows_of(rank, ranks, rows)

    def create_local_plan(self):
        items = []
        for name, tensor in self.state_dict.items():
            chunk = chunk_of(self.begin, self.end, tensor.shape[1])
            items += dcp_api.read_items(name, self.metadata.state_dict_metadata[name], [chunk])
        return planner.LoadPlan(items)

    def resolve_tensor(self, read_item):
        shard = self.state_dict[read_item.dest_index.fqn]
        for dimension, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            shard = shard.narrow(dimension, offset, length)
        return shard


def reshard(directory, ranks_from, ranks_to, tensors, rows, columns):
    state = make(tensors, rows, columns)
    dcp_api.save(state, directory, RowsSavePlanner(ranks_from))
    needed, before = 0, io_count("rchar")
    for rank in range(ranks_to):
        begin, end = rows_of(rank, ranks_to, rows)
        shards = {name: torch.zeros(end - begin, columns) for name in state}
        dcp_api.load(shards, directory, RowsLoadPlanner(rank, ranks_to, rows))
        if any(not torch.equal(shard, state[name][begin:end]) for name, shard in shards.items()):
            raise RuntimeError("DCP loaded other values than were saved: the planner above is wrong")
        needed += sum(shard.numel() * shard.element_size() for shard in shards.values())
    return {"needed_bytes": needed, "rchar": io_count("rchar") - before}


def damage(directory, places, **size):
    """Flips one bit of payload at a time; says how many of those dcp.load noticed."""
    state = make(**size)
    dcp_api.save(state, directory)
    info = dcp_api.read_metadata(directory).storage_data
    rng = random.Random(1)
    detected = 0
    for _ in range(places):
        index, item = rng.choice(sorted(info.items(), key=lambda pair: pair[0].fqn))
        raw = state[index.fqn].numpy().tobytes()
        path = pathlib.Path(directory) / item.relative_path
        with path.open("r+b") as file:
            file.seek(item.offset)
            payload = file.read(item.length).find(raw[:64])
            if payload < 0:
                raise RuntimeError(f"{path}: no payload of {index.fqn} at {item.offset}")
            at = item.offset + payload + rng.randrange(len(raw))
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
        into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        try:
            dcp_api.load(into, directory)
        except Exception:  # whatever it says, it noticed
            detected += 1
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([byte]))
    return {"places": places, "detected": detected}


def plan(pieces):
    """Seconds to find what to read of one tensor saved in `pieces` row shards and wanted in as many others."""
    rows = 12 * pieces
    saved = metadata.TensorStorageMetadata(
        properties=dcp_api.TensorProperties(), size=torch.Size([rows, 8]),
        chunks=[chunk_of(12 * i, 12 * i + 12, 8) for i in range(pieces)])
    wanted = [chunk_of(*rows_of(i, pieces - 1, rows), 8) for i in range(pieces - 1)]
    return {"seconds": timed(lambda: dcp_api.read_items("w", saved, wanted))}


COMMANDS = {"save": save, "stall": stall, "busy": busy, "load": load, "reshard": reshard, "damage": damage, "plan": plan}

if __name__ == "__main__":
    print(json.dumps({"version": torch.__version__}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if os.fork() == 0:
            print(json.dumps(COMMANDS[command.pop("what")](**command)), flush=True)
            os._exit(0)
        if os.wait()[1] != 0:
            sys.exit(1)
