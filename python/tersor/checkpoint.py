"""Checkpoints: one safetensors file of the whole model. The layers are built from the tags that the file holds.

A file is untrusted: its names, tags, shapes and dtypes are checked against the model before the model is touched (load_plan.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .formats import LAYOUT_VERSION
from .load_plan import TAG, LoadPlan, Source, identity, is_sharded, listed, split
from .nn import QuantLinear
from .plain import other_than_stored
from .swap import settle

_ZIP = b"PK\x03\x04"  # torch.save since 1.6
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9"  # torch.save before that: the pickle of its magic number


def save(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes the state_dict of `model` (packed layers with their tags, and every float module) as one safetensors file.

    Tensors that are one in memory are stored once; the metadata holds their other names: {"format": "tersor", "layout": "1",
    "version": ..., "aliases": JSON {name: stored name}}. CPU tensors are written from where they lie (only non-contiguous and
    partly overlapping ones are copied); those of other devices come to the host first. The file appears whole or not at all:
    it is written beside `path`, synced and renamed.

    Raises FileExistsError where `path` exists and overwrite is False (a link is replaced, not followed), FileNotFoundError
    where its folder does not, ValueError where it is a directory or the state_dict holds what a safetensors file cannot (meta,
    sparse or sharded tensors, other objects), OSError where the disk refuses.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model is {type(model).__name__}, expected an nn.Module")
    target = _path("save", path)
    if os.path.isdir(target):
        raise ValueError(f"save: {target} is a directory; name a file in it, such as {os.path.join(target, 'model.safetensors')}")
    if os.path.lexists(target) and not overwrite:
        raise _exists(target)
    folder = os.path.dirname(target) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"save: the folder {folder} of {target} does not exist; make it first")
    if any(t.device.type == "jax" for t in model.parameters()):
        raise ValueError("save: the model is on a JAX device; call model.to('cpu') within the torchax environment first")
    with torch.no_grad():
        tensors, aliases = _to_store(_state_in_tiles(_unwrapped(model)))
    metadata = {
        "format": "tersor",
        "layout": str(LAYOUT_VERSION),
        "version": __version__,
        "aliases": json.dumps(aliases, sort_keys=True),
    }
    write_tensors(tensors, metadata, target, folder, overwrite)


def load_(
    model: nn.Module,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    mmap: bool = True,
) -> nn.Module:
    """Loads a checkpoint into `model`, in place, building its QuantLinear layers from the tags; returns the model.

    path_or_state_dict  a safetensors file, a .pth file (read with weights_only=True) or a state_dict
    strict  False: keys of float modules that are missing or not expected are logged and left alone; a size, a dtype, a tag or
            a packed tensor that does not fit is an error all the same
    mmap    True: what the model takes over from a file stays mapped: private and copy-on-write, so pages are read when first
            used and writes never reach the file, which may be replaced or deleted but not shortened while the model lives.
            False: it is copied. Of a state_dict: True shares its tensors with meta targets, as load_state_dict(assign=True).

    Tensors that exist are copied into, so that ties, compiled graphs and optimizers survive; meta tensors are assigned, with
    the file's dtype. An nn.Linear that the checkpoint holds packed is replaced, on its own device, its bias object kept.

    Raises ValueError that lists everything which does not fit, before anything is changed; FileNotFoundError; TypeError.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_: model is {type(model).__name__}, expected an nn.Module")
    inner = _unwrapped(model)
    if any(p.device.type == "jax" for p in inner.parameters()):
        raise ValueError(
            'load_: the model is on a JAX device; load it on the CPU, outside torchax\'s environment, then call .to("jax")'
        )
    # No inference tensor may enter the model, and no default device may apply to what is read.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        LoadPlan(inner, _open(path_or_state_dict, mmap), strict).apply()
    settle(inner)
    left = [name for named in (inner.named_parameters(), inner.named_buffers()) for name, t in named if t.is_meta]
    if left:
        warnings.warn(
            f"tersor: still on meta after load_: {listed(left)}; the checkpoint does not hold them (it never does hold buffers "
            "that are not persistent): set them before the model runs",
            stacklevel=2,
        )
    return model


def _state_in_tiles(model: nn.Module) -> Mapping[str, Any]:
    """The state_dict, with what files hold where a layer has another form on its device."""
    state = model.state_dict()
    for path, module in model.named_modules():
        tiles = other_than_stored(module) if isinstance(module, QuantLinear) else None
        if tiles is not None:
            state.update({f"{path}.{name}" if path else name: t for name, t in tiles.items()})
    return state


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself where it is wrapped by torch.compile, whose prefix would enter every name."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _path(function: str, path: Any) -> str:
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(name, str):
        raise TypeError(f"{function}: path is {type(path).__name__}, expected str or os.PathLike")
    if not name or "\0" in name:
        raise ValueError(f"{function}: path is {name!r}, expected the name of a file")
    return name


# ---- writing


def _to_store(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors to write, {other name: stored name}); raises ValueError that lists what cannot be written."""
    writable: dict[torch.dtype, bool] = {}
    problems = [f"{key} ({reason})" for key, value in state.items() if (reason := _not_writable(key, value, writable))]
    if problems:
        raise ValueError("save: a safetensors file cannot hold these:\n  " + listed(problems, "\n  "))
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[Any, str] = {}
    for key, value in state.items():
        first = stored.setdefault(identity(value), key)
        if first == key:
            # A conjugate or negative view is a bit on top of its source's bytes; the file has the bytes alone.
            tensors[key] = value.resolve_conj().resolve_neg().contiguous()
        else:
            aliases[key] = first
    # Views that overlap without being the same elements are stored each on its own.
    device, end = None, 0
    for key in sorted(tensors, key=lambda key: (str(tensors[key].device), tensors[key].data_ptr())):
        t = tensors[key]
        if t.device == device and t.data_ptr() < end and t.numel():
            tensors[key] = t.clone()
        else:
            device, end = t.device, t.data_ptr() + t.numel() * t.element_size()
    return tensors, aliases


def _not_writable(key: str, value: Any, writable: dict[torch.dtype, bool]) -> str | None:
    from safetensors.torch import save as serialize

    if key == "__metadata__":  # safetensors would write it, and no reader would take the file
        return "the file keeps its metadata under this name; rename the tensor"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}; let get_extra_state return a tensor"
    if value.is_meta:
        return "a meta tensor has no data; load or initialise the model first"
    if value.is_nested:
        return "a nested tensor; pad it first"
    if value.layout is not torch.strided:
        return f"{value.layout}; make it dense first"
    if is_sharded(value):
        return "sharded; gather the state_dict first"
    if value.dtype not in writable:
        try:
            serialize({"x": torch.empty(0, dtype=value.dtype, device="cpu")})
            writable[value.dtype] = True
        except Exception:  # KeyError, ValueError or SafetensorError, by the version of safetensors
            writable[value.dtype] = False
    return None if writable[value.dtype] else f"{value.dtype}; convert it first"


def _exists(target: str) -> FileExistsError:
    return FileExistsError(f"save: {target} exists; pass overwrite=True to replace it, or choose another name")


def write_tensors(tensors: dict[str, Tensor], metadata: dict[str, str], target: str, folder: str, overwrite: bool) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = os.path.join(folder, f".tersor-{secrets.token_hex(8)}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
    except OSError as error:
        raise type(error)(error.errno, f"save: cannot write in {folder} ({error.strerror}); choose another folder") from None
    try:
        try:
            save_file(tensors, part, metadata=metadata)
        except SafetensorError as error:  # what it is given was checked: it is the disk
            raise OSError(f"save: writing {target} failed ({error}); the disk may be full") from None
        os.chmod(part, mode)  # safetensors 0.8 puts a file of mode 600 in its place
        _sync(part)
        _name(part, target, overwrite)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    if os.name == "posix":
        _sync(folder)  # the new name itself


def _name(part: str, target: str, overwrite: bool) -> None:
    """Gives the finished file its name. Without `overwrite` a file that appeared there during the writing stays."""
    if not overwrite:
        try:
            os.link(part, target)  # unlike a rename it refuses a name that is taken
        except FileExistsError:
            raise _exists(target) from None
        except OSError:  # a file system without hard links
            if os.path.lexists(target):
                raise _exists(target) from None
        else:
            os.unlink(part)
            return
    os.replace(part, target)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- opening


def _open(given: Any, mmap: bool) -> Source:
    if isinstance(given, Mapping):
        # As with load_state_dict, a model that has memory of its own does not end up sharing the caller's.
        return _from_mapping("the state_dict", given, copy_to_meta=not mmap, copy_to_new=True)
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"load_: got {type(given).__name__}, expected the path of a file or a state_dict")
    path = _path("load_", given)
    if os.path.isdir(path):
        sharded = any(name.endswith(".index.json") for name in os.listdir(path))
        hint = "sharded checkpoints are not read, merge it into one file" if sharded else "name the file in it"
        raise ValueError(f"load_: {path} is a directory; {hint}")
    if not os.path.exists(path):
        raise FileNotFoundError(f"load_: {path} does not exist")
    if not os.path.isfile(path):
        raise ValueError(f"load_: {path} is not a regular file")
    if path.endswith(".index.json"):
        raise ValueError(f"load_: {path} is the index of a sharded checkpoint, which is not read; merge it into one file")
    with open(path, "rb") as file:
        head = file.read(len(_LEGACY))
    if head[8:9] == b"{":  # 8 bytes of length, then JSON; no .pth has this byte here
        return _from_safetensors(path, mmap)
    if head.startswith(_ZIP) or head == _LEGACY:
        return _from_pth(path, mmap and head.startswith(_ZIP))
    raise ValueError(f"load_: {path} is neither a safetensors nor a .pth file, or its beginning is damaged; save it again")


def _from_safetensors(path: str, mmap: bool) -> Source:
    from safetensors import safe_open

    try:
        # safe_open checks the header against the length of the file; get_tensor is a view of a private mapping and reads nothing.
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            stored: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, OSError, and what torch makes of a dtype it lacks
        raise ValueError(f"load_: {path} is not a readable safetensors file ({error}); it may be truncated or damaged") from None
    tensors = stored | {name: stored[first] for name, first in _aliases(path, metadata, stored).items()}
    return Source(path, tensors, copy_to_meta=not mmap, copy_to_new=not mmap)


def _aliases(path: str, metadata: Mapping[str, str], stored: Mapping[str, Any]) -> dict[str, str]:
    """{other name: stored name} of a file of save(), or of safetensors.torch.save_model, whose metadata are just that."""
    if metadata.get("format") != "tersor":
        return {name: first for name, first in metadata.items() if name != "format" and first in stored and name not in stored}
    layout = metadata.get("layout", "")
    if not (layout.isascii() and layout.isdigit() and len(layout) < 10 and 1 <= int(layout) <= LAYOUT_VERSION):
        raise ValueError(
            f"load_: {path} has layout version {layout[:40]!r}, this package reads 1 to {LAYOUT_VERSION}; a newer tersor wrote it"
        )
    try:
        aliases = json.loads(metadata.get("aliases", "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_: {path}: the aliases in its metadata are not JSON ({error}); the file is damaged") from None
    if not isinstance(aliases, dict):
        raise ValueError(f"load_: {path}: the aliases in its metadata are a {type(aliases).__name__}, expected an object")
    for name, first in aliases.items():
        if not isinstance(first, str) or first not in stored or name in stored:
            raise ValueError(f"load_: {path}: the metadata say that {name!r} is {first!r}, the file does not; it is damaged")
    return aliases


def _from_pth(path: str, mmap: bool) -> Source:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # anything at all, on a damaged archive or pickle
        raise ValueError(f"load_: {path} is not a .pth file that torch.load(weights_only=True) can read ({error})") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"load_: {path} holds a {type(state).__name__}, expected a state_dict; save model.state_dict()")
    return _from_mapping(path, state, copy_to_meta=False, copy_to_new=False)  # nobody else has these tensors


def _from_mapping(where: str, state: Mapping[str, Any], copy_to_meta: bool, copy_to_new: bool) -> Source:
    for key, value in state.items():
        if not isinstance(key, str):
            raise ValueError(f"load_: {where} has the key {key!r}, expected names; pass a state_dict")
        if not isinstance(value, Tensor) and split(key)[1] != TAG:
            raise ValueError(
                f"load_: {where} holds a {type(value).__name__} at {key!r}, expected a Tensor; "
                "if there is more than the model in it, pass the model's state_dict alone"
            )
    return Source(where, dict(state), copy_to_meta, copy_to_new, getattr(state, "_metadata", None))
