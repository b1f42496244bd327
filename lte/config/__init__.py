"""Recipes: frozen dataclasses, read from YAML and from `key=value` overrides.

Unknown keys and impossible values are reported together.
"""

from lte.config.describe import describe
from lte.config.idle import idle
from lte.config.read import checked, differences, from_dict, load, replace, to_dict, to_yaml
from lte.config.recipe import (
    DDP,
    Base,
    Codec,
    Compress,
    Data,
    Eval,
    Log,
    LoRA,
    Model,
    Optimizer,
    Outer,
    Override,
    Phase,
    Recipe,
    Run,
    Schedule,
    Server,
    Train,
    WorkerSettings,
)
from lte.config.rules import check

__all__ = [
    "DDP",
    "Base",
    "Codec",
    "Compress",
    "Data",
    "Eval",
    "LoRA",
    "Log",
    "Model",
    "Optimizer",
    "Outer",
    "Override",
    "Phase",
    "Recipe",
    "Run",
    "Schedule",
    "Server",
    "Train",
    "WorkerSettings",
    "check",
    "checked",
    "describe",
    "differences",
    "from_dict",
    "idle",
    "load",
    "replace",
    "to_dict",
    "to_yaml",
]
