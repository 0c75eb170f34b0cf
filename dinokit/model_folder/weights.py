"""Weights as numpy arrays: read and write safetensors, read facebookresearch's .pth files, check shapes.

The names used inside dinokit are timm's; :mod:`dinokit.model_folder.weight_names` translates others into them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import MissingExtraError, ModelError, UsageError
from dinokit.files.git_lfs import must_not_be_a_pointer
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.reference_networks import network_of, to_timm_names
from dinokit.model_folder.weight_names import (
    dinov2_to_timm,
    reference_to_timm,
    some_of,
    timm_to_transformers,
    transformers_to_timm,
)
from dinokit.wording import counted

__all__ = [
    "check_weights",
    "dinov2_to_timm",
    "expected_shapes",
    "read_pth",
    "read_safetensors",
    "safetensors_shapes",
    "timm_to_transformers",
    "transformers_to_timm",
    "without_prefixes",
    "write_safetensors",
]

Weights = dict[str, NDArray[np.float32]]

_FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
_CONTAINERS = ("state_dict", "model")  # of Lightning, of timm and of others
_HEADS = ("head.", "dino_head.", "ibot_head.")
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


# -- safetensors


def read_safetensors(path: str | Path) -> Weights:
    """All tensors of a safetensors file as float32 arrays.

    Args:
        path: a ``.safetensors`` file; fp16, bf16 and fp64 tensors are converted to float32.

    Raises:
        ModelError: the file is missing, damaged, or holds tensors that are not floating point.
    """
    path = Path(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            names = [name for name in file.keys() if not _is_count(name)]  # noqa: SIM118
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
            odd = {name: dtype for name, dtype in dtypes.items() if dtype not in (*_FLOATS, "BF16")}
            if odd:
                named = some_of(f"{name} ({dtype})" for name, dtype in odd.items())
                raise ModelError(f"{path} has tensors that are not floating point: {named}")
            if "BF16" in dtypes.values():
                return _read_raw(path)
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in dtypes}
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist; expected a safetensors file") from error
    except (SafetensorError, OSError) as error:
        must_not_be_a_pointer(path)
        raise ModelError(
            f"{path} is not a complete safetensors file ({error}); fetch or write it again"
        ) from error


def _read_raw(path: Path) -> Weights:
    # numpy has no bfloat16: its bits are the upper half of a float32's.
    from safetensors import deserialize

    weights: Weights = {}
    for name, tensor in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
        if _is_count(name):
            continue
        if tensor["dtype"] == "BF16":
            flat = (np.frombuffer(tensor["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            flat = np.frombuffer(tensor["data"], _FLOATS[tensor["dtype"]]).astype(np.float32)
        weights[name] = flat.reshape(tensor["shape"])
    return weights


def _is_count(name: str) -> bool:
    """Whether it is BatchNorm's count of batches: an integer that no result depends on."""
    return name.endswith(".num_batches_tracked")


def safetensors_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file; only its header is read.

    Raises:
        ModelError: the file is missing or damaged (the header is checked against the file's length).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in header.items()}
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist; expected a safetensors file") from error
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError),
        *(OverflowError, RecursionError),  # 1e999 for a size, a thousand brackets
    ) as error:
        must_not_be_a_pointer(path)
        raise ModelError(f"{path} is not a safetensors file ({error}); fetch or write it again") from error
    if path.stat().st_size != end:
        raise ModelError(
            f"{path} has {path.stat().st_size} bytes, its header announces {end}: the file is truncated or "
            "damaged; fetch or write it again"
        )
    return shapes


def write_safetensors(
    path: str | Path, weights: Mapping[str, NDArray[Any]], *, dtype: str = "float32"
) -> None:
    """Writes float tensors, all as ``float32`` or ``float16``; the same input gives the same bytes."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if dtype not in ("float32", "float16"):
        raise UsageError(f"dtype={dtype!r} cannot be stored; expected 'float32' or 'float16'")
    with np.errstate(over="ignore"):  # a value that does not fit becomes infinite and is named below
        arrays = {name: np.ascontiguousarray(array, dtype=dtype) for name, array in weights.items()}
    too_large = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if too_large:
        raise ModelError(
            f"the weights {some_of(too_large)} are not finite as {dtype}; "
            + ("store them as float32" if dtype == "float16" else "the training has diverged")
        )
    # transformers refuses a file without this entry, which names the layout of the tensors, not the writer.
    # save_file restricts a new file to its owner; this keeps the mode that new files have by default.
    Path(path).touch()
    mode = Path(path).stat().st_mode
    try:
        save_file(arrays, str(path), metadata={"format": "pt"})
    except SafetensorError as error:  # "… I/O error: No space left on device (os error 28)"
        number = re.search(r"(?:os error|code:) (\d+)", str(error))  # "code:" before safetensors 0.6
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    Path(path).chmod(mode)


# -- what a network needs


def expected_shapes(vit: VitArchitecture) -> dict[str, tuple[int, ...]] | None:
    """timm's names and shapes of a DINO ViT's tensors; None if it has parts that dinokit does not know."""
    if vit.ffn not in ("mlp", "swiglu") or vit.position not in ("learned", "rope"):
        return None
    dim = vit.embed_dim
    rows, columns = vit.grid
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "patch_embed.proj.weight": (dim, vit.in_chans, vit.patch_size, vit.patch_size),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    if vit.position == "learned":
        # With registers, the position of CLS is in the CLS token itself (timm's no_embed_class).
        shapes["pos_embed"] = (1, rows * columns + (0 if vit.num_register_tokens else 1), dim)
    if vit.num_register_tokens:
        shapes["reg_token"] = (1, vit.num_register_tokens, dim)
    block = _block_shapes(vit)
    return shapes | {
        f"blocks.{index}.{name}": shape for index in range(vit.depth) for name, shape in block.items()
    }


def _block_shapes(vit: VitArchitecture) -> dict[str, tuple[int, ...]]:
    dim, hidden = vit.embed_dim, round(vit.embed_dim * vit.mlp_ratio)
    rope = vit.position == "rope"
    shapes: dict[str, tuple[int, ...]] = {
        "norm1.weight": (dim,),
        "norm1.bias": (dim,),
        "attn.qkv.weight": (3 * dim, dim),
        "attn.proj.weight": (dim, dim),
        "attn.proj.bias": (dim,),
        "norm2.weight": (dim,),
        "norm2.bias": (dim,),
    }
    if vit.qkv_bias:
        shapes |= {"attn.q_bias": (dim,), "attn.v_bias": (dim,)} if rope else {"attn.qkv.bias": (3 * dim,)}
    if vit.layer_scale:
        names = ("gamma_1", "gamma_2") if rope else ("ls1.gamma", "ls2.gamma")
        shapes |= dict.fromkeys(names, (dim,))
    gated = vit.ffn == "swiglu"
    for name in ("fc1_g", "fc1_x") if gated and rope else ("fc1",):
        shapes |= {f"mlp.{name}.weight": (hidden, dim), f"mlp.{name}.bias": (hidden,)}
    inner = hidden // 2 if gated and not rope else hidden  # DINOv2's first layer has gate and up in one
    return shapes | {"mlp.fc2.weight": (dim, inner), "mlp.fc2.bias": (dim,)}


def check_weights(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> list[str]:
    """One line for each kind of difference between two tables of shapes; empty if they agree."""
    problems = []
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    wrong = sorted(name for name in set(found) & set(expected) if found[name] != expected[name])
    if missing:
        problems.append(f"{where} lacks {counted(len(missing), 'tensor')}: {some_of(missing)}")
    if unexpected:
        problems.append(f"{where} has {counted(len(unexpected), 'unexpected tensor')}: {some_of(unexpected)}")
    if wrong:
        listed = [f"{name} is {found[name]}, expected {expected[name]}" for name in wrong]
        problems.append(f"{where} has {counted(len(wrong), 'tensor')} of another shape: {some_of(listed)}")
    return problems


# -- facebookresearch's .pth files


def read_pth(path: str | Path, *, part: str = "auto") -> Weights:
    """The backbone of a file of facebookresearch/dino, dinov2 or dinov3, under timm's names.

    There are two kinds: "backbone only", a state dict, which other programs put under ``state_dict`` or ``model``; and
    "full ckpt" with ``student``, ``teacher``, ``optimizer``, ``epoch``, ``args`` and ``dino_loss``, where the backbone
    has the prefix ``backbone.`` (and ``module.`` after distributed training). Its projection ``head.`` (dinov2 and
    dinov3: ``dino_head.`` and ``ibot_head.``) is not read.

    Args:
        path: a ``.pth`` or ``.pt`` file. It is opened with ``weights_only=True``: its code is not run.
        part: ``teacher`` or ``student`` of a full checkpoint, ``backbone`` of the other kind; ``auto``: the
            teacher if there is one, otherwise the backbone.

    Returns:
        float32 arrays.

    Raises:
        ModelError: the file cannot be opened safely, has no such part, or its keys are not exactly those of
            one DINO ViT (or those of a ResNet or XCiT, :mod:`dinokit.model_folder.reference_networks`); missing and
            unexpected keys are named.
        MissingExtraError: torch is not installed.
    """
    if part not in ("auto", "backbone", "teacher", "student"):
        raise UsageError(f"part={part!r} is not known; expected auto, backbone, teacher or student")
    path = Path(path)
    content = load_pth_safely(path)
    state = _choose_part(content, part, path)
    try:
        weights, ignored = _strip_prefixes(state)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    network = to_timm_names(weights)
    if network is not None and network_of({name: array.shape for name, array in network.items()}):
        return network  # the torch engine compares it with timm's
    try:
        weights = reference_to_timm(weights)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    shapes = {name: tuple(array.shape) for name, array in weights.items()}
    try:
        expected = expected_shapes(VitArchitecture.from_shapes(shapes, num_heads=1))
    except ModelError as error:
        raise ModelError(
            f"{path}: {error}. It holds {counted(len(state), 'entry', 'entries')}: {some_of(sorted(state))}"
        ) from error
    assert expected is not None  # from_shapes describes only this family
    problems = check_weights(shapes, expected, str(path))
    if problems:
        aside = f" (keys of the projection head that were set aside: {len(ignored)})" if ignored else ""
        raise ModelError("; ".join(problems) + aside)
    return weights


def load_pth_safely(path: Path) -> Any:
    """The content of a ``.pth`` file, loaded with ``weights_only=True``; raises ModelError if that fails."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(f"reading {path.name}", extra="train", package="torch") from error
    import argparse

    if not path.is_file():
        raise ModelError(f"{path} does not exist; expected a .pth file of facebookresearch/dino")
    # A full checkpoint contains its command line as a Namespace, and learning rates as numpy scalars, whose
    # constructor has another name in numpy 1 than in numpy 2. None of these runs code.
    scalar = np.float64(0).__reduce__()[0]
    harmless: list[Any] = [
        argparse.Namespace,
        np.dtype,
        type(np.dtype(np.float64)),
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]
    with torch.serialization.safe_globals(harmless):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle may raise anything
            must_not_be_a_pointer(path)
            raise ModelError(
                f"{path} cannot be opened as weights only ({_reason_of(error)}): it is damaged, not a .pth file, or "
                "would run code when opened, which dinokit never allows. Fetch it again, or save its state dict alone"
            ) from error


def _reason_of(error: Exception) -> str:
    """One sentence of torch's message, which is formatted for terminals, and begins by advising to allow any code."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    _, _, refused = said.partition("WeightsUnpickler error:")
    lines = (refused or said).strip().splitlines()
    return lines[0].partition(". ")[0] if lines else type(error).__name__


def _choose_part(content: Any, part: str, path: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} contains a {type(content).__name__}; expected a dictionary of tensors")
    networks = [name for name in ("teacher", "student") if isinstance(content.get(name), Mapping)]
    inside = [name for name in _CONTAINERS if isinstance(content.get(name), Mapping)]
    if not networks and len(inside) == 1:
        content = content[inside[0]]
    if part == "auto":
        part = networks[0] if networks else "backbone"
    if part == "backbone":
        if networks:
            raise ModelError(f"{path} is a full checkpoint with {networks}; choose one of them with part")
        return dict(content)
    if part not in networks:
        has = networks or "a backbone only"
        raise ModelError(f"{path} has no {part}; it has {has}")
    return dict(content[part])


def _strip_prefixes(state: Mapping[str, Any]) -> tuple[Weights, list[str]]:
    """The backbone's tensors without prefixes, and the names of the heads' tensors, which are left out."""
    arrays = {name: tensor.detach().float().contiguous().numpy() for name, tensor in _float_tensors(state)}
    return without_prefixes(arrays)


def without_prefixes(weights: Mapping[str, NDArray[np.float32]]) -> tuple[Weights, list[str]]:
    """A backbone's tensors without ``module.`` and ``backbone.``, and the names of the heads' tensors, left out.

    Raises:
        ModelError: two tensors would have one name.
    """
    bare: Weights = {}
    heads = []
    for full_name, array in weights.items():
        name = full_name.removeprefix("module.")
        if name.startswith(_HEADS):
            heads.append(full_name)
            continue
        name = name.removeprefix("backbone.")
        if name in bare:
            raise ModelError(f"two entries are both named {name} once their prefixes are removed")
        bare[name] = array
    return bare, heads


def _float_tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All entries but BatchNorm's counts; ModelError where one is not a plain tensor of floating-point numbers."""
    import torch

    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            raise ModelError(f"the entry {name!r} is a {type(value).__name__}; expected only tensors")
        if _is_count(name):
            continue
        dense = value.layout is torch.strided and not value.is_nested and value.device.type == "cpu"
        if not (dense and value.is_floating_point()):
            raise ModelError(
                f"the entry {name!r} is a tensor of {value.dtype}, {value.layout}, on {value.device}; expected "
                "floating-point numbers in a dense tensor on the CPU"
            )
        yield name, value
