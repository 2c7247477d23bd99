"""What is imported when it is first used, so that command lines are read, and refused, before torch is imported.

A module that a command line needs (configurations, and the tables that flags choose from) takes `torch` from here; a
package gives its names by `exports`.
"""

from __future__ import annotations

import importlib
import os
import sys

# Threads of GNU OpenMP (Linux) spin while they wait for one another. Where another program holds a core, they keep the
# one that they wait for from running, and all takes many times as long: so they soon sleep. Read as torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Nothing else is imported up here: this comes before Ctrl-C is in hand.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Later(type(sys)):
    """A module that is imported when something of it is first asked for."""

    def __getattr__(self, name: str) -> object:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn
else:
    torch, F, dist = Later("torch"), Later("torch.nn.functional"), Later("torch.distributed")
    nn, np = Later("torch.nn"), Later("numpy")


def exports(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names come from its modules when they are asked for.

    Args:
        package: its name.
        homes: the names that it gives, by the module that has them.
    """
    found = {name: home for home, names in homes.items() for name in names}

    def give(name: str) -> object:
        if name not in found:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(found[name]), name)

    return give, lambda: sorted({*vars(sys.modules[package]), *found}), sorted(found)


__all__ = ["F", "Later", "dist", "exports", "nn", "torch"]
