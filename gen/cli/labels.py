"""Where a preset meets its data: do the labels suit the model, and what are the classes called."""

import dataclasses
from typing import Any

__all__ = ["with_labels"]


def with_labels(config: Any) -> Any:
    """Gives the run's configuration with the names of its data's classes, where they are known.

    Prints a line for data that have fewer classes than the model.

    Raises:
      GenError: data without labels, or with labels beyond the model's classes, with the flags that help.
    """
    from gen.data.labels import check_classes, missing_classes
    from gen.nn.conditions import class_count

    names: tuple[str, ...] = config.class_names
    for i, stage in enumerate(config.stages):
        classes = class_count(stage.task.conditions) or 0
        if not classes:
            continue
        source, at, where = stage.data.source(), stage.task.classes_at, f"the data set of stage '{stage.name}'"
        flag = f"--stages.{i}.task.{at}" if at else ""
        check_classes(where, source, classes, flag)
        said = missing_classes(where, source, classes, flag) if at else None
        if said is not None:
            print(f"note: {said}")
        names = names or tuple(source.class_names or ())
    return dataclasses.replace(config, class_names=names)
