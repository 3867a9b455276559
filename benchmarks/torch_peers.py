"""PyTorch networks of the same shape as ours, doing the same work; `backbones.py` runs this file and talks to it.

Reads one JSON command a line from stdin and answers with one JSON line:

    {"op": "build", "case": {...}, "weights": file.npz}  makes the networks; loads ours and compares outputs
    {"op": "run", "peer": "eager", "what": "step"}       one training step, forward pass or sampler run

Parameters carry the official names. Needs torch, and diffusers where a case asks for its DiT.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TimestepEmbedder(nn.Module):
    """256 sinusoids, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("freqs", torch.exp(-np.log(10000.0) * torch.arange(128) / 128).float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class Attention(nn.Module):
    """One qkv projection and torch's fused attention; `rope` turns q and k."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Callable[[Tensor], Tensor] | None) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """w3(silu(a) b), [a, b] = w12(x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    """A block of DiT, or of LightningDiT."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        width, modern = case["width"], case["modern"]
        norm = nn.RMSNorm(width, eps=1e-6) if modern else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm1 = norm
        self.norm2 = nn.RMSNorm(width, eps=1e-6) if modern else norm
        self.attn = Attention(width, case["heads"])
        self.mlp = (SwiGLU if modern else MLP)(width, case["hidden"])
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, rope: Callable[[Tensor], Tensor] | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Final(nn.Module):
    """The last layer."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        width = case["width"]
        self.norm_final = (
            nn.RMSNorm(width, eps=1e-6) if case["modern"] else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        )
        self.linear = nn.Linear(width, case["patch"] ** 2 * case["channels"])
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Named(nn.Module):
    """Holds one submodule under an official name."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


class DiT(nn.Module):
    """DiT, or LightningDiT where the case is `modern`; images (B, C, H, W)."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        width, patch, side = case["width"], case["patch"], case["size"] // case["patch"]
        self.patch, self.side = patch, side
        self.x_embedder = Named("proj", nn.Conv2d(case["channels"], width, patch, patch))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = Named("embedding_table", nn.Embedding(1001, width))
        self.register_buffer("pos_embed", torch.zeros(1, side * side, width))
        self.blocks = nn.ModuleList(Block(case) for _ in range(case["depth"]))
        self.final_layer = Final(case)
        self.modern = case["modern"]
        if self.modern:
            self.feat_rope = nn.Module()
            for name in ("freqs_cos", "freqs_sin"):
                self.feat_rope.register_buffer(name, torch.zeros(side * side, width // case["heads"]))

    def rope(self, x: Tensor) -> Tensor:
        """x (B, H, N, D) with adjacent channel pairs turned."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.feat_rope.freqs_cos + torch.stack([-b, a], -1).flatten(-2) * self.feat_rope.freqs_sin

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c, self.rope if self.modern else None)
        x = self.final_layer(x, c)
        x = x.view(x.shape[0], self.side, self.side, self.patch, self.patch, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, self.side * self.patch, self.side * self.patch)


class UNetBlock(nn.Module):
    """EDM's residual block with additive conditioning, box resampling and one attention head."""

    def __init__(self, inputs: int, outputs: int, emb: int, up: bool, down: bool, attention: bool, drop: float) -> None:
        super().__init__()
        self.up, self.down, self.attention, self.drop = up, down, attention, drop
        self.norm0, self.conv0 = nn.GroupNorm(32, inputs, eps=1e-6), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(emb, outputs)
        self.norm1, self.conv1 = nn.GroupNorm(32, outputs, eps=1e-6), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if up or down or inputs != outputs else None
        if attention:
            self.norm2, self.qkv = nn.GroupNorm(32, outputs, eps=1e-6), nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    def resample(self, x: Tensor) -> Tensor:
        if self.up:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.down else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.drop, self.training))
        x = (h + (x if self.skip is None else self.skip(self.resample(x)))) * 0.5**0.5
        if self.attention:
            b, c, height, width = x.shape
            q, k, v = self.qkv(self.norm2(x)).view(b, 1, c, 3, -1).permute(3, 0, 1, 4, 2).unbind(0)
            h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, height, width)
            x = (self.proj(h) + x) * 0.5**0.5
        return x


class SongUNet(nn.Module):
    """EDM's DDPM++ from the rows of our plan, so that both walk the same layers."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        width, emb = case["width"], case["width"] * 4
        self.width = width
        self.map_augment = nn.Linear(9, width, bias=False)  # unused without augmentation, counted nevertheless
        self.map_layer0, self.map_layer1 = nn.Linear(width, emb), nn.Linear(emb, emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for side, rows in (("enc", case["encoder"]), ("dec", case["decoder"])):
            for name, kind, inputs, outputs, up, down, attention, _ in rows:
                layer: nn.Module
                if kind == "block":
                    layer = UNetBlock(inputs, outputs, emb, up, down, attention, case["dropout"])
                elif kind == "norm":
                    layer = nn.GroupNorm(32, outputs, eps=1e-6)
                else:
                    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
                getattr(self, side)[name] = layer
        self.takes = {row[0] for row in case["decoder"] if row[-1]}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.width // 2
        angles = t[:, None] * 10000.0 ** (-torch.arange(half, device=t.device) / (half - 1))
        emb = torch.cat([angles.sin(), angles.cos()], 1)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if isinstance(layer, UNetBlock):
                x = layer(torch.cat([x, skips.pop()], 1) if name in self.takes else x, emb)
            else:
                x = F.silu(layer(x)) if isinstance(layer, nn.GroupNorm) else layer(x)
        return x


class Diffusers(nn.Module):
    """diffusers' DiT. It keeps a time and label embedding in every block, so it has more parameters."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.net = DiTTransformer2DModel(
            num_attention_heads=case["heads"],
            attention_head_dim=case["width"] // case["heads"],
            in_channels=case["channels"],
            out_channels=case["channels"],
            num_layers=case["depth"],
            sample_size=case["size"],
            patch_size=case["patch"],
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.net(x, timestep=t, class_labels=y).sample


class Contestant:
    """One network with its optimiser, average and data."""

    def __init__(self, net: nn.Module, case: dict[str, Any], compiled: bool) -> None:
        self.net, self.case = net.to(DEVICE), case
        self.call = torch.compile(self.net, dynamic=False) if compiled else self.net
        shape = (case["batch"], case["channels"], case["size"], case["size"])
        self.x = torch.randn(shape, device=DEVICE)
        self.y = torch.randint(1000, (case["batch"],), device=DEVICE)
        self.optimiser: torch.optim.Optimizer | None = None
        self.ema: list[Tensor] = []

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        cond = () if self.case["kind"] == "unet" else (y,)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.case["dtype"] == "bfloat16"):
            return self.call(x, t, *cond).float()

    def forward(self) -> Tensor:
        self.net.eval()
        with torch.no_grad():
            return self.predict(self.x, torch.rand(len(self.x), device=DEVICE), self.y)

    def step(self) -> Tensor:
        """Velocity matching (EDM's loss for the U-Net), AdamW, an average of the parameters."""
        # diffusers drops labels by itself while training, in every block anew: left out
        self.net.train(not isinstance(self.net, Diffusers))
        if self.optimiser is None:
            fit = [p for p in self.net.parameters() if p.requires_grad]
            self.optimiser = torch.optim.AdamW(fit, lr=1e-4, weight_decay=0.0, fused=True)
            self.ema = [p.detach().clone() for p in fit]
        noise = torch.randn_like(self.x)
        if self.case["kind"] == "unet":
            sigma = torch.exp(-1.2 + 1.2 * torch.randn(len(self.x), 1, 1, 1, device=DEVICE))
            total = sigma**2 + 0.25
            noisy = self.x + sigma * noise
            raw = self.predict(noisy / total.sqrt(), sigma.flatten().log() / 4, self.y)
            denoised = 0.25 / total * noisy + 0.5 * sigma / total.sqrt() * raw
            loss = (total / (0.5 * sigma) ** 2 * (denoised - self.x) ** 2).mean()
        else:
            t = torch.rand(len(self.x), device=DEVICE)
            level = t[:, None, None, None]
            y = torch.where(torch.rand(len(self.x), device=DEVICE) < 0.1, 1000, self.y)
            raw = self.predict((1 - level) * self.x + level * noise, t, y)
            loss = ((raw - (noise - self.x)) ** 2).mean()
        loss.backward()
        self.optimiser.step()
        fit = [p.detach() for group in self.optimiser.param_groups for p in group["params"]]
        self.optimiser.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.ema, fit, 1e-4)
        return loss.detach()

    def sample(self) -> Tensor:
        """Guided DDIM on the respaced linear chain, one doubled call a step."""
        self.net.eval()
        levels = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
        indices = torch.linspace(0, 999, self.case["steps"]).round().long()
        bars = torch.cat([torch.ones(1, dtype=torch.float64), levels[indices]]).float().tolist()
        x = torch.randn_like(self.x[: self.case["samples"]])
        y = self.y[: len(x)]
        y = torch.cat([y, torch.full_like(y, 1000)])
        with torch.no_grad():
            for i in range(len(indices) - 1, -1, -1):
                t = torch.full((2 * len(x),), float(indices[i]), device=DEVICE)
                cond, null = self.predict(torch.cat([x, x]), t, y).chunk(2)
                eps = null + 1.5 * (cond - null)
                clean = (x - (1 - bars[i + 1]) ** 0.5 * eps) / bars[i + 1] ** 0.5
                x = bars[i] ** 0.5 * clean + (1 - bars[i]) ** 0.5 * eps
        return x


def randomise(net: nn.Module) -> None:
    """Small random values where a layer starts at zero, as in our networks."""
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(0.0, 0.02)


def compare(net: nn.Module, path: str) -> float:
    """Loads our weights by their official names; the largest difference of the outputs over the largest output."""
    arrays = {name: torch.from_numpy(np.array(array)) for name, array in np.load(path).items()}
    x, t, y, expected = (arrays.pop(name) for name in ("in:x", "in:t", "in:y", "out"))
    missing, unexpected = net.load_state_dict({k.removeprefix("model."): v for k, v in arrays.items()}, strict=False)
    strange = [name for name in unexpected if not name.endswith("resample_filter")]
    if missing or strange:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {strange}")
    net.eval()
    with torch.no_grad():
        out = net(x, t) if isinstance(net, SongUNet) else net(x, t, y)
    return float((out - expected).abs().max() / expected.abs().max())


def build(case: dict[str, Any], weights: str) -> tuple[dict[str, Contestant], dict[str, Any]]:
    """The contestants of a case by name, and what to print about them."""
    torch.manual_seed(0)
    net = SongUNet(case) if case["kind"] == "unet" else DiT(case)
    error = compare(net, weights)
    nets: dict[str, nn.Module] = {"": net}
    if case["kind"] != "unet" and not case["modern"] and case["diffusers"]:
        nets["diffusers "] = Diffusers(case)
        randomise(nets["diffusers "])
    contestants = {
        f"{name}{mode}": Contestant(each, case, mode == "compile")
        for name, each in nets.items()
        for mode in case["modes"]
    }
    count = {name or "torch ": sum(p.numel() for p in each.parameters()) for name, each in nets.items()}
    return contestants, {"peers": list(contestants), "parameters": count, "difference": error}


def seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of a call on one core, else wall time: the mean of three seconds of calls after one that wakes up."""
    alone = DEVICE.type == "cpu" and len(os.sched_getaffinity(0)) == 1
    clock = time.process_time if alone else time.perf_counter
    times: list[float] = []
    while len(times) < 2 or sum(times[1:]) < 3.0:
        began = clock()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - began)
    return statistics.mean(times[1:])


def main() -> None:
    """The loop over commands."""
    if DEVICE.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_flush_denormal(True)
    contestants: dict[str, Contestant] = {}
    for line in sys.stdin:
        command = json.loads(line)
        if command["op"] == "build":
            contestants.clear()
            contestants, answer = build(command["case"], command["weights"])
            answer["version"] = torch.__version__
        else:
            answer = {"seconds": seconds(getattr(contestants[command["peer"]], command["what"]))}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
