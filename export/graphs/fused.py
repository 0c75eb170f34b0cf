"""The written graph with ONNX Runtime's own operators, for its CUDA kernels: ``--target ort-cuda``.

ONNX Runtime recognises attention in the graphs of some exporters only, and this one is not among them: its CUDA
provider would run seven kernels per block and keep a (B, heads, T, T) array in memory. Here the fused operators are
written explicitly, in the form that ONNX Runtime's transformer optimizer uses:

- ``com.microsoft.MultiHeadAttention`` for softmax(q kᵀ) v: a flash or memory-efficient kernel in float16. It takes
  (B, T, D) as the linear layers give it and adds the three biases itself. Queries are scaled already (``scale`` 1).
  For DINOv3 it takes queries and keys after their rotation (RoPE);
- ``com.microsoft.SkipLayerNormalization`` for a residual sum and the norm after it, with the bias of the layer
  before if there is no layer scale between them.

MultiHeadAttention does not return probabilities. The ``attention`` output stays: in the last block, the CLS token's row
alone, one of T, is computed separately.

Not used, and why: ``BiasGelu`` is made by ONNX Runtime itself when it loads the file. ``FastGelu`` is the tanh
formula, another function than the exact GELU these networks were trained with. Queries, keys and values packed into one
matrix (B, T, heads, 3, d) would be one product instead of three, but ONNX Runtime's CPU has no kernel for it, and the
file could not be compared with torch without a GPU.

Speed on a GPU has not been measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dinokit.errors import ModelError
from dinokit.export.graphs.graph import Rewriter, Store

if TYPE_CHECKING:
    import onnx

__all__ = ["DOMAIN", "to_fused"]

DOMAIN = "com.microsoft"
_HEADS_FIRST, _KEYS = [0, 2, 1, 3], [0, 2, 3, 1]  # (B, T, h, d) to (B, h, T, d) and (B, h, d, T)


def to_fused(model: onnx.ModelProto, store: Store | None = None) -> onnx.ModelProto:
    """The same network with ONNX Runtime's fused operators.

    Args:
        model: float32, as :func:`dinokit.vit_graph.build_vit_graph` writes it, for every size or for one; not
            modified.
        store: its large weights if they are outside; new ones are added.

    Returns:
        A new model with the same inputs and outputs, which runs only in ONNX Runtime (CUDA, or float32 kernels on
        the CPU).

    Raises:
        ModelError: no attention was found that could be fused; the graph was not written by dinokit.
    """
    return _Fused(model, store).run()


@dataclass(frozen=True)
class _Attention:
    """One softmax(q kᵀ) v in the old graph."""

    queries: str
    """(B, T, h, d), before the transposition."""
    keys: str
    values: str
    turned: str
    """The transposed queries (B, h, T, d)."""
    shown: bool
    """Whether the softmax is also an output's."""
    merged: onnx.NodeProto
    """The reshape to (B, T, D), which the new operator replaces."""


class _Fused(Rewriter):
    def __init__(self, model: onnx.ModelProto, store: Store | None = None) -> None:
        super().__init__(model, store)
        nodes = list(model.graph.node)
        self.makers = {name: node for node in nodes for name in node.output}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)

    def run(self) -> onnx.ModelProto:
        found = list(self.attentions())
        if not found:
            raise ModelError(
                "the graph has no attention that could be fused for ONNX Runtime's CUDA kernels; target 'ort-cuda' is "
                "for the Vision Transformers whose graph dinokit writes itself. Use target 'portable'"
            )
        merged = {one.merged.output[0]: one for one in found}
        shown = {one.turned: one for one in found if one.shown}
        skipped = self.skip_norms()
        gone = {norm.output[0] for norm in skipped.values()}
        for node in self.source_nodes:
            name = node.output[0]
            if name in merged:
                self.attend(merged[name])
            elif name in shown:
                self.first_row(node)
            elif name in skipped:
                self.skip_norm(node, skipped[name])
            elif name not in gone:
                self.nodes.append(node)
        self.prune()
        return self.finish()

    # -- attention

    def attentions(self) -> Iterator[_Attention]:
        for node in self.model.graph.node:
            if node.op_type == "Softmax" and (found := self.attention(node)):
                yield found

    def attention(self, softmax: onnx.NodeProto) -> _Attention | None:
        """The attention around a softmax, or None if it is something else."""
        scores = self.makers.get(softmax.input[0])
        users = self.users.get(softmax.output[0], [])
        mixes = [node for node in users if node.op_type == "MatMul" and node.input[0] == softmax.output[0]]
        if scores is None or scores.op_type != "MatMul" or len(mixes) != 1:
            return None
        queries = self.transposed(scores.input[0], _HEADS_FIRST)
        keys = self.transposed(scores.input[1], _KEYS)
        values = self.transposed(mixes[0].input[1], _HEADS_FIRST)
        back = self.only_user(mixes[0].output[0], "Transpose")
        merged = self.only_user(back.output[0], "Reshape") if back else None
        if queries is None or keys is None or values is None or merged is None:
            return None
        shown = len(users) > 1 or softmax.output[0] in self.outputs
        return _Attention(queries, keys, values, scores.input[0], shown, merged)

    def transposed(self, name: str, perm: list[int]) -> str | None:
        """The tensor that this permutation turned into ``name``; None if there is none."""
        node = self.makers.get(name)
        if node is None or node.op_type != "Transpose" or _attributes(node).get("perm") != perm:
            return None
        return str(node.input[0])

    def only_user(self, name: str, kind: str) -> onnx.NodeProto | None:
        users = self.users.get(name, [])
        fits = len(users) == 1 and users[0].op_type == kind and name not in self.outputs
        return users[0] if fits else None

    def attend(self, one: _Attention) -> None:
        name = one.merged.output[0]
        parts = (one.queries, one.keys, one.values)
        heads, width = self.heads_of(one.values)
        plain = [self.before_heads(part) for part in parts]  # (B, T, D), or None after a rotation
        split = [self.without_bias(part) if part else None for part in plain]
        if not one.shown and all(split):
            linear = [pair[0] for pair in split if pair]
            biases = np.concatenate([self.array(pair[1]) for pair in split if pair])
            bias = self.constant(f"{name}:bias", biases)
        else:  # the biases are needed before the rotation, or for the row that is an output
            linear = [p or self.merge(part, heads * width) for p, part in zip(plain, parts, strict=True)]
            bias = ""
        self.add(
            "MultiHeadAttention", [*linear, *([bias] if bias else [])], [name], num_heads=heads, scale=1.0
        )

    def heads_of(self, values: str) -> tuple[int, int]:
        """Number and width of the heads, from the shape (B, T, h, d)."""
        *_, heads, width = self.array(self.makers[values].input[1]).tolist()
        return heads, width

    def before_heads(self, name: str) -> str | None:
        """The tensor (B, T, D) that was reshaped to ``name`` (B, T, h, d)."""
        node = self.makers.get(name)
        return str(node.input[0]) if node is not None and node.op_type == "Reshape" else None

    def without_bias(self, name: str) -> tuple[str, str] | None:
        """``x`` and ``bias`` of x + bias."""
        node = self.makers.get(name)
        if node is None or node.op_type != "Add" or len(self.users[name]) > 1:
            return None
        x, bias = node.input
        return (x, bias) if bias in self.weights and len(self.weights[bias].dims) == 1 else None

    def merge(self, name: str, width: int) -> str:
        shape = self.constant(f"merged:0,0,{width}", np.array([0, 0, width], np.int64))
        return self.op("Reshape", name, shape, output=f"{name}:merged")

    def first_row(self, transpose: onnx.NodeProto) -> None:
        """Computes the probabilities that are an output from the CLS token's query only."""
        zero, one = (self.constant(f"row:{i}", np.array([i], np.int64)) for i in (0, 1))
        transpose.input[0] = self.op(
            "Slice", transpose.input[0], zero, one, one, output=f"{transpose.input[0]}:cls"
        )
        self.nodes.append(transpose)

    # -- residual sums

    def skip_norms(self) -> dict[str, onnx.NodeProto]:
        """The residual sums of two computed tensors, by name, each with the norm that follows it."""
        found = {}
        for norm in self.model.graph.node:
            if norm.op_type != "LayerNormalization" or len(norm.output) > 1 or len(norm.input) != 3:
                continue
            total = self.makers.get(norm.input[0])
            if total is None or total.op_type != "Add" or total.output[0] in self.outputs:
                continue
            if _attributes(norm).get("axis", -1) == -1 and not any(x in self.weights for x in total.input):
                found[total.output[0]] = norm
        return found

    def skip_norm(self, total: onnx.NodeProto, norm: onnx.NodeProto) -> None:
        residual, branch = total.input
        _, gamma, beta = norm.input
        inputs = [residual, branch, gamma, beta]
        if split := self.without_bias(branch):
            inputs[1] = split[0]
            inputs.append(split[1])
        epsilon = _attributes(norm).get("epsilon", 1e-5)
        # The next residual also takes the sum; the second and third output are for training.
        also_residual = len(self.users[total.output[0]]) > 1
        outputs = [norm.output[0], *(["", "", total.output[0]] if also_residual else [])]
        self.add("SkipLayerNormalization", inputs, outputs, epsilon=epsilon)

    # -- the new graph

    def add(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        make = self.onnx.helper.make_node
        self.nodes.append(make(kind, inputs, outputs, name=outputs[0], domain=DOMAIN, **attributes))

    def prune(self) -> None:
        """Removes nodes that nothing uses any more."""
        needed, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]

    def finish(self) -> onnx.ModelProto:
        changed = self.onnx.ModelProto()
        changed.CopyFrom(self.model)
        if DOMAIN not in {known.domain for known in changed.opset_import}:
            changed.opset_import.append(self.onnx.helper.make_opsetid(DOMAIN, 1))
        self.model = changed
        new = super().finish()
        # onnx does not know these operators, but later passes need the types of their outputs.
        outputs = {name for node in new.graph.node if node.domain == DOMAIN for name in node.output}
        for name in sorted(outputs - self.outputs - {""}):
            value = self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, None)
            new.graph.value_info.append(value)
        return new


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
