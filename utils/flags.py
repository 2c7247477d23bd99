"""The flags of both tasks, and the configurations that they stand for. A `Namespace` goes no further than this file."""

from __future__ import annotations

import argparse

from inversion import IMPORTANCES, INITS, PRESETS, PRIORS, STRATEGIES, InversionConfig, configured
from inversion.config import LR_SCHEDULES
from inversion.priors import options, terms
from kt import AUGMENTATIONS, DistillConfig, StudentConfig
from kt.distill import LR_SCHEDULES as KD_LR_SCHEDULES
from kt.distill import OPTIMIZERS
from kt.student import FINETUNE
from kt.student import INITS as STUDENT_INITS
from models import DEFAULT_MODEL, ModelConfig
from quant import OBSERVERS, QuantConfig
from utils.cli import Parser, natural, positive, rate
from utils.data import DataConfig
from utils.device import pick_device, pick_dtype
from utils.errors import UserError
from utils.images import Inverted, Noise, Real, Source, Stored
from utils.quant_task import QuantTask
from utils.run import RunConfig
from utils.transfer_task import TransferTask

MODES = "0 inverted, 1 Gaussian noise, 2 real"
# Flags of the inversion that have another name than the field that they set.
RENAMED = {"lr_g": "lr", "projection": "projections"}
INVERSION = (
    *("preset", "prior", "strategy", "importance", "prune_it", "prune_ratio", "pri_division", "iterations", "lr_g"),
    *("betas", "lr_schedule", "warmup", "init", "flip", "targets", "soft_label", "projection", "snapshots"),
)


def quant_parser(description: str) -> Parser:
    """The command line of `test_quant.py`."""
    parser = Parser(description)
    add = parser.add_argument
    add_model_arguments(parser, "", "a named DeiT, a timm ViT, hf-hub:ORG/NAME, local-dir:DIR")
    add(
        "--mode",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help=f"calibration images: {MODES}",
    )
    add("--images", metavar="DIR", help="calibrate with these instead: an image pool, or a folder of image files")
    add("--w_bit", type=int, default=8, help="bits of the weights, 2 to 8; 32 leaves them alone")
    add("--a_bit", type=int, default=8, help="bits of the activations, 2 to 8; 32 leaves them alone")
    add_quantization_arguments(parser)
    add("--calib-batchsize", type=positive, default=32, help="images per inversion and calibration batch")
    add("--num_images", type=positive, help="calibration images; default one batch")
    add("--tensorboard", action="store_true", help="write the course of the inversion to OUTPUT/tensorboard")
    add_inversion_arguments(parser)
    add_common_arguments(parser, seed=0, output="./runs/MODEL-CALIBRATION-wWaA-sSEED")
    return parser


def quant_task(args: argparse.Namespace) -> QuantTask:
    """What the flags of `quant_parser` ask for. Raises `UserError` where they make no sense."""
    quantization = QuantConfig(
        w_bit=args.w_bit,
        a_bit=args.a_bit,
        observer=args.observer,
        fill=args.fill,
        keep=tuple(part.strip() for part in args.keep.split(",")) if args.keep is not None else (),
        bias_correction=args.bias_correction,
        reconstruct=args.reconstruct,
        reconstruct_steps=args.reconstruct_steps,
        reconstruct_seconds=args.reconstruct_seconds,
        batch_size=args.calib_batchsize,
        seed=args.seed,
    )
    return QuantTask(
        model=ModelConfig(args.model, args.model_path),
        data=data_config(args),
        images=source(args, inversion_config(args, args.calib_batchsize)),
        num_images=args.num_images or args.calib_batchsize,
        quantization=quantization,
        run=run_config(args),
        sensitivity=args.sensitivity,
        save=args.save,
        export=args.export,
    )


def transfer_parser(description: str) -> Parser:
    """The command line of `test_kt.py`."""
    parser, known = Parser(description), DistillConfig()
    add = parser.add_argument
    add_model_arguments(parser, "the teacher's ", "teacher: as for test_quant.py")
    add(
        "--mode",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help=f"images to learn from: {MODES}",
    )
    add("--images", metavar="DIR", help="learn from these instead: an image pool, or a folder of image files")
    add("--student", metavar="NAME", help="architecture of the student; default the teacher's")
    add("--student_path", metavar="PATH", help="backbone weights of the student, a file or a folder")
    add("--student_init", choices=STUDENT_INITS, default="pretrained", help="where its weights start")
    add("--finetune", choices=FINETUNE, default="linear", help="what learns: the new head, or everything")
    add("--kr-batchsize", type=positive, default=known.batch_size, help="images per distillation step")
    rounds = {"dest": "epochs", "type": positive, "default": known.epochs}
    add("--epoches", "--epochs", **rounds, help="rounds of synthesis and distillation")
    add("--images_per_epoch", type=natural, default=100, help="images added to the pool each epoch; 0: only use it")
    add("--max_images", type=positive, help="images after which no more are added; default no limit")
    add("--inversion-batchsize", type=positive, default=100, help="images per inversion batch")
    add("--kd_steps", type=positive, default=known.steps, help="distillation steps per epoch")
    add("--eval_every", type=positive, default=known.eval_every, help="epochs between two evaluations")
    add("--optimizer", choices=OPTIMIZERS, default=known.optimizer, help="of the student; sgd has momentum 0.9")
    add("--lr", type=rate, default=known.lr, help="learning rate of the student")
    add("--kd_lr_schedule", choices=KD_LR_SCHEDULES, default=known.lr_schedule, help="of --lr, over all epochs")
    add("--temperature", type=rate, default=known.temperature, help="of the soft targets; logits are divided by it")
    add("--augment", nargs="*", choices=AUGMENTATIONS, default=list(known.augment), help="changes of the images")
    add("--tensorboard", action="store_true", help="write the course of the inversion to OUTPUT/tensorboard")
    add_inversion_arguments(parser)
    add_common_arguments(parser, seed=known.seed, output="./runs/MODEL-kt-IMAGES-FINETUNE-sSEED")
    return parser


def transfer_task(args: argparse.Namespace) -> TransferTask:
    """What the flags of `transfer_parser` ask for. Raises `UserError` where they make no sense."""
    distillation = DistillConfig(
        batch_size=args.kr_batchsize,
        epochs=args.epochs,
        steps=args.kd_steps,
        eval_every=args.eval_every,
        optimizer=args.optimizer,
        lr=args.lr,
        lr_schedule=args.kd_lr_schedule,
        temperature=args.temperature,
        augment=tuple(args.augment),
        seed=args.seed,
    )
    return TransferTask(
        model=ModelConfig(args.model, args.model_path),
        data=data_config(args),
        images=source(args, inversion_config(args, args.inversion_batchsize, student="the student of the run")),
        images_per_epoch=args.images_per_epoch,
        max_images=args.max_images,
        student=StudentConfig(args.student, args.student_path, args.student_init, args.finetune),
        distillation=distillation,
        run=run_config(args),
    )


def add_model_arguments(parser: Parser, whose: str, names: str) -> None:
    """The model, its data and the pool."""
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help=names)
    add(
        "--dataset",
        metavar="DIR",
        help="evaluation data: image folder or CIFAR; the bundled model needs none",
    )
    add("--model_path", metavar="PATH", help=f"{whose}local weights, a file or a folder with NAME.pth, not the hub's")
    add("--datapool", default="./datapool", metavar="DIR", help="where inverted images are kept")


def add_quantization_arguments(parser: Parser) -> None:
    """How ranges are chosen, what is done about the error, and what becomes of the quantized model."""
    add = parser.add_argument
    add(
        "--observer",
        choices=(*OBSERVERS, "auto"),
        default="minmax",
        help="how ranges are chosen; minmax quantizes residual sums, scores and embeddings too, as published, the "
        "others the factors of matrix products alone; auto: repq below 8 bits of activations, else mse",
    )
    add(
        "--fill",
        action="store_true",
        help="calibrate on full grids: the places of stopped patches get copies of the nearest kept one of their image",
    )
    add("--keep", metavar="PARTS", help="first,last,head or parts of layers' names: these get at least 8 bits")
    add("--bias_correction", action="store_true", help="shift biases until every layer's mean output is as it was")
    add("--reconstruct", action="store_true", help="learn rounding and ranges, block by block, on the images")
    add("--reconstruct_steps", type=positive, default=QuantConfig.reconstruct_steps, help="steps for each block")
    add("--reconstruct_seconds", type=rate, metavar="S", help="time limit of the reconstruction in s; default none")
    add("--sensitivity", action="store_true", help="measure what each layer alone costs; OUTPUT/sensitivity.json, .png")
    add("--export", metavar="FILE.onnx", help="write the quantized model for ONNX Runtime, check and time it there")
    add("--save", metavar="DIR", help="write the quantized model, to be read by quant.load_quantized(DIR)")


def add_inversion_arguments(parser: Parser) -> None:
    """Priors, strategy, schedule, optimizer and loss weights. None means: not given."""
    defaults = InversionConfig()
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="published settings of a method; flags that are given win over them")
    add(
        "--prior",
        nargs="+",
        choices=PRIORS,
        help="what images are asked to be besides of a label; default deepinversion",
    )
    add("--strategy", choices=STRATEGIES, help="which patches stop; default smi with --prune_it, else dense")
    add("--importance", choices=IMPORTANCES, help="what ranks the patches; default cls, the class token's attention")
    add("--prune_it", type=int, nargs="+", metavar="T", help="iterations at which patches stop; default -1: dense")
    add(
        "--prune_ratio",
        type=float,
        nargs="+",
        metavar="R",
        help="share of the remaining patches stopped at each of them, in [0, 1); default 0: dense",
    )
    add("--pri_division", type=int, metavar="V", help=f"images of one pri trajectory; default {defaults.pri_division}")
    add("--iterations", type=positive, help=f"optimizer steps per image; default {defaults.iterations}")
    add("--lr_g", type=float, help=f"Adam's learning rate, in normalized pixels; default {defaults.lr}")
    add("--betas", type=float, nargs=2, metavar="B", help="Adam's averaging; default 0.5 0.99")
    add("--lr_schedule", choices=LR_SCHEDULES, help="course of the learning rate; default constant")
    add("--warmup", type=int, metavar="N", help="iterations in which the learning rate rises; default 0")
    add("--init", choices=INITS, help="noise that pixels start from; default white, pink has images' spectrum")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror the image in half of the iterations; default yes")
    add("--targets", nargs="+", metavar="T", help="labels: uniform (default), balanced, class:K, or a list of classes")
    add("--soft_label", type=float, metavar="ALPHA", help="share of a label spread over all classes; default 0")
    add(
        "--projection",
        nargs="+",
        metavar="P",
        help="what is done to pixels after a step: clamp (always), lowpass:cutoff=0.8,every=100",
    )
    add(
        "--snapshots",
        type=int,
        nargs="+",
        metavar="T",
        help="iterations at which a batch is kept as it is, for pictures",
    )
    for name, term in terms().items():
        used = f"default {term.weight:g} with its prior" if name != "oh" else f"default {term.weight:g}"
        add(f"--{name}", type=float, metavar="W", help=f"{term.help}; {used}")
    for name, option in options().items():
        add(f"--{name}", type=option.type, metavar="X", help=f"{option.help}; default {option.default}")


def inversion_config(args: argparse.Namespace, batch_size: int, student: str | None = None) -> InversionConfig:
    """What the flags of `add_inversion_arguments` ask for. Raises `UserError` where they make no sense."""
    names = (*INVERSION, *terms(), *options())
    given = {RENAMED.get(name, name): value for name in names if (value := getattr(args, name)) is not None}
    dtype = pick_dtype(args.dtype, pick_device(args.device))
    return configured(**given, batch_size=batch_size, seed=args.seed, dtype=dtype, student=student)


def source(args: argparse.Namespace, config: InversionConfig) -> Source:
    """The images that `--images` or `--mode` ask for. Raises `UserError` where both do."""
    if args.images is not None:
        if args.mode:
            raise UserError("--images are images that you have and --mode asks for others; leave one of them out")
        return Stored(args.images)
    return (Inverted(config, args.datapool), Noise(), Real(args.dataset))[args.mode]


def add_common_arguments(parser: Parser, seed: int, output: str) -> None:
    """The flags that every task has: data, device, output."""
    add = parser.add_argument
    add("--val-batchsize", type=positive, default=200, help="images per evaluation batch")
    add("--num-workers", type=natural, default=4, help="processes that load images")
    add("--seed", type=natural, default=seed, help="seed of noise, labels, jitter and random choices")
    add_device_arguments(parser)
    add("--output", metavar="DIR", help=f"where report and pictures go; default {output}")
    add("--val_limit", type=positive, metavar="N", help="evaluate on N images only; default all")


def add_device_arguments(parser: Parser) -> None:
    """Where to run, and in which number format."""
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to run")
    add("--gpu", type=natural, default=0, help="number of the CUDA GPU")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="number format of the inverted model; auto: bfloat16 where the hardware multiplies it",
    )


def data_config(args: argparse.Namespace) -> DataConfig:
    """What `add_common_arguments` says of the data."""
    return DataConfig(args.dataset, args.val_limit, args.val_batchsize, args.num_workers)


def run_config(args: argparse.Namespace) -> RunConfig:
    """What `add_common_arguments` says of the run."""
    return RunConfig(
        args.output, args.device, args.gpu, args.seed, args.tensorboard, progress=True, command=args.command
    )
