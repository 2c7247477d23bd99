"""Files and folders of tensors -> trees of dicts, lists and tensors. No file can run code.

Formats that are not read are refused by name, with what to do instead.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from utils.checkpoint import CHECKPOINT
from utils.errors import UserError
from utils.files import read_json

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".tar", ".th", ".pkl", ".pickle")
"""What weights files that can be read are called; of a file that is named outright the content decides."""

INDEX = (".safetensors.index.json", ".bin.index.json")
"""How the names of files end that say in which files the tensors of a model are."""

SHARD = re.compile(r"-\d+-of-\d+\.\w+$")

STATE = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states|training_args|trainer_state)[\w-]*\.\w+")
"""What trainers keep beside a model."""

IN_ITS_FRAMEWORK = "load it where it was made and save its tensors, by their timm names, as .npz or .safetensors"
SOURCE = "give the weights that it was made from"
FROM_TORCH = "where it is trusted, save its state_dict() with torch.save or safetensors"
GATHER = "gather them with DeepSpeed's zero_to_fp32.py, and give what that writes"

# What a format is called, how its files begin, what they are called, what to do. A folder of shards is nothing else.
SHARDED = (("DeepSpeed shards", (), ("zero_to_fp32.py", "*_optim_states.pt", "*mp_rank_*_model_states.pt"), GATHER),)
REFUSED: tuple[tuple[str, tuple[bytes, ...], tuple[str, ...], str], ...] = (
    ("a Git LFS pointer", (b"version https://git-lfs",), (), "fetch the file itself with git lfs pull"),
    ("a web page", (b"<!doctype html", b"<html"), (), "download the file itself"),
    *SHARDED,
    ("Keras HDF5", (b"\x89hdf",), ("*.h5", "*.hdf5", "*.keras"), IN_ITS_FRAMEWORK),
    ("a TensorFlow SavedModel", (), ("saved_model.pb",), IN_ITS_FRAMEWORK),
    ("a TensorFlow checkpoint", (), ("*.index", "*.meta", "*.data-*-of-*", "*.pb"), IN_ITS_FRAMEWORK),
    ("TensorFlow Lite", (), ("*.tflite",), SOURCE),
    ("JAX msgpack (Flax)", (), ("*.msgpack",), IN_ITS_FRAMEWORK),
    ("a JAX checkpoint (Orbax)", (), ("manifest.ocdbt", "_CHECKPOINT_METADATA"), IN_ITS_FRAMEWORK),
    ("ONNX", (), ("*.onnx",), SOURCE),
    ("GGUF", (b"gguf",), ("*.gguf",), SOURCE),
    ("a compiled model", (), ("*.engine", "*.plan", "*.trt", "*.mlmodel", "*.pte"), SOURCE),
    ("PaddlePaddle", (), ("*.pdparams", "*.pdmodel"), IN_ITS_FRAMEWORK),
    ("a Python pickle", (), ("*.joblib",), FROM_TORCH),
    ("an archive", (b"\x1f\x8b",), ("*.gz", "*.tgz", "*.zip", "*.7z", "*.zst", "*.rar"), "unpack it"),
)


def weights_file(folder: Path, first: Sequence[str], flag: str) -> Path:
    """The weights in a folder: a file, the index of several, or the folder itself where it is one checkpoint.

    Args:
        folder: where to look.
        first: names that are taken before all others.
        flag: what errors call the folder's flag.

    Raises:
        UserError: nothing there, several that could be meant, or a format that is not read.
    """
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    found = [name for name in first if name in names]
    if not found and ((folder / ".metadata").is_file() or any(name.endswith(".distcp") for name in names)):
        return folder
    if not found:
        for name in names:
            _refuse_format(folder / name, SHARDED)
        found = _candidates(folder, names)
    if len(found) == 1:
        return folder / found[0]
    if found and all(SHARD.search(name) for name in found):
        raise UserError(
            f"{flag} {folder} has the shards {found[0]} .. but not their .index.json, which says what is where"
        )
    if found:
        listed = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        raise UserError(f"{flag} {folder} has several weights files: {listed}; give the one that is meant with {flag}")
    for name in names:
        _refuse_format(folder / name, REFUSED)
    inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    deeper = f"; it has the folders {', '.join(inside[:4])}" if inside else ""
    raise UserError(f"no weights in {flag} {folder}: looked for {', '.join(first)} or one other weights file{deeper}")


def _candidates(folder: Path, names: Sequence[str]) -> list[str]:
    """The files in a folder that could be meant, an index in place of the files that it names."""
    indices = [name for name in names if name.endswith(INDEX)]
    parts = {part for index in indices for part in _shards(folder / index).values()}
    if "model.safetensors" in names:
        parts.add(CHECKPOINT)
    files = [name for name in names if name.endswith(SUFFIXES) and not STATE.fullmatch(name)]
    return [*indices, *(name for name in files if name not in parts)]


def read_tree(path: Path) -> Any:
    """What is in a file or a folder: dicts, lists, tensors. Raises `UserError` where it cannot be read."""
    if path.is_dir():
        return _distributed(path)
    if not path.is_file():
        raise UserError(f"cannot read weights from {path}: it does not exist")
    _refuse_format(path, REFUSED)
    _refuse_part(path)
    return _sharded(path) if path.name.endswith(INDEX) else _content(path)


def _content(path: Path) -> Any:
    """What is in a file of tensors. Raises `UserError` where it cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if path.suffix == ".safetensors" or start[8:] == b"{":
            return load_file(path)
        if zipfile.is_zipfile(path):
            names = zipfile.ZipFile(path).namelist()
            if names and all(name.endswith(".npy") for name in names):
                return _arrays(path)
            _refuse_archive(path, names)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the `args` beside the weights of many a training
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch, numpy, zipfile and safetensors each raise their own kinds
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error):
            reason = f"it holds Python objects besides tensors{_foreign(path)}, which could run code; {FROM_TORCH}"
        raise UserError(f"cannot read weights from {path}: {reason}") from None


def _foreign(path: Path) -> str:
    """What a torch file holds that is no tensor, the longest name, in brackets; empty where it cannot be told."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a plain pickle, which is no torch file
        return ""
    return f" ({max(names, key=len)})" if names else ""


def _refuse_format(path: Path, formats: Sequence[tuple]) -> None:
    """Raise `UserError`, naming it, for a file of one of the formats, which are rows of `REFUSED`."""
    with open(path, "rb") as file:
        start = file.read(32).lower()
    for kind, magics, patterns, advice in formats:
        if start.startswith(magics) or any(fnmatch(path.name, pattern) for pattern in patterns):
            raise UserError(f"{path} is {kind}; {advice}")


def _refuse_part(path: Path) -> None:
    """Raise `UserError` for a file that is a part of a checkpoint."""
    if path.suffix == ".distcp":
        raise UserError(f"{path} is a part of a torch.distributed checkpoint; give its folder")
    if SHARD.search(path.name):
        raise UserError(f"{path} is one shard of several; give the folder, or the .index.json in it")


def _refuse_archive(path: Path, names: Sequence[str]) -> None:
    """Raise `UserError` for a zip file that is not what `torch.save` writes."""
    inside = {name.partition("/")[2] for name in names}
    if any(name.startswith("code/") for name in inside):
        raise UserError(f"{path} is TorchScript; {FROM_TORCH}: torch.jit.load(FILE).state_dict()")
    if any("exported_program" in name or name == "archive_format" for name in inside):
        raise UserError(f"{path} is an exported program; {FROM_TORCH}: torch.export.load(FILE).state_dict")
    if "data.pkl" not in inside:
        raise UserError(f"{path} is an archive; unpack it")


def _shards(index: Path) -> dict[str, str]:
    """The file of every tensor. Raises `UserError` for an index that cannot be read."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} has no weight_map from tensors to files")
    return found


def _sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of all files of an index. Raises `UserError` where files or tensors are missing."""
    shards, tensors = _shards(index), {}
    for shard in sorted(set(shards.values())):
        file = index.parent / shard
        if Path(shard).name != shard or not file.is_file():
            raise UserError(f"{index} names {shard}, which is not beside it")
        content = _content(file)
        if not isinstance(content, dict):
            raise UserError(f"{file} holds no tensors by their names")
        tensors |= content
    if shards.keys() != tensors.keys():
        raise UserError(f"{index} and its files differ: {min(shards.keys() ^ tensors.keys())} is in one of them only")
    return tensors


def _arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file. Raises `UserError` for a kind of number that torch has not."""
    arrays = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            try:
                arrays[name] = torch.from_numpy(file[name])
            except TypeError:
                raise UserError(f"{path}: {name} is {file[name].dtype}, not a number of numpy; save float32") from None
    return arrays


# What torch.distributed.checkpoint's notes on its files are made of: records, none of which does anything.
RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
}


class _Records(pickle.Unpickler):
    """Reads torch.distributed.checkpoint's notes on its files, in which nothing but `RECORDS` can be."""

    def find_class(self, module: str, name: str) -> Any:
        """A record's class. Raises `pickle.UnpicklingError` for everything else."""
        if module.startswith("pathlib") and name.endswith("Path"):
            return lambda *parts: "/".join(parts)
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if plain or name in RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _distributed(folder: Path) -> dict[str, Any]:
    """The tensors of a folder of torch.distributed.checkpoint. Raises `UserError` where it cannot be read."""
    import torch.distributed.checkpoint as dcp  # slow to import, and rarely needed
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **how: Any) -> Any:
            with open(folder / ".metadata", "rb") as file:
                about = _Records(file).load()
            outside = [one.relative_path for one in about.storage_data.values() if "/" in one.relative_path]
            if outside:
                raise ValueError(f"{outside[0]} is not a file in it")
            return about

    try:
        reader = Reader(folder)
        about = reader.read_metadata()
        entries = {key: one for key, one in about.state_dict_metadata.items() if isinstance(one, TensorStorageMetadata)}
        tensors = {key: torch.empty(one.size, dtype=one.properties.dtype) for key, one in entries.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a group of processes, which there is none of
            dcp.load(tensors, storage_reader=reader)
    except Exception as error:  # pickle and torch each raise their own kinds
        convert = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth"
        reason = f"{type(error).__name__} {error}".splitlines()[0][:120]
        raise UserError(
            f"cannot read the torch.distributed checkpoint {folder} ({reason}); convert it: {convert}"
        ) from None
    tree: dict[str, Any] = {}
    for key, value in tensors.items():
        *places, name = map(str, about.planner_data.get(key, (key,)))
        node = tree
        for place in places:
            node = node.setdefault(place, {})
        node[name] = value
    return tree
