#!/usr/bin/env python3
"""Loads what `penstock checkpoint export --format dcp` wrote with PyTorch's own dcp.load, and compares every tensor,
bit for bit, with the safetensors export of the same checkpoint.

    penstock checkpoint export WHERE -o A
    penstock checkpoint export WHERE --format dcp -o B
    tests/bench/dcp_load.py A B          # needs torch and safetensors
"""
import glob
import json
import pickle
import sys

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file


def main(safetensors_folder, dcp_folder):
    expected = {}
    for path in sorted(glob.glob(safetensors_folder + "/*.safetensors")):
        expected.update(load_file(path))
    with open(dcp_folder + "/.metadata", "rb") as file:
        metadata = pickle.load(file)
    loaded = {name: torch.empty(tuple(item.size), dtype=item.properties.dtype)
              for name, item in metadata.state_dict_metadata.items()}
    dcp.load(loaded, checkpoint_id=dcp_folder, no_dist=True)
    different = [name for name in expected.keys() | loaded.keys()
                 if name not in loaded or name not in expected
                 or loaded[name].dtype != expected[name].dtype
                 or loaded[name].shape != expected[name].shape
                 or not torch.equal(loaded[name].contiguous().flatten().view(torch.uint8),
                                    expected[name].contiguous().flatten().view(torch.uint8))]
    print(json.dumps({"torch": torch.__version__, "tensors": len(loaded), "different": different}))
    return 1 if different or not loaded else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
