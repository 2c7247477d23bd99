"""Knowledge transfer: a student learns a teacher's task from images with kept positions."""

from kt.augment import AUGMENTATIONS, augmented
from kt.distill import Distiller, distillation_loss
from kt.student import load_student, save_student

__all__ = ["AUGMENTATIONS", "Distiller", "augmented", "distillation_loss", "load_student", "save_student"]
