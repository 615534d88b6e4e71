#!/usr/bin/env python3
"""Loads what `penstock checkpoint export --format dcp` wrote with PyTorch's own dcp.load, and compares every tensor,
bit for bit, with the safetensors export of the same checkpoint.

    penstock checkpoint export WHERE -o A
    penstock checkpoint export WHERE --format dcp -o B
    tests/bench/dcp_load.py A B          # needs torch and safetensors

A checkpoint with a tensor of every element type comes of a folder that this script makes:

    tests/bench/dcp_load.py --make TYPES
    penstock checkpoint import TYPES -o WHERE
"""
import glob
import json
import os
import pickle
import sys

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
         torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]


def make(folder):
    """Random bits of every type, with an empty and a 0-d tensor beside each matrix."""
    torch.manual_seed(1)
    tensors = {"a.bool": torch.tensor([True, False, True])}
    for dtype in TYPES:
        bits = torch.randint(0, 256, (7, 5 * dtype.itemsize), dtype=torch.uint8)
        name = "a." + str(dtype).removeprefix("torch.")
        tensors[name] = bits.view(dtype)
        tensors[name + ".empty"] = torch.empty((0, 3), dtype=dtype)
        tensors[name + ".scalar"] = bits[0, :dtype.itemsize].view(dtype)[0].clone()
    os.makedirs(folder)
    save_file(tensors, folder + "/state.safetensors", metadata={
        "format": "pt", "penstock.format": "penstock-state", "penstock.files": "1", "penstock.job": "1",
        "penstock.step": "1", "penstock.layout": "", "penstock.spec": "{}"})


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
    sys.exit(make(sys.argv[2]) if sys.argv[1] == "--make" else main(*sys.argv[1:]))
