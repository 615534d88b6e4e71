"""PyTorch Distributed Checkpoint as one interface, of a current PyTorch (2.9 or newer) or of 1.13, which Debian has.

1.13 has no async_save: what PyTorch's stager does is done for it, that is, the state is cloned in the caller's thread
and saved in another.
"""
import concurrent.futures
import dataclasses
import types

DATACLASS = dataclasses.dataclass


def hashable_dataclass(cls=None, /, **options):
    """1.13 has default values of mutable dataclasses, which Python 3.11 takes only when they are hashable."""
    def make(made):
        hashable = options.get("frozen") or "__hash__" in made.__dict__
        return DATACLASS(made, **options) if hashable else DATACLASS(made, **{"unsafe_hash": True, **options})
    return make if cls is None else make(cls)


dataclasses.dataclass = hashable_dataclass
import torch  # noqa: E402  whose modules make such classes when they are imported
IS_OLD = torch.__version__.startswith("1.13.")
if IS_OLD:
    import torch.distributed._shard.checkpoint as dcp
    from torch.distributed._shard.checkpoint import default_planner, metadata, planner, planner_helpers
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
else:
    dataclasses.dataclass = DATACLASS
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import default_planner, metadata, planner, planner_helpers
    TensorProperties = metadata.TensorProperties
    STAGER = dcp.staging.DefaultStager(dataclasses.replace(
        dcp.staging.StagingOptions(), use_pinned_memory=False, use_shared_memory=False, use_async_staging=False,
        use_non_blocking_copy=False))
dataclasses.dataclass = DATACLASS

# Of the constructors of the default planners.
AS_GIVEN = {} if IS_OLD else {"flatten_state_dict": False}

def writer(directory):
    return dcp.FileSystemWriter(directory, single_file_per_rank=True, sync_files=True)


def save(state, directory, save_planner=None):
    work = dcp.save_state_dict if IS_OLD else dcp.save
    work(state, storage_writer=writer(directory), planner=save_planner, no_dist=True)


def load(state, directory, load_planner=None):
    work = dcp.load_state_dict if IS_OLD else dcp.load
    work(state, storage_reader=dcp.FileSystemReader(directory), planner=load_planner, no_dist=True)


def async_save(state, directory):
    """A future, when the caller may go on."""
    if not IS_OLD:
        return dcp.async_save(state, storage_writer=writer(directory), async_stager=STAGER, no_dist=True)
    staged = {name: tensor.clone() for name, tensor in state.items()}
    return concurrent.futures.ThreadPoolExecutor(1).submit(save, staged, directory)


def read_metadata(directory):
    return dcp.FileSystemReader(directory).read_metadata()


def read_items(name, saved, chunks):
    """What to read of a tensor saved like that for these chunks of it."""
    if not IS_OLD:
        return planner_helpers.create_read_items_for_chunk_list(name, saved, chunks)
    shards = [types.SimpleNamespace(metadata=ShardMetadata(list(chunk.offsets), list(chunk.sizes))) for chunk in chunks]
    return planner_helpers._create_sharded_read_items(name, saved, shards)
