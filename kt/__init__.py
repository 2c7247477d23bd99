"""Knowledge transfer: a student learns a teacher's task from images with kept positions.

`load_student` makes a student, `distill` teaches it as a `DistillConfig` says, `save_student` keeps it in timm's
format. `AUGMENTATIONS` are the changes of images that it can be fed.
"""

from kt.augment import AUGMENTATIONS, augmented
from kt.distill import DistillConfig, Distilled, Distiller, distill, distillation_loss
from kt.student import StudentConfig, load_student, save_student

__all__ = [
    "AUGMENTATIONS",
    "DistillConfig",
    "Distilled",
    "Distiller",
    "StudentConfig",
    "augmented",
    "distill",
    "distillation_loss",
    "load_student",
    "save_student",
]
