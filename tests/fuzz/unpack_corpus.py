#!/usr/bin/env python3
"""Writes the inputs of corpus/ as libFuzzer takes them, one file each: unpack_corpus.py OUT makes OUT/PARSER/NUMBER."""
import pathlib
import sys


def inputs_of(path):
    if path.suffix == ".txt":
        return path.read_bytes().split(b"----\n")
    return [bytes.fromhex(line) for line in path.read_text().splitlines() if not line.startswith("#")]


def main():
    for path in sorted((pathlib.Path(__file__).parent / "corpus").iterdir()):
        folder = pathlib.Path(sys.argv[1]) / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs_of(path)):
            (folder / f"{number:03}").write_bytes(data)


if __name__ == "__main__":
    main()
