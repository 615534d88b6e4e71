#!/usr/bin/env python3
"""The peer of `ops/bench train`: the model of a job spec in plain PyTorch, trained on the CPU in one process.

    peer_torch.py --spec docs/examples/quickstart.yaml --steps 12 [--threads 2] [--compile]

Reads the spec's model, data (.bin/.idx), parallelism (for tokens per step), optimizer and training keys, and prints
one JSON line per step: {"step", "loss", "tokens_per_second"}. Same architecture, tokens per step, optimizer constants
and router balancing as Penstock's; which windows of the corpus a step reads is its own choice. fp32. Needs torch
(1.13 or newer), numpy and yaml, nothing else. Written the way a careful user would: fused products where one weight
serves, a loop over experts, PyTorch's own attention and fused AdamW where the version has them.
"""
import argparse
import json
import math
import os
import struct
import sys
import time

os.environ.setdefault("KMP_BLOCKTIME", "1")

import numpy
import torch
import torch.nn.functional as F
import yaml
from torch import nn

TOKEN_TYPES = {1: numpy.uint8, 2: numpy.int8, 3: numpy.int16, 4: numpy.int32, 5: numpy.int64, 8: numpy.uint16}
DEFAULTS = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.02}


class Config:
    def __init__(self, keys):
        self.__dict__.update({**DEFAULTS, **keys})
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim


class RmsNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        if hasattr(F, "rms_norm"):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class FeedForward(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def rotate(x, cosine, sine):
    """Turns the pairs (x[2i], x[2i+1]); x is [..., length, dim]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1).flatten(-2)


def causal_attention(query, key, value, scale):
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    length = query.shape[-2]
    scores = query @ key.transpose(-1, -2) * scale
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(mask, float("-inf")).softmax(-1) @ value


class Attention(nn.Module):
    """Multi-head latent attention."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        heads = c.num_attention_heads
        self.query_width = c.q_lora_rank or heads * c.qk_head_dim
        self.down = nn.Linear(c.hidden_size, self.query_width + c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        if c.q_lora_rank:
            self.query_norm = RmsNorm(c.q_lora_rank, 1e-6)
            self.query_up = nn.Linear(c.q_lora_rank, heads * c.qk_head_dim, bias=False)
        self.latent_norm = RmsNorm(c.kv_lora_rank, 1e-6)
        self.latent_up = nn.Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.out = nn.Linear(heads * c.v_head_dim, c.hidden_size, bias=False)

    def forward(self, x, cosine, sine):
        c = self.c
        batch, length, _ = x.shape
        query, latent, key_rope = self.down(x).split(
            [self.query_width, c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        if c.q_lora_rank:
            query = self.query_up(self.query_norm(query))
        query = query.view(batch, length, c.num_attention_heads, c.qk_head_dim).transpose(1, 2)
        key_value = self.latent_up(self.latent_norm(latent))
        key_value = key_value.view(batch, length, c.num_attention_heads, -1).transpose(1, 2)
        key_nope, value = key_value.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        query_nope, query_rope = query.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        key_rope = rotate(key_rope.unsqueeze(1), cosine, sine).expand(-1, c.num_attention_heads, -1, -1)
        query = torch.cat((query_nope, rotate(query_rope, cosine, sine)), dim=-1)
        key = torch.cat((key_nope, key_rope), dim=-1)
        mixed = causal_attention(query, key, value, c.qk_head_dim ** -0.5)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mixture(nn.Module):
    """Shared expert plus the routed experts that a sigmoid gate with group limits chooses."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.gate = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.register_buffer("bias", torch.zeros(c.n_routed_experts))
        self.register_buffer("load", torch.zeros(c.n_routed_experts))
        self.experts = nn.ModuleList(
            FeedForward(c.hidden_size, c.moe_intermediate_size) for _ in range(c.n_routed_experts))
        width = c.n_shared_experts * c.moe_intermediate_size
        self.shared = FeedForward(c.hidden_size, width) if width else None

    def route(self, x):
        c = self.c
        scores = F.linear(x, self.gate).sigmoid()
        with torch.no_grad():
            choice = scores + self.bias
            if c.n_group > 1:
                groups = choice.view(len(x), c.n_group, -1)
                kept = groups.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
                mask = torch.zeros(len(x), c.n_group, dtype=torch.bool).scatter_(1, kept, True)
                choice = groups.masked_fill(~mask.unsqueeze(-1), 0.0).flatten(1)
            ids = choice.topk(c.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, ids)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * c.routed_scaling_factor

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        ids, weights = self.route(x)
        # Sorted by expert once: every expert then reads one slice.
        order = ids.flatten().argsort()
        token = order // self.c.num_experts_per_tok
        counts = torch.bincount(ids.flatten(), minlength=self.c.n_routed_experts)
        self.load += counts
        rows = x[token].split(counts.tolist())
        out = torch.cat([expert(part) for expert, part in zip(self.experts, rows)])
        y = torch.zeros_like(x).index_add(0, token, out * weights.flatten()[order].unsqueeze(-1))
        if self.shared is not None:
            y = y + self.shared(x)
        return y.view(shape)


class Layer(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.attention_norm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        dense = index < c.first_k_dense_replace
        self.mlp = FeedForward(c.hidden_size, c.intermediate_size) if dense else Mixture(c)

    def forward(self, x, cosine, sine):
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    def __init__(self, c, length):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        pairs = torch.arange(0, c.qk_rope_head_dim, 2, dtype=torch.float64)
        angles = torch.arange(length)[:, None] * c.rope_theta ** (-pairs / c.qk_rope_head_dim)
        self.register_buffer("cosine", angles.cos().float())
        self.register_buffer("sine", angles.sin().float())
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=c.initializer_range)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cosine, self.sine)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten(), reduction="sum")

    def balance(self, speed):
        """Once per step: the bias of idle experts rises, that of busy ones falls."""
        for layer in self.layers:
            if isinstance(layer.mlp, Mixture):
                layer.mlp.bias += speed * (layer.mlp.load.mean() - layer.mlp.load).sign()
                layer.mlp.load.zero_()


def open_tokens(prefix):
    try:
        with open(prefix + ".idx", "rb") as index:
            magic, version, code = struct.unpack("<9sQB", index.read(18))
    except (OSError, struct.error) as error:
        sys.exit(f"cannot read {prefix}.idx: {error}; prepare the data set, or name another with --data")
    if magic != b"MMIDIDX\0\0" or version != 1 or code not in TOKEN_TYPES:
        sys.exit(f"{prefix}.idx is not a Megatron index of token ids")
    return numpy.memmap(prefix + ".bin", dtype=TOKEN_TYPES[code], mode="r")


def learning_rate(spec, step):
    schedule, steps = spec.get("schedule", {}), spec["training"]["steps"]
    peak, warmup = spec["optimizer"]["lr"], schedule.get("warmup_steps", 0)
    if step < warmup:
        return peak * step / warmup
    if steps <= warmup:
        return peak
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup))))
    floor = schedule.get("min_lr_ratio", 0.1)
    return peak * (floor + (1 - floor) * share)


def make_optimizer(model, optimizer):
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1],
               "weight_decay": optimizer.get("weight_decay", 0.1)},
              {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    arguments = dict(lr=optimizer["lr"], betas=tuple(optimizer.get("betas", (0.9, 0.95))),
                     eps=optimizer.get("eps", 1e-8))
    try:
        return torch.optim.AdamW(groups, fused=True, **arguments)
    except (TypeError, RuntimeError):  # this version has no fused AdamW on the CPU
        return torch.optim.AdamW(groups, foreach=True, **arguments)


class Batches:
    """Windows of seq_length + 1 tokens, shuffled, from the spec's training sources behind each other."""

    def __init__(self, prefixes, length, seed):
        self.sources = [open_tokens(prefix) for prefix in prefixes]
        self.windows = [(s, w * length) for s, tokens in enumerate(self.sources)
                        for w in range((len(tokens) - 1) // length)]
        if not self.windows:
            sys.exit(f"the training data holds no window of {length + 1} tokens")
        self.length = length
        self.random = numpy.random.default_rng(seed)

    def take(self, count):
        chosen = [self.windows[i] for i in self.random.integers(len(self.windows), size=count)]
        rows = numpy.stack([self.sources[s][begin:begin + self.length + 1] for s, begin in chosen])
        rows = torch.from_numpy(rows.astype(numpy.int64))
        return rows[:, :-1], rows[:, 1:]


def train_step(model, optimizer, spec, sequences, micro_batch, tokens, targets):
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for begin in range(0, sequences, micro_batch):
        part = slice(begin, begin + micro_batch)
        loss = model(tokens[part], targets[part])
        (loss / targets.numel()).backward()
        total += loss.item()
    clip = spec.get("clip_grad_norm", 1.0)
    if clip > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return total / targets.numel()


def train(options, spec):
    parallelism, length = spec.get("parallelism", {}), spec["data"]["seq_length"]
    sequences = math.prod(parallelism.get(key, 1) for key in ("microbatches", "micro_batch_size", "expert", "data"))
    micro_batch = options.micro_batch or sequences
    folder = os.path.dirname(os.path.abspath(options.spec))  # the spec's paths are relative to it
    prefixes = options.data or [os.path.join(folder, source["path"]) for source in spec["data"]["train"]]
    batches = Batches(prefixes, length, spec["training"].get("seed", 0))
    torch.manual_seed(spec["training"].get("seed", 0))
    model = Model(Config(spec["model"]), length)
    optimizer = make_optimizer(model, spec["optimizer"])
    run = torch.compile(model, dynamic=True) if options.compile else model
    for step in range(1, options.steps + 1):
        tokens, targets = batches.take(sequences)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step)
        begin = time.perf_counter()
        loss = train_step(run, optimizer, spec["optimizer"], sequences, micro_batch, tokens, targets)
        model.balance(spec["optimizer"].get("bias_update_speed", 0.001))
        seconds = time.perf_counter() - begin
        print(json.dumps({"step": step, "loss": round(loss, 6), "tokens_per_second": targets.numel() / seconds}),
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", required=True, help="job spec, YAML")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile (PyTorch 2; needs a C++ compiler)")
    parser.add_argument("--micro-batch", type=int, default=0,
                        help="sequences per forward and backward; 0: the whole step at once")
    parser.add_argument("--data", action="append", help="training prefix, instead of the spec's; repeatable")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with open(options.spec) as file:
        spec = yaml.safe_load(file)
    train(options, spec)


if __name__ == "__main__":
    main()
