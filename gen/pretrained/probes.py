"""Heads on diffusion features under the official names of diffssl."""

import numpy as np

from gen.finetune.probes import AttentionHead, LinearHead
from gen.pretrained.rules import Rule, Rules, Transform, linear

__all__ = ["attention_head_rules", "linear_head_rules"]

_MAP = Transform(lambda a: np.moveaxis(a, 0, -1), lambda a: (np.moveaxis(a, -1, 0),))  # (C, *places) <-> (*places, C)
# a 1x1 convolution as a dense layer
_POINTWISE = Transform(lambda a: a[..., 0, 0].T, lambda a: (a.T[..., None, None],))
_TOKEN = Transform(lambda a: a[0, 0], lambda a: (a[None, None],))


def attention_head_rules(config: AttentionHead) -> Rules:
    """Gives the table of ``AttentionFusion``, whose blocks are called by their numbers."""
    rows = [Rule("intra_inter_block_attention.cls_token", "token", _TOKEN)]
    for name, _ in config.blocks:
        rows += [
            Rule(f"pre_layer.{name}.1.weight", f"enter/{name}/scale", _MAP),
            Rule(f"pre_layer.{name}.1.bias", f"enter/{name}/bias", _MAP),
            Rule(f"pre_layer.{name}.2.weight", f"enter/{name}/proj/kernel", _POINTWISE),
            Rule(f"pre_layer.{name}.2.bias", f"enter/{name}/proj/bias"),
        ]
    for i in range(config.depth):
        official, ours = f"intra_inter_block_attention.layers.{i + 1}", f"blocks/block_{i}"
        rows += linear(f"{official}.attn.qkv", f"{ours}/attn/qkv", bias=False)
        for layer in ("attn.proj", "mlp.fc1", "mlp.fc2"):
            rows += linear(f"{official}.{layer}", f"{ours}/{layer.replace('.', '/')}")
        for norm in ("norm1", "norm2"):
            pairs = (("weight", "scale"), ("bias", "bias"))
            rows += [Rule(f"{official}.{norm}.{theirs}", f"{ours}/{norm}/{own}") for theirs, own in pairs]
    return [*rows, *linear("head", "out")]


def linear_head_rules(config: LinearHead) -> Rules:
    """Gives the table of ``Head`` with one layer."""
    del config
    return linear("fcs.0", "out")
