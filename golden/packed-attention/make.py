"""Attention over packed documents with its gradients, by PyTorch: scaled_dot_product_attention under a mask that keeps every
query inside its document (and window), after RoPE (half-split pairs, base 10000) whose positions start anew at each.

    python make.py    # PyTorch 2.15, float64 inside, float32 in the file; random numbers
"""

import pathlib

import torch
from safetensors.torch import save_file

torch.manual_seed(5)
LENGTHS, HEADS, KV_HEADS, DIM, SCALE = [66, 1, 2, 31], 4, 2, 8, 0.4
TOKENS = sum(LENGTHS)
document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
position = torch.cat([torch.arange(n) for n in LENGTHS])
place = torch.arange(TOKENS)
angle = position[:, None].double() * 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM)


def rope(x):
    low, high = x[..., : DIM // 2], x[..., DIM // 2 :]
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)


tensors = {"starts": (place - position).to(torch.int32)}
for case, window in [("whole", None), ("window", 20)]:
    widths = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    inputs = {name: torch.randn(TOKENS, heads * DIM).float().double().requires_grad_() for name, heads in widths.items()}
    heads = {name: x.view(TOKENS, widths[name], DIM).transpose(0, 1) for name, x in inputs.items()}
    mask = (document[:, None] == document[None, :]) & (place[:, None] >= place[None, :])
    if window:
        mask &= place[:, None] - place[None, :] < window
    group = lambda x: x.repeat_interleave(HEADS // KV_HEADS, dim=0)
    out = torch.nn.functional.scaled_dot_product_attention(
        rope(heads["q"]), group(rope(heads["k"])), group(heads["v"]), attn_mask=mask, scale=SCALE
    )
    out = out.transpose(0, 1).reshape(TOKENS, HEADS * DIM)
    slope = torch.randn_like(out).float().double()
    (out * slope).sum().backward()
    tensors |= {f"{case}.{name}": x.detach().float() for name, x in inputs.items()}
    tensors |= {f"{case}.d{name}": x.grad.float() for name, x in inputs.items()}
    tensors |= {f"{case}.out": out.detach().float(), f"{case}.slope": slope.float()}
save_file({name: x.contiguous() for name, x in tensors.items()}, pathlib.Path(__file__).with_name("packed.safetensors"))
