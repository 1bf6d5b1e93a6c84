"""The configuration tree: one pydantic model per section, YAML files with ``base:``, ``key=value`` overrides.

Only the cli, ``fastmim.engine.train`` and the package root read it; everything below takes keyword arguments.
"""

from fastmim.config.explain import differences, explain
from fastmim.config.load import config_of, dump_config, load_config, merge_trees, read_tree, save_config
from fastmim.config.objective import ObjectiveSection
from fastmim.config.sections import (
    Config,
    DataSection,
    EfficiencySection,
    ModelSection,
    OptimSection,
    OutputSection,
    TrainSection,
)

__all__ = [
    "Config",
    "DataSection",
    "EfficiencySection",
    "ModelSection",
    "ObjectiveSection",
    "OptimSection",
    "OutputSection",
    "TrainSection",
    "config_of",
    "differences",
    "dump_config",
    "explain",
    "load_config",
    "merge_trees",
    "read_tree",
    "save_config",
]
