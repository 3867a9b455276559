"""FlowTok weights: the names of files that derive from its release (its repository could not be read)."""

import numpy as np

from gen.diffusion.backbones.dit import DiTConfig
from gen.errors import GenError
from gen.nn.layers import sincos_positions
from gen.pretrained.rules import SAME, Arrays, Computed, Importer, Rule, Rules, depth_of, joined, linear
from gen.tokenizers.base import Affine
from gen.tokenizers.flowtok import FlowTokConfig, TextProjectorConfig
from gen.tokenizers.flowtok_sampling import FlowTokGenerator

__all__ = ["IMPORTER", "generator", "rules", "velocity_rules"]

_HEADS = {768: 12, 1024: 16, 1152: 16, 1280: 20}


def rules(config: FlowTokConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    block, ours = "context_encoder.layers.{i}", "text/blocks"
    qkv = [f"{block}.attn.W_{part}" for part in "QKV"]
    return [
        *velocity_rules(config.velocity, "velocity/"),
        Rule(tuple(f"{part}.weight" for part in qkv), f"{ours}/attn/qkv/kernel", joined(3)),
        Rule(tuple(f"{part}.bias" for part in qkv), f"{ours}/attn/qkv/bias", joined(3, SAME)),
        *linear(f"{block}.attn.W_O", f"{ours}/attn/proj"),
        *linear(f"{block}.feed_forward.ffn_1", f"{ours}/fc1"),
        *linear(f"{block}.feed_forward.ffn_2", f"{ours}/fc2"),
        *(
            Rule(f"{block}.norm{k}.{theirs}", f"{ours}/norm{k}/{name}")
            for k in (1, 2)
            for theirs, name in (("g", "scale"), ("b", "bias"))
        ),
        *linear("context_encoder.linear", "text/out"),
        *(rule for i in (0, 2, 4) for rule in linear(f"context_projector.{i}", f"text/align{i // 2 + 1}")),
        Rule("t2t_temperature", "text/log_scale"),
    ]


def velocity_rules(network: DiTConfig, ours: str = "") -> Rules:
    """Gives the rows of the velocity network, which lies under `ours`."""
    return [
        Computed("pos_embed", sincos_positions(network.grid, network.width)[None], atol=1e-5),
        *linear("x_embedder", f"{ours}patch"),
        *linear("t_embedder.mlp.0", f"{ours}time/fc1"),
        *linear("t_embedder.mlp.2", f"{ours}time/fc2"),
        Rule("y_embedder.embedding_table.weight", f"{ours}label/embedding"),
        *linear("blocks.{i}.attn.qkv", f"{ours}blocks/attn/qkv"),
        *linear("blocks.{i}.attn.proj", f"{ours}blocks/attn/proj"),
        *linear("blocks.{i}.mlp.fc1", f"{ours}blocks/mlp/fc1"),
        *linear("blocks.{i}.mlp.fc2", f"{ours}blocks/mlp/fc2"),
        *linear("blocks.{i}.adaLN_modulation.1", f"{ours}blocks/ada"),
        *linear("final_layer.linear", f"{ours}final"),
        *linear("final_layer.adaLN_modulation.1", f"{ours}final_ada"),
    ]


def config(weights: Arrays, *, heads: int | None = None, text_heads: int = 8) -> FlowTokConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      heads: attention heads of the velocity network; by default those of the published sizes.
      text_heads: those of the projector.

    Raises GenError when a needed array is missing or not shaped as in a FlowTok, or the heads are not known.
    """
    try:
        tokens, width = weights["pos_embed"].shape[1:]
        channels = weights["x_embedder.weight"].shape[1]
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        inner, text_width = weights["context_encoder.layers.0.feed_forward.ffn_1.weight"].shape
        aligned = weights["context_projector.0.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not a FlowTok: {error} is missing or misshaped; give a file of the release") from None
    if heads is None and width not in _HEADS:
        raise GenError(f"FlowTok width {width} is not a published size; give its number of attention heads (heads)")
    return FlowTokConfig(
        TextProjectorConfig(
            (tokens, text_width),
            channels,
            depth_of(weights, "context_encoder.layers.{i}.attn.W_Q.weight"),
            text_heads,
            inner,
            aligned,
        ),
        DiTConfig(
            (tokens,),
            channels,
            1,
            width,
            depth_of(weights, "blocks.{i}.attn.qkv.weight"),
            _HEADS[width] if heads is None else heads,
            mlp_ratio=hidden / width,
            num_classes=1,
        ),
    )


def generator(config: FlowTokConfig) -> FlowTokGenerator:
    """Gives the released sampler: 20 Euler steps, guidance 2; latents."""
    return FlowTokGenerator(config)


IMPORTER = Importer(
    name="flowtok",
    signature=("context_encoder.linear.weight", "x_embedder.weight", "t2t_temperature"),
    config=config,
    rules=rules,
    generator=generator,
    normalizer=Affine(np.zeros(16, np.float32), np.full(16, 1 / 1.0143, np.float32)),  # of the 512 px tokenizer
)
