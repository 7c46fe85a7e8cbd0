"""From flags to a recommender, one file a system: what the main job, loading and planning know of each by its name."""

from __future__ import annotations

import importlib

from efficientids.systems.base import System

# --recommender → the module that has it as `SYSTEM`; imported only when asked for.
_MODULES = {
    "efficientids": "efficientids.systems.efficientids",
    "etegrec": "efficientids.systems.etegrec",
    "sasrec": "efficientids.systems.sasrec",
    "item_knn": "efficientids.systems.baselines",
    "popularity": "efficientids.systems.baselines",
}


def get(name: str) -> System:
    """The system of a `--recommender`; KeyError for an unknown name."""
    return importlib.import_module(_MODULES[name]).SYSTEMS[name]
