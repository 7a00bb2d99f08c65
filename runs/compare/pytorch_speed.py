#!/usr/bin/env python3
"""Training speed of the same BitNet model in PyTorch eager, for docs/results.md.

usage: pytorch_speed.py [--float] [--steps N] [--threads N]

The shape is that of `cargo run --release -p setun-train --example train_speed`: vocabulary 4096, hidden 256, 6 layers, feed-forward 768,
4 heads, tied, SubLN, squared ReLU; batch 16 x 256; AdamW with clipping. BitLinear is fake-quantised as BitNet's authors
publish it (straight-through, float32). Needs `torch`.
"""
import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--float", action="store_true")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(1)
VOCAB, HIDDEN, LAYERS, FFN, HEADS, BATCH, LENGTH = 4096, 256, 6, 768, 4, 16, 256


class BitLinear(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        if args.float:
            return F.linear(x, self.weight)
        a = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        xq = (x * a).round().clamp(-128, 127) / a
        s = 1.0 / self.weight.abs().mean().clamp(min=1e-5)
        wq = (self.weight * s).round().clamp(-1, 1) / s
        return F.linear(x + (xq - x).detach(), self.weight + (wq - self.weight).detach())


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


angles = torch.outer(torch.arange(LENGTH), 10000.0 ** (-torch.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS)))
COS, SIN = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)


def rope(x):
    left, right = x.chunk(2, -1)
    return x * COS + torch.cat([-right, left], -1) * SIN


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (BitLinear(HIDDEN, HIDDEN) for _ in range(4))
        self.gate, self.up, self.down = BitLinear(HIDDEN, FFN), BitLinear(HIDDEN, FFN), BitLinear(FFN, HIDDEN)
        self.n1, self.n2, self.n3, self.n4 = Norm(HIDDEN), Norm(HIDDEN), Norm(HIDDEN), Norm(FFN)

    def forward(self, x):
        n = self.n1(x)
        split = lambda y: y.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2)
        q, k, v = rope(split(self.q(n))), rope(split(self.k(n))), split(self.v(n))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.o(self.n2(a))
        n = self.n3(x)
        return x + self.down(self.n4(F.relu(self.gate(n)).square() * self.up(n)))


embed = nn.Embedding(VOCAB, HIDDEN)
nn.init.normal_(embed.weight, std=0.02)
blocks, norm = nn.ModuleList(Block() for _ in range(LAYERS)), Norm(HIDDEN)
params = [*embed.parameters(), *blocks.parameters(), *norm.parameters()]
optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
print(f"{sum(p.numel() for p in params) / 1e6:.2f} M parameters, torch {torch.__version__}")
best = float("inf")
for step in range(args.steps):
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))
    started = time.perf_counter()
    x = embed(ids[:, :-1])
    for block in blocks:
        x = block(x)
    loss = F.cross_entropy(F.linear(norm(x), embed.weight).view(-1, VOCAB), ids[:, 1:].reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    best = min(best, time.perf_counter() - started)
    print(f"step {step} loss {loss.item():.3f} {BATCH * LENGTH / best:.0f} tokens/s at best")
