"""Model folders to and from transformers: random small models, made there, trained here, exported, loaded there again.

For each model: transformers makes it and saves it (and once more in block-scaled FP8); `penstock import` takes it; one
step is trained (every third one starts from our own weights instead, and has multi-token prediction); `penstock export` writes it; transformers loads that and computes the logits Penstock computes; it is
imported back and trained one step. The data repeats one sequence, so that every step sees the same tokens and
losses of different runs can be compared.
"""
import json
import pathlib
import random
import struct
import subprocess
import tempfile

DESCRIPTION = "model folders to transformers and back: logits and losses compared"
HERE = pathlib.Path(__file__).resolve().parent
SEQUENCE = 24
TEXTS = ["The quick brown fox", " naïve  café\n\t€😀", "", "\u0000\u007f\u0080ÿ", "<|end_of_document"]


def add_arguments(parser):
    parser.add_argument("--torch-python", default="/usr/bin/python3",
                        help="a Python that can import torch, transformers and safetensors")
    parser.add_argument("--models", type=int, default=6, help="how many random models")
    parser.add_argument("--seed", type=int, default=1)


def random_keys(rng, index):
    """deepseek_v3 keys of a small model; every other one compresses its queries."""
    groups = rng.choice([1, 2, 4])
    experts = groups * rng.choice([2, 3, 4])
    chosen_groups = rng.randint(1, groups)
    layers = rng.randint(2, 5)
    return {
        "vocab_size": rng.randint(257, 400), "hidden_size": 8 * rng.randint(3, 24), "num_hidden_layers": layers,
        "num_attention_heads": rng.randint(1, 4), "q_lora_rank": rng.randint(8, 48) if index % 2 == 0 else None,
        "kv_lora_rank": rng.randint(8, 40), "qk_nope_head_dim": 4 * rng.randint(1, 8),
        "qk_rope_head_dim": 2 * rng.randint(1, 8), "v_head_dim": 2 * rng.randint(2, 12),
        "intermediate_size": 4 * rng.randint(8, 60), "first_k_dense_replace": rng.randint(0, layers - 1),
        "moe_intermediate_size": 2 * rng.randint(4, 40), "n_routed_experts": experts,
        "n_shared_experts": rng.randint(1, 2),
        "num_experts_per_tok": rng.randint(1, min(4, chosen_groups * experts // groups)),
        "n_group": groups, "topk_group": chosen_groups, "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "norm_topk_prob": rng.choice([True, False]), "rms_norm_eps": 1e-6,
        "rope_theta": rng.choice([500.0, 10000.0]), "rope_interleave": True, "max_position_embeddings": 64,
        "initializer_range": 0.02}


def write_data(prefix, tokens, windows):
    """A Megatron data set of `windows` windows, all of them `tokens`."""
    stream = tokens[:-1] * windows + tokens[:1]
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(stream)}H", *stream))
    prefix.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, len(stream), 0, 0, 1))


def layout_of(keys, index):
    """One rank, or a pipeline of expert groups, in turn."""
    wide = index % 3 == 1
    expert = 2 if wide and keys["n_routed_experts"] % 2 == 0 else 1
    return {"pipeline": 2 if wide else 1, "expert": expert, "schedule": "dualpipe" if wide else "1f1b", "microbatches": 4}


def predicts(index):
    """Whether this one has multi-token prediction, which transformers cannot make, and must ignore."""
    return index % 3 == 2


def job_spec(keys, index, folder):
    return {"apiVersion": "penstock/v1", "kind": "TrainingRun", "metadata": {"name": "peer"},
            "model": keys | {"num_nextn_predict_layers": int(predicts(index))},
            "data": {"train": [str(folder / "data")], "tokenizer": "bytes", "seq_length": SEQUENCE},
            "parallelism": layout_of(keys, index), "optimizer": {"lr": 0.003, "clip_grad_norm": 0},
            "training": {"steps": 2}, "checkpoint": {"interval": 1}}


class Bench:
    def __init__(self, options, folder):
        self.programs = pathlib.Path(options.build) / "bin"
        self.python = options.torch_python
        self.folder = folder

    def call(self, command):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} {command[1]} exited {done.returncode}: {done.stderr.strip()[-600:]}")
        return done.stdout

    def peer(self, *arguments):
        return json.loads(self.call([self.python, HERE / "peer_transformers.py", *arguments]).splitlines()[-1])

    def train(self, folder, like, steps, name):
        """Losses of `steps` steps that start from a model folder, or from random weights."""
        spec = like
        if folder is not None:
            spec = self.folder / f"{name}.json"
            self.call([self.programs / "penstock", "import", folder, "--like", like, "-o", spec])
        out = self.call([self.programs / "penstock-standalone", "--spec", spec, "--steps", steps, "--json",
                         "--checkpoint-dir", self.folder / f"{name}-checkpoints"])
        return [line["loss"] for line in map(json.loads, out.splitlines()) if "loss" in line]


def measure(bench, keys, index, rng):
    folder = bench.folder
    tokens = [rng.randrange(257) for _ in range(SEQUENCE)]
    tokens.append(tokens[0])
    layout = layout_of(keys, index)
    ranks = layout["pipeline"] * layout["expert"]
    write_data(folder / "data", tokens, windows=64)
    for name, value in (("keys", keys), ("tokens", tokens), ("spec", job_spec(keys, index, folder)), ("texts", TEXTS)):
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    made = {"loss": None}
    if not predicts(index):
        made = bench.peer("make", folder / "keys.json", folder / "theirs", folder / "tokens.json")
    losses = bench.train(folder / "theirs" if made["loss"] else None, folder / "spec.json", 2, "first")
    bench.call([bench.programs / "penstock", "export", "--checkpoint", folder / "first-checkpoints", "--step", 1, "--dtype",
                "fp32", "--shard-size", "100KB", "-o", folder / "ours", "--logits", folder / "logits.safetensors"])
    checked = bench.peer("check", folder / "ours", folder / "logits.safetensors", folder / "tokens.json")
    ahead = f"model.layers.{keys['num_hidden_layers']}." if predicts(index) else "none"
    if checked["missing"] or any(not name.startswith(ahead) for name in checked["unexpected"]):
        raise RuntimeError(f"transformers misses {checked['missing']} and does not know {checked['unexpected']}")
    again = bench.train(folder / "ours", folder / "spec.json", 1, "again")
    words = bench.peer("tokenizer", folder / "ours", folder / "texts.json")
    if words["ids"] != [list(t.encode("utf-8")) for t in TEXTS] or words["texts"] != TEXTS or words["end"] != 256:
        raise RuntimeError(f"the exported tokenizer gives {words}")
    (folder / "plain.json").write_text(json.dumps(job_spec(keys, index=index % 3 % 2, folder=folder)), encoding="utf-8")
    fp8 = bench.peer("make", folder / "keys.json", folder / "fp8", folder / "tokens.json", "--fp8")
    fp8_loss = bench.train(folder / "fp8", folder / "plain.json", 1, "fp8")[0]
    return {"model": f"{keys['num_hidden_layers']}x{keys['hidden_size']}, {keys['n_routed_experts']} experts, queries "
                     f"{'compressed' if keys['q_lora_rank'] else 'plain'}{', predicts ahead' if predicts(index) else ''}", "ranks": ranks,
            "import_loss_diff": abs(losses[0] - made["loss"]) if made["loss"] else "", "logit_diff": checked["logit_difference"],
            "largest_logit": checked["largest_logit"], "loss_diff": abs(losses[1] - checked["loss"]),
            "reimport_loss_diff": abs(again[0] - losses[1]), "fp8_import_loss_diff": abs(fp8_loss - fp8["loss"])}


def run(options):
    can_peer = subprocess.run([options.torch_python, "-c", "import torch, transformers, safetensors"],
                              capture_output=True)
    if can_peer.returncode != 0:
        raise RuntimeError(f"{options.torch_python} cannot import torch, transformers and safetensors; --torch-python "
                           "names another")
    rng = random.Random(options.seed)
    rows = []
    for index in [1] if options.quick else range(options.models):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(Bench(options, pathlib.Path(folder)), random_keys(rng, index), index, rng))

    def bar(what, column, limit):
        return {"what": what, "unit": "", "bar": limit, "at_least": False, "value": max(row[column] for row in rows if row[column] != "")}
    return {"rows": rows, "bars": [
        bar("logits of an export, transformers to ours, largest difference", "logit_diff", 1e-4),
        bar("loss of the first step after an import, to transformers", "import_loss_diff", 1e-5),
        bar("the same from block-scaled FP8", "fp8_import_loss_diff", 1e-5),
        bar("loss of the step after export and import, to the run that went on", "reimport_loss_diff", 0.0)]}
