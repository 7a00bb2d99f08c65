"""Makes the PyTorch checkpoints of this folder: `python make.py`, with PyTorch 2.15 and safetensors.

`llama/` is golden/models/rope-llama-default once more, in shards, by torch.save. `tensors.pt` holds every kind of tensor
that a state_dict can have; `tensors.safetensors` the same values. The others must be refused."""

import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

here = Path(__file__).resolve().parent
torch.manual_seed(1)

source = here.parent / "models/rope-llama-default"
tensors = load_file(source / "model.safetensors")
(here / "llama").mkdir(exist_ok=True)
shutil.copy(source / "config.json", here / "llama/config.json")
names, index = sorted(tensors), {}
for n, part in enumerate([names[: len(names) // 2], names[len(names) // 2 :]], 1):
    shard = f"pytorch_model-0000{n}-of-00002.bin"
    torch.save(OrderedDict((name, tensors[name]) for name in part), here / "llama" / shard)
    index.update({name: shard for name in part})
(here / "llama/pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1) + "\n")

base = torch.randn(6, 8)
state = OrderedDict(
    f32=base,
    f16=torch.randn(3, 5).half(),
    bf16=torch.randn(4, 4).bfloat16(),
    u8=torch.arange(12, dtype=torch.uint8).reshape(3, 4),
    i8=torch.arange(-6, 6, dtype=torch.int8).reshape(4, 3),
    shared=base[2:4],
    scalar=torch.tensor(2.5),
    empty=torch.zeros(0, 3),
    parameter=torch.nn.Parameter(torch.randn(2, 2)),
)
save_file({name: t.detach().clone() for name, t in state.items()}, here / "tensors.safetensors")
more = OrderedDict(state, f64=torch.randn(2).double(), i64=torch.tensor([1, 2]), transposed=base.t(), step=7)
torch.save(more, here / "tensors.pt")
torch.save({"epoch": 3, "state_dict": state, "args": [1.5, None, True]}, here / "wrapped.pth")
torch.save(state, here / "protocol4.pt", pickle_protocol=4)
torch.save({"model": state, "state_dict": state}, here / "two.pth")
torch.save({"epoch": 3}, here / "none.pth")
torch.save(state, here / "legacy.pt", _use_new_zipfile_serialization=False)
torch.save(torch.nn.Linear(2, 2), here / "module.pt")


class Runs:
    def __reduce__(self):
        return os.system, ("echo run",)


torch.save(OrderedDict(state, evil=Runs()), here / "evil.pt")
torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), here / "script.pt")
