"""Compiles a preset's training step for the devices of this process and prints its collectives as JSON."""

import dataclasses
import json
import sys

from gen.cli.estimates import planned
from gen.cli.overrides import mesh_overrides
from gen.programs import programs
from gen.training.hlo import collectives
from gen.training.sharding import make_mesh

if __name__ == "__main__":
    preset, mesh = sys.argv[1:]
    overrides = (*mesh_overrides(mesh), ("engine.mesh.shard_from", "256"))
    recipe = planned(preset, {}, overrides, {"batch": 16})
    placed = make_mesh(recipe.config.engine.mesh)
    found = programs(recipe.config, placed, frozen=recipe.frozen, artifacts=recipe.artifacts, kinds=("train",))
    texts = [program.trace().lower().compile().as_text() for program in found]
    print(json.dumps([{k: dataclasses.asdict(v) for k, v in collectives(text).items()} for text in texts]))
