"""What both tasks stand on, and what they share.

`calibration_images` gives images (inverted, noise, real, or ones that somebody has), `evaluate` the accuracy of models,
`QuantTask` and `TransferTask` are the tasks of the entry scripts as configurations, which `quant_report` and
`transfer_report` run.
"""

import importlib

# Modules of the other packages import this one's lower floor, so the upper floor is imported when it is asked for.
_HOMES = {
    "utils.data": ("DataConfig", "evaluation_loader"),
    "utils.errors": ("UserError",),
    "utils.evaluation": ("evaluate",),
    "utils.images": ("Inverted", "Noise", "Real", "Stored", "calibration_images"),
    "utils.quant_task": ("QuantTask", "quant_report"),
    "utils.task": ("RunConfig",),
    "utils.transfer_task": ("TransferTask", "transfer_report"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'utils' has no attribute '{name}'")
