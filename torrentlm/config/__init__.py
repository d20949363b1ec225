"""What the operator wrote: model.toml, ``TORRENTLM_*`` and command-line options, merged into one ``Settings``."""

from torrentlm.config.kinds import parse_size
from torrentlm.config.merging import NODE_KEYS, load, load_node, merge, read_file, variable_of
from torrentlm.config.settings import (
    DTYPES,
    FLOORS,
    PRECISIONS,
    TASKS,
    AdapterRecipe,
    Blocks,
    NodeConfig,
    Recipe,
    Settings,
    default_data,
)

__all__ = [
    "DTYPES",
    "FLOORS",
    "NODE_KEYS",
    "PRECISIONS",
    "TASKS",
    "AdapterRecipe",
    "Blocks",
    "NodeConfig",
    "Recipe",
    "Settings",
    "default_data",
    "load",
    "load_node",
    "merge",
    "parse_size",
    "read_file",
    "variable_of",
]
