"""A DINO Vision Transformer as an ONNX graph, written straight from its weights: no torch, no tracing.

    model = build_vit_graph(vit, weights)        # onnx.ModelProto, opset 20, standard operators only

How to read this file: :class:`GraphWriter` collects operators and weights; below it stands one function for
each part of the network (:func:`patch_embedding`, :func:`position_embedding`, :func:`block` …),
and :func:`build_vit_graph` composes them. A tensor is passed around as its name, and the
comment at a line gives its shape: B batch, T tokens (CLS first), N patches, D width, h heads, d = D / h.

The graph's interface

- input ``pixel_values`` (B, C, H, W) float32, normalised; B, H and W free, H and W multiples of the patch;
- ``last_hidden_state`` (B, T, D) all tokens after the final norm;
- ``pooler_output`` (B, D) the CLS token after the final norm: the embedding of the picture;
- ``attention`` (B, h, N) what the CLS token of the last block attends to: softmax over all tokens, of which
  the columns of the patches are kept (facebookresearch/dino, ``visualize_attention.py``).

The mathematics is that of facebookresearch/dino's ``vision_transformer.py``; only the order of work differs:

- q, k and v have a matrix each, stored as (in, out), so that no weight is transposed at inference, and the
  attention's scale 1/sqrt(d) is multiplied into q's weights (exact for d = 64, a power of four, and a
  rounding in the last bit otherwise);
- the patch embedding is a matrix product over flattened patches. A picture whose sides are no multiples of
  the patch is then an error of the runtime, where a convolution would silently crop it.

All outputs are slices of what the network computes anyway: asking for all of them costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit._version import __version__
from dinokit.architecture import PosEmbedResize, VitArchitecture
from dinokit.errors import ModelError
from dinokit.weights import check_weights, expected_shapes

if TYPE_CHECKING:
    import onnx

__all__ = ["INPUT", "OPSET", "build_vit_graph", "can_write"]

OPSET = 20  # the first with Gelu; antialiased Resize came with 18, LayerNormalization with 17
_IR_VERSION = 9  # the one of opset 20: older runtimes refuse newer ones
_PROTOBUF_LIMIT = 2**31 - 1  # bytes of one serialised file

INPUT = "pixel_values"
_PARTS = ("weight", "bias")


# -------------------- what can be written


def can_write(vit: VitArchitecture) -> bool:
    """Whether :func:`build_vit_graph` knows this architecture."""
    return not _unsupported(vit)


def _unsupported(vit: VitArchitecture) -> list[str]:
    """What of the architecture has no part here yet, in words."""
    checks = {
        f"{vit.num_register_tokens} register tokens": vit.num_register_tokens > 0,
        "layer scale": vit.layer_scale,
        f"the feed-forward network {vit.ffn!r}": vit.ffn != "mlp",
        f"the position embedding {vit.position!r}": vit.position != "learned",
        "attention without biases": not vit.qkv_bias,
    }
    return [name for name, present in checks.items() if present]


def _check_weights(vit: VitArchitecture, weights: Mapping[str, NDArray[Any]]) -> None:
    """ModelError unless the weights are those of the architecture, no more and no less."""
    expected = expected_shapes(vit)
    assert expected is not None  # all that can be written has a table
    found = {name: tuple(values.shape) for name, values in weights.items()}
    if problems := check_weights(found, expected, "the checkpoint"):
        raise ModelError(
            f"the weights do not fit the architecture: {'; '.join(problems)}. "
            "Check that config.json and the weights belong together"
        )


# -------------------- the writer


class GraphWriter:
    """Collects the operators and weights of one graph. Every method returns the name of its result.

    Args:
        checkpoint: the weights that :meth:`layer_norm` and :meth:`linear` look up by their names.
    """

    def __init__(self, checkpoint: Mapping[str, NDArray[Any]]) -> None:
        from onnx import ModelProto, helper

        self._helper = helper
        self.checkpoint = checkpoint
        # Everything is added to the model in place: protobuf copies what is handed to it, and the weights of
        # a large network should be there once.
        self._model = ModelProto()
        self._initializers: set[str] = set()
        self._scope: list[str] = []
        self._counts: dict[str, int] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of the operators added within: what viewers such as Netron show."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Adds one standard operator with one output. An input "" is an optional one left out."""
        name = "/".join([*self._scope, kind])
        count = self._counts[name] = self._counts.get(name, -1) + 1
        name = f"{name}_{count}" if count else name
        result = output or name
        self._model.graph.node.append(self._helper.make_node(kind, inputs, [result], name=name, **attributes))
        return result

    def weight(self, name: str, values: NDArray[Any]) -> str:
        """Adds a float32 weight."""
        return self._add(name, values, np.float32)

    def ints(self, *values: int) -> str:
        """A 1-D int64 constant (shapes, axes); equal ones are shared."""
        return self._add("ints:" + ",".join(map(str, values)), np.array(values), np.int64)

    def scalar(self, value: int) -> str:
        """A 0-D int64 constant: an index that takes its axis away."""
        return self._add(f"scalar:{value}", np.array(value), np.int64)

    def floats(self, *values: float) -> str:
        """A 1-D float32 constant; equal ones are shared."""
        return self._add("floats:" + ",".join(map(repr, values)), np.array(values), np.float32)

    def layer_norm(self, name: str, x: str, *, epsilon: float, output: str | None = None) -> str:
        """The checkpoint's layer normalisation ``name``, over the last axis."""
        scale, bias = (self.weight(f"{name}.{part}", self.checkpoint[f"{name}.{part}"]) for part in _PARTS)
        return self.op("LayerNormalization", x, scale, bias, output=output, axis=-1, epsilon=epsilon)

    def linear(self, name: str, x: str) -> str:
        """The checkpoint's linear layer ``name``, whose matrix is stored there as (out, in)."""
        kernel, bias = (self.checkpoint[f"{name}.{part}"] for part in _PARTS)
        return self.affine(name, kernel.T, bias, x)

    def affine(self, name: str, kernel: NDArray[Any], bias: NDArray[Any], x: str) -> str:
        """``x @ kernel + bias`` with kernel (in, out), stored under ``name``."""
        product = self.op("MatMul", x, self.weight(f"{name}.weight", kernel))
        return self.op("Add", product, self.weight(f"{name}.bias", bias))

    def _add(self, name: str, values: NDArray[Any], dtype: type[np.float32] | type[np.int64]) -> str:
        from onnx import TensorProto

        if name not in self._initializers:
            self._initializers.add(name)
            self._model.graph.initializer.add(
                name=name,
                dims=values.shape,
                data_type=TensorProto.FLOAT if dtype is np.float32 else TensorProto.INT64,
                # The bytes as they are, little-endian in C order; onnx.helper would go through a Python list.
                raw_data=values.astype(np.dtype(dtype).newbyteorder("<"), copy=False).tobytes(),
            )
        return name

    def finish(
        self,
        inputs: Mapping[str, Sequence[str | int]],
        outputs: Mapping[str, Sequence[str | int]],
        metadata: Mapping[str, str],
    ) -> onnx.ModelProto:
        """The finished model, given its float32 inputs and outputs with their dimensions."""
        from onnx import TensorProto

        model = self._model
        size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
        if size >= _PROTOBUF_LIMIT:
            raise ModelError(
                f"the weights take {size / 2**30:.1f} GiB as float32; one ONNX file holds less than 2 GiB. "
                "Use this model with the torch engine"
            )
        model.ir_version = _IR_VERSION
        model.producer_name, model.producer_version = "dinokit", __version__
        model.opset_import.append(self._helper.make_opsetid("", OPSET))
        model.graph.name = "vision_transformer"
        for listed, tensors in ((model.graph.input, inputs), (model.graph.output, outputs)):
            for name, dims in tensors.items():
                listed.append(self._helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
        for key, value in metadata.items():
            model.metadata_props.add(key=key, value=value)
        return model


# -------------------- the whole network


def build_vit_graph(
    vit: VitArchitecture, weights: Mapping[str, NDArray[Any]], *, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """The ONNX model of a Vision Transformer; its inputs and outputs stand in the module's docstring.

    Args:
        vit: the sizes, and how the position embedding is resized at other picture sizes.
        weights: timm's names (= those of facebookresearch/dino's backbone), any float dtype; the graph
            holds them as float32.
        metadata: texts for the file's ``metadata_props``, such as the model folder's contract.

    Raises:
        ModelError: the architecture has parts that are not written here (see :func:`can_write`), or the
            weights do not belong to it, or they are too large for one ONNX file.
    """
    if missing := _unsupported(vit):
        raise ModelError(
            f"the ONNX graph of this Vision Transformer cannot be written yet: it has {', '.join(missing)}, "
            "and only the plain Vision Transformer of DINO v1 is known. "
            "Use the torch engine (engine='torch', extra [train])"
        )
    _check_weights(vit, weights)

    g = GraphWriter({name: np.asarray(values, np.float32) for name, values in weights.items()})
    with g.scope("embeddings"):
        grid = patch_grid(g, vit)  # (2,)
        patches = patch_embedding(g, vit, grid)  # (B, N, D)
        positions = position_embedding(g, vit, grid)  # (1, N, D)
        x = prepend_cls(g, g.op("Add", patches, positions))  # (B, T, D)
    for index in range(vit.depth):
        with g.scope(f"blocks.{index}"):
            x, attention = block(g, vit, f"blocks.{index}", x)  # (B, T, D), (B, h, T, T)
    with g.scope("outputs"):
        tokens = g.layer_norm("norm", x, epsilon=vit.layer_norm_eps, output="last_hidden_state")
        g.op("Gather", tokens, g.scalar(0), axis=1, output="pooler_output")
        cls_row = g.op("Gather", attention, g.scalar(0), axis=2)  # (B, h, T)
        first, end = g.ints(vit.num_prefix_tokens), g.ints(np.iinfo(np.int64).max)
        g.op("Slice", cls_row, first, end, g.ints(2), output="attention")

    return g.finish(
        inputs={INPUT: ("batch", vit.in_chans, "height", "width")},
        outputs={
            "last_hidden_state": ("batch", "tokens", vit.embed_dim),
            "pooler_output": ("batch", vit.embed_dim),
            "attention": ("batch", vit.num_heads, "patches"),
        },
        metadata=metadata or {},
    )


# -------------------- from pixels to tokens


def patch_grid(g: GraphWriter, vit: VitArchitecture) -> str:
    """(2,) int64: rows and columns of patches in the pictures at hand."""
    return g.op("Div", g.op("Shape", INPUT, start=2, end=4), g.ints(vit.patch_size))


def patch_embedding(g: GraphWriter, vit: VitArchitecture, grid: str) -> str:
    """(B, N, D): every patch, flattened, through one linear layer."""
    p, channels = vit.patch_size, vit.in_chans
    rows = g.op("Slice", grid, g.ints(0), g.ints(1))
    columns = g.op("Slice", grid, g.ints(1), g.ints(2))
    split = g.op("Concat", g.ints(0, channels), rows, g.ints(p), columns, g.ints(p), axis=0)  # 0 keeps B
    x = g.op("Reshape", INPUT, split)  # (B, C, rows, p, columns, p)
    x = g.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])  # (B, rows, columns, C, p, p)
    x = g.op("Reshape", x, g.ints(0, -1, channels * p * p))  # (B, N, C p p)
    kernel = g.checkpoint["patch_embed.proj.weight"].reshape(vit.embed_dim, -1)  # (D, C p p)
    return g.affine("patch_embed.proj", kernel.T, g.checkpoint["patch_embed.proj.bias"], x)


def position_embedding(g: GraphWriter, vit: VitArchitecture, grid: str) -> str:
    """(1, N, D): the patches' position embedding, resized to the pictures' grid.

    At the trained grid it comes back untouched, at any other it is resized as ``vit.pos_embed_resize`` says.
    facebookresearch/dino leaves it untouched when the number of patches is the trained one *and* the picture
    is square, which for its square trained grids is the same condition.
    """
    rows, columns = vit.grid
    planes = g.checkpoint["pos_embed"][:, 1:].reshape(1, rows, columns, vit.embed_dim).transpose(0, 3, 1, 2)
    trained = g.weight("pos_embed.patches", planes)  # (1, D, rows, columns): Resize works on planes
    resized = resize(g, trained, vit.grid, grid, vit.pos_embed_resize)
    flat = g.op("Reshape", resized, g.ints(0, 0, -1))  # (1, D, N)
    return g.op("Transpose", flat, perm=[0, 2, 1])


def resize(g: GraphWriter, planes: str, trained: tuple[int, int], grid: str, rule: PosEmbedResize) -> str:
    """``planes`` (1, D, *trained) on another grid, as ``torch.nn.functional.interpolate`` makes it."""
    from onnx import TensorProto

    kernel: dict[str, Any] = {
        "mode": "cubic",
        "coordinate_transformation_mode": "half_pixel",
        # torch has two bicubic kernels: OpenCV's, which repeats the border, and with antialias Pillow's,
        # which leaves out what lies outside.
        "cubic_coeff_a": -0.5 if rule.antialias else -0.75,
        "antialias": int(rule.antialias),
        "exclude_outside": int(rule.antialias),
    }
    if not rule.offset:  # at the trained grid this is the identity by itself
        sizes = g.op("Concat", g.op("Shape", planes, start=0, end=2), grid, axis=0)
        return g.op("Resize", planes, "", "", sizes, **kernel)
    # The sampling step comes from (grid + offset) / trained, not from the sizes, so that by itself it would
    # move the positions a little even at the trained grid. There the offset is dropped: the scale is exactly
    # 1 and the resize the identity. That needs no If, which CUDA graphs and several runtimes do not take.
    equal = g.op("Cast", g.op("Equal", grid, g.ints(*trained)), to=TensorProto.FLOAT)  # (2,) of 0 and 1
    differs = g.op("Sub", g.floats(1.0), g.op("ReduceMin", equal))  # (1,): 0 if rows and columns are equal
    offset = g.op("Mul", differs, g.floats(rule.offset))
    scale = g.op("Add", g.op("Cast", grid, to=TensorProto.FLOAT), offset)
    scale = g.op("Div", scale, g.floats(*map(float, trained)))
    return g.op("Resize", planes, "", g.op("Concat", g.floats(1.0, 1.0), scale, axis=0), **kernel)


def prepend_cls(g: GraphWriter, patches: str) -> str:
    """(B, T, D): the CLS token, its own position embedding added, before the patches."""
    token = g.checkpoint["cls_token"] + g.checkpoint["pos_embed"][:, :1]  # (1, 1, D)
    shape = g.op("Concat", g.op("Shape", INPUT, start=0, end=1), g.ints(1, 1), axis=0)
    return g.op("Concat", g.op("Expand", g.weight("cls_token", token), shape), patches, axis=1)


# -------------------- blocks


def block(g: GraphWriter, vit: VitArchitecture, name: str, x: str) -> tuple[str, str]:
    """One pre-norm Transformer block.

    Returns:
        The tokens (B, T, D), and the attention (B, h, T, T) whose rows sum to 1.
    """
    mixed, attention = self_attention(
        g, vit, name, g.layer_norm(f"{name}.norm1", x, epsilon=vit.layer_norm_eps)
    )
    x = g.op("Add", x, mixed)
    x = g.op("Add", x, mlp(g, name, g.layer_norm(f"{name}.norm2", x, epsilon=vit.layer_norm_eps)))
    return x, attention


def self_attention(g: GraphWriter, vit: VitArchitecture, name: str, x: str) -> tuple[str, str]:
    """softmax(q kT / sqrt(d)) v in h heads, then the projection.

    Returns:
        The mixed tokens (B, T, D), and the softmax (B, h, T, T).
    """
    queries = split_heads(g, vit, third_of_qkv(g, vit, name, "q", x), perm=[0, 2, 1, 3])  # (B, h, T, d)
    keys = split_heads(g, vit, third_of_qkv(g, vit, name, "k", x), perm=[0, 2, 3, 1])  # (B, h, d, T)
    values = split_heads(g, vit, third_of_qkv(g, vit, name, "v", x), perm=[0, 2, 1, 3])  # (B, h, T, d)
    attention = g.op("Softmax", g.op("MatMul", queries, keys), axis=-1)
    mixed = g.op("Transpose", g.op("MatMul", attention, values), perm=[0, 2, 1, 3])  # (B, T, h, d)
    merged = g.op("Reshape", mixed, g.ints(0, 0, vit.embed_dim))
    return g.linear(f"{name}.attn.proj", merged), attention


def third_of_qkv(g: GraphWriter, vit: VitArchitecture, name: str, part: str, x: str) -> str:
    """(B, T, D): queries (scaled by 1/sqrt(d)), keys or values of the tokens; ``part`` is "q", "k" or "v"."""
    start = "qkv".index(part) * vit.embed_dim
    kernel, bias = (g.checkpoint[f"{name}.attn.qkv.{p}"][start : start + vit.embed_dim] for p in _PARTS)
    if part == "q":
        scale = np.float32((vit.embed_dim // vit.num_heads) ** -0.5)
        kernel, bias = kernel * scale, bias * scale
    return g.affine(f"{name}.attn.{part}", kernel.T, bias, x)


def split_heads(g: GraphWriter, vit: VitArchitecture, x: str, *, perm: list[int]) -> str:
    """(B, T, D) as (B, T, h, d), its axes permuted."""
    shape = g.ints(0, 0, vit.num_heads, vit.embed_dim // vit.num_heads)
    return g.op("Transpose", g.op("Reshape", x, shape), perm=perm)


def mlp(g: GraphWriter, name: str, x: str) -> str:
    """Linear, exact GELU (with erf, torch's default), linear."""
    return g.linear(f"{name}.mlp.fc2", g.op("Gelu", g.linear(f"{name}.mlp.fc1", x)))
