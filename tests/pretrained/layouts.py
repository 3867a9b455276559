"""Files in the layout of diffusers, written as the library documents it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gen import arrays


def dit_names(official: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An official DiT under the names of DiTTransformer2DModel."""
    once = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.embedding_table": "class_embedder.embedding_table",
    }
    plain = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.linear": "proj_out_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
    }
    inside = {"attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    inside["adaLN_modulation.1"] = "norm1.linear"
    depth = 1 + max(int(name.split(".")[1]) for name in official if name.startswith("blocks."))
    found = {}
    for name, array in official.items():
        stem, _, leaf = name.rpartition(".")
        if stem in once:
            found |= {f"transformer_blocks.{i}.norm1.emb.{once[stem]}.{leaf}": array for i in range(depth)}
        elif stem in plain:
            found[f"{plain[stem]}.{leaf}"] = array
        elif name != "pos_embed":
            _, block, stem = stem.split(".", 2)
            if stem == "attn.qkv":
                parts = zip("qkv", np.split(array, 3), strict=True)
                found |= {f"transformer_blocks.{block}.attn1.to_{n}.{leaf}": part for n, part in parts}
            else:
                found[f"transformer_blocks.{block}.{inside[stem]}.{leaf}"] = array
    return found


def component(folder: Path, cls: str, weights: dict[str, np.ndarray], **settings: Any) -> Path:
    """A folder as save_pretrained writes it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": cls, **settings}))
    arrays.write(folder / "diffusion_pytorch_model.safetensors", weights)
    return folder
