"""Knowledge transfer: a student learns a teacher's task from images with kept positions.

`load_student` makes a student, `distill` teaches it as a `DistillConfig` says, `save_student` keeps it in timm's
format. `MATCHES` are what of the teacher it imitates; changes of the images that it is fed are in `utils`.
"""

from utils.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "kt.config": ("DistillConfig", "StudentConfig"),
        "kt.distillation": ("Distilled", "Distiller", "distill"),
        "kt.match": ("MATCHES", "distillation_loss"),
        "kt.student": ("load_student", "save_student"),
    },
)
