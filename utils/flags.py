"""The command lines of both tasks, and the tasks that they stand for. A `Namespace` goes no further than this file.

A command line is read, explained or refused before torch is imported; a task needs it.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from inversion import PRESETS, PRIORS, InversionConfig, configured
from inversion.priors import options, terms
from kt import DistillConfig, StudentConfig
from models import ModelConfig
from quant import QuantConfig
from quant.config import PRESETS as QUANT_PRESETS
from utils.cli import NUMBER_FORMATS, Parser, add_flags, from_flags, given_flags, natural, positive, rate, weight
from utils.config import DataConfig, RunConfig
from utils.device import pick_device, pick_dtype
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.images import Source
    from utils.quant_task import QuantTask
    from utils.transfer_task import TransferTask


def quant_parser(description: str) -> Parser:
    """The command line of `test_quant.py`."""
    parser = Parser(description)
    add_common_arguments(parser, seed=0)
    add_flags(parser, QuantConfig)
    parser.set_defaults(observer=None)  # a preset may speak first
    add = parser.add_argument
    add("--calib-batchsize", type=positive, default=32, help="images per inversion and calibration batch")
    about = "calibration images; default one batch, of --preset quantize"
    add("--num_images", type=positive, help=f"{about} {QUANT_PRESETS['quantize']['num_images']}")
    about = "other inverted images to hold the quantized model against its original on; 0: none"
    add("--check_images", type=natural, default=32, metavar="N", help=about)
    add("--sensitivity", action="store_true", help="measure what each layer alone costs; OUTPUT/sensitivity.json, .png")
    add("--export", metavar="FILE.onnx", help="write the quantized model for ONNX Runtime, check and time it there")
    about = "ONNX version of that file, 17 or newer; default 17, 21 for weights of 4 bits and fewer, which it packs"
    add("--opset", type=int, metavar="N", help=about)
    add("--save", metavar="DIR", help="write the quantized model, to be read by quant.load_quantized(DIR)")
    add_inversion_arguments(parser)
    return parser


def quant_task(args: argparse.Namespace) -> QuantTask:
    """What the flags of `quant_parser` ask for. Raises `UserError` where they make no sense."""
    from utils.quant_task import QuantTask

    preset = QUANT_PRESETS.get(args.preset, {})
    args = argparse.Namespace(**vars(args))
    args.observer = args.observer or preset.get("observer", QuantConfig.observer)
    return QuantTask(
        **common_configs(args),
        images=source(args, inversion_config(args, args.calib_batchsize)),
        num_images=args.num_images or preset.get("num_images", args.calib_batchsize),
        quantization=from_flags(QuantConfig, args, batch_size=args.calib_batchsize, seed=args.seed),
        check_images=args.check_images,
        check_pool=args.datapool,
        sensitivity=args.sensitivity,
        save=args.save,
        export=args.export,
        opset=args.opset,
    )


def transfer_parser(description: str) -> Parser:
    """The command line of `test_kt.py`; its model is the teacher."""
    parser = Parser(description)
    add_common_arguments(parser, seed=DistillConfig.seed)
    add_flags(parser, StudentConfig)
    add_flags(parser, DistillConfig, unset=True)
    add = parser.add_argument
    add("--images_per_epoch", type=natural, default=100, help="images added to the pool each epoch; 0: only use it")
    add("--minutes", type=rate, metavar="M", help="instead: make images for so long, before the first epoch")
    add("--max_images", type=positive, help="images after which no more are added; default no limit")
    add("--inversion-batchsize", type=positive, default=100, help="images per inversion batch")
    add_inversion_arguments(parser)
    return parser


def transfer_task(args: argparse.Namespace) -> TransferTask:
    """What the flags of `transfer_parser` ask for. Raises `UserError` where they make no sense."""
    from utils.transfer_task import TransferTask

    student = from_flags(StudentConfig, args)
    given = given_flags(DistillConfig, args)
    return TransferTask(
        **common_configs(args),
        images=source(args, inversion_config(args, args.inversion_batchsize, student="the student of the run")),
        images_per_epoch=args.images_per_epoch,
        minutes=args.minutes,
        max_images=args.max_images,
        student=student,
        distillation=DistillConfig.of_preset(args.preset, student, args.flip is not False, **given, seed=args.seed),
    )


def add_common_arguments(parser: Parser, seed: int) -> None:
    """The model, its data, the images and the run."""
    add = parser.add_argument
    add_flags(parser, ModelConfig)
    add_flags(parser, DataConfig)
    modes = "images to use: 0 inverted, 1 Gaussian noise, 2 real ones from the training split"
    add("--mode", type=int, choices=(0, 1, 2), default=0, help=modes)
    add("--images", metavar="DIR", help="use these images instead: an image pool, or a folder of image files")
    add("--datapool", default="./datapool", metavar="DIR", help="where inverted images are kept")
    add_flags(parser, RunConfig, seed=seed)
    add_dtype_argument(parser)


def add_dtype_argument(parser: Parser) -> None:
    """`--dtype`, for `inversion_config`."""
    text = "number format of the inverted model; auto: bfloat16 where the hardware multiplies it"
    parser.add_argument("--dtype", choices=NUMBER_FORMATS, default="auto", help=text)


def add_device_arguments(parser: Parser) -> None:
    """The flags of a timing script: device and number format."""
    add_flags(parser, RunConfig, only=("device", "gpu"))
    add_dtype_argument(parser)


def add_inversion_arguments(parser: Parser) -> None:
    """Preset, priors, strategy, schedule, optimizer and loss weights. None means: not given."""
    add = parser.add_argument
    add(
        "--preset",
        choices=PRESETS,
        help="settings of a method, or what serves best; flags that are given win over them",
    )
    about = "what images are asked to be besides of a label; default deepinversion"
    add("--prior", nargs="+", choices=PRIORS, help=about)
    add_flags(parser, InversionConfig, unset=True)
    for name, term in terms().items():
        used = f"default {term.weight:g} with its prior" if name != "oh" else f"default {term.weight:g}"
        add(f"--{name}", type=weight, metavar="W", help=f"{term.help}; {used}")
    for name, option in options().items():
        add(f"--{name}", type=option.type, metavar="X", help=f"{option.help}; default {option.default}")


def inversion_config(args: argparse.Namespace, batch_size: int, student: str | None = None) -> InversionConfig:
    """What the flags of `add_inversion_arguments` ask for. Raises `UserError` where they make no sense."""
    priors = {name: value for name in (*terms(), *options()) if (value := getattr(args, name)) is not None}
    dtype = pick_dtype(args.dtype, pick_device(args.device))
    fixed = {"batch_size": batch_size, "seed": args.seed, "dtype": dtype, "student": student}
    return configured(args.preset, args.prior, **given_flags(InversionConfig, args), **priors, **fixed)


def source(args: argparse.Namespace, config: InversionConfig) -> Source:
    """The images that `--images` or `--mode` ask for. Raises `UserError` where both do."""
    from utils.images import Inverted, Noise, Real, Stored

    if args.images is not None:
        if args.mode:
            raise UserError("--images are images that you have and --mode asks for others; leave one of them out")
        return Stored(args.images, args.background)
    return (Inverted(config, args.datapool), Noise(), Real(args.dataset, args.class_order, args.background))[args.mode]


def common_configs(args: argparse.Namespace) -> dict[str, object]:
    """What `add_common_arguments` says of model, data and run, as fields of a task."""
    run = from_flags(RunConfig, args, progress=True, command=args.command)
    return {"model": from_flags(ModelConfig, args), "data": from_flags(DataConfig, args), "run": run}
