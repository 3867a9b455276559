"""Writes the three files of this folder; needs torch."""

import argparse

import torch

state = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "column": torch.arange(12.0).reshape(3, 4)[:, 1],
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "bfloat16": torch.tensor([1.5, -2.0]).bfloat16(),
    "float16": torch.tensor([0.5]).half(),
    "float64": torch.tensor([0.1], dtype=torch.float64),
    "int64": torch.tensor(-7),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
}
state["tied"] = state["weight"]
torch.save(state, "bare.pt")
torch.save(state, "legacy.pt", _use_new_zipfile_serialization=False)
model = torch.nn.Linear(2, 2)
optimiser = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 2)).sum().backward()
optimiser.step()
for p in model.parameters():
    torch.nn.init.constant_(p, 1.0)
ema = {f"module.{k}": 2 * v for k, v in model.state_dict().items()}
args = argparse.Namespace(model="S/2", seed=0)
torch.save({"model": model.state_dict(), "ema": ema, "opt": optimiser.state_dict(), "args": args}, "train.pt")
