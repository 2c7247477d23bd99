"""What both tasks stand on, and what they share.

`calibration_images` gives images (inverted, noise, real, or ones that somebody has), `augmented` changes them,
`evaluate` gives the accuracy of models; `QuantTask` and `TransferTask` are the tasks of the entry scripts as
configurations, which `quant_report` and `transfer_report` run.
"""

from utils.lazy import exports

# Modules of the other packages import this one's lower floor, so the upper floor is imported when it is asked for.
__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "utils.augment": ("AUGMENTATIONS", "augmented"),
        "utils.config": ("DataConfig", "RunConfig"),
        "utils.data": ("evaluation_loader",),
        "utils.errors": ("UserError",),
        "utils.evaluation": ("evaluate",),
        "utils.images": ("Inverted", "Noise", "Real", "Stored", "calibration_images"),
        "utils.quant_task": ("QuantTask", "quant_report"),
        "utils.transfer_task": ("TransferTask", "transfer_report"),
    },
)
