"""Ways to make a network int8, beside each other: size, nearness to float32, k-NN labels, pictures a second.

    python benchmarks/int8.py --labelled DATA/imagenette224/val -o benchmarks/results/int8_starter.json
    python benchmarks/int8.py --labelled DATA/imagenette224/val -m dino_vits16 --static
    python benchmarks/int8.py --labelled DATA/imagenette224/val -m runs/a_resnet --static

Of a Vision Transformer:

- float32
- ONNX Runtime's quantize_dynamic: a scale a tensor for activations, a column for weights
- its quantize_static (QDQ), MinMax and percentile, calibrated on the same pictures as dinokit's (``--static``; slow)
- dinokit's products with eight bits of activations everywhere, and with sixteen, weights rounded to the nearest
- the same with weights rounded by what photographs make of them
- eight bits where they are enough: where they change the embeddings by so many variances at most (``--activations``)
- what `dinokit export --precision int8` tries first

x86 processors without VNNI saturate in what ONNX Runtime quantises, not in what dinokit does (``vnni`` in the JSON).

Of a convolutional network: float32, quantize_static (``--static``), and dinokit's convolutions in integers, all of them
or those that together change the embeddings by so many variances at most (``static_int8.py``).

``nearness`` is the mean squared change of the embeddings over their variance between pictures. The speeds of all ways
are measured in turn in one process; on a machine that does other work, only their ratios mean something, and not much.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from provenance import command

from dinokit.export.quantisation.calibration import calibration_pixels
from dinokit.export.quantisation.int8 import (
    ACTIVATIONS,
    CONVOLUTIONS,
    Int8Plan,
    Int8Plans,
    in_integers,
    is_convolutional,
)
from dinokit.export.quantisation.products import find_products
from dinokit.export.quantisation.quantize import to_int8
from dinokit.export.quantisation.static_int8 import find_convolutions, learn, sensitivity, to_static_int8
from dinokit.export.traced import network_graph
from dinokit.export.verification.labels import agreement, labelled_sample
from dinokit.export.verification.proof import open_photographs
from dinokit.export.verification.speed import images_per_second
from dinokit.export.verification.verify import cosines
from dinokit.loading.locate import Located, locate
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.contract import INPUT
from dinokit.runtime.onnx import OnnxEngine
from dinokit.vit_graph import build_vit_graph

BATCH = 8


def by_onnxruntime(
    graph: onnx.ModelProto, pixels: NDArray[np.float32], static: bool
) -> dict[str, onnx.ModelProto]:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(np.split(pixels, range(BATCH, len(pixels), BATCH)))

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    weights = {product.weight for product in find_products(graph)}
    convolutional = is_convolutional(graph)
    nodes = None if convolutional else [n.name for n in graph.graph.node if set(n.input) & weights]
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "m.onnx", Path(folder) / "q.onnx"
        onnx.save(graph, source)
        if not convolutional:
            quantize_dynamic(
                source, target, weight_type=QuantType.QInt8, per_channel=True, nodes_to_quantize=nodes
            )
            made["onnxruntime, dynamic"] = onnx.load(target)
        for method in ("MinMax", "Percentile") if static else ():
            quantize_static(
                source,
                target,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=nodes,
                calibrate_method=getattr(CalibrationMethod, method),
            )
            made[f"onnxruntime, static {method}"] = onnx.load(target)
    return made


def by_dinokit(
    graph: onnx.ModelProto, pixels: NDArray[np.float32], activations: Sequence[float]
) -> dict[str, onnx.ModelProto]:
    def first(*allowed: float) -> Int8Plan:
        return next(iter(Int8Plans(graph, None, lambda: pixels, activations=allowed)))

    plan = first(*ACTIVATIONS)
    everything = tuple(product.weight for product in find_products(graph))
    ways = {
        "8 bits, nearest": Int8Plan({}, everything),
        "16 bits, nearest": Int8Plan(),
        "8 bits, rounded by photographs": Int8Plan(plan.rounded, everything),
        "16 bits, rounded by photographs": Int8Plan(plan.rounded),
        **{f"8 bits where they change {allowed:g}": first(allowed) for allowed in activations},
        "dinokit export": plan,
    }
    return {name: to_int8(graph, rounded=way.rounded, once=way.once) for name, way in ways.items()}


def convolutions(
    graph: onnx.ModelProto, pixels: NDArray[np.float32], allowed: Sequence[float]
) -> dict[str, onnx.ModelProto]:
    found = find_convolutions(graph)
    learnt = learn(graph, None, found, pixels, lambda step: None)
    changes = dict(sensitivity(graph, None, found, learnt, pixels[:BATCH]))
    ways = {f"convolutions that change {least:g}": in_integers(changes, learnt, least) for least in allowed}
    ways["all convolutions"] = tuple(changes)
    return {name: to_static_int8(graph, None, learnt, chosen) for name, chosen in ways.items()}


def graph_of(located: Located) -> onnx.ModelProto:
    assert located.load_weights is not None
    weights = located.load_weights()
    if isinstance(located.config.architecture, VitArchitecture):
        return build_vit_graph(located.config.vit, weights)
    from dinokit.runtime.torch import TorchEngine

    module = TorchEngine(located.config, weights, device="cpu", precision="fp32").module
    graph, store = network_graph(located.config, weights, module)
    for tensor in graph.graph.initializer:
        if tensor.name in store:
            tensor.CopyFrom(onnx.numpy_helper.from_array(store[tensor.name], tensor.name))
    return graph


def has_vnni() -> bool:
    """Whether this processor computes what ONNX Runtime's quantize_dynamic wrote; others saturate."""
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and "_vnni" in cpu.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument(
        "--labelled",
        required=True,
        help="a folder with one subfolder per class, or another source with labels",
    )
    parser.add_argument("--activations", type=float, nargs="+", help="so many variances, see above")
    parser.add_argument("--static", action="store_true", help="try ONNX Runtime's static quantisation, too")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()

    located = locate(arguments.model)
    preprocessing = located.config.preprocessing
    graph = graph_of(located)
    by_us = convolutions if is_convolutional(graph) else by_dinokit
    allowed = arguments.activations or (CONVOLUTIONS if is_convolutional(graph) else [1e-5, 5e-5, 1e-4])
    pixels = calibration_pixels(open_photographs(None).compared, preprocessing)
    models = {
        "float32": graph,
        **by_onnxruntime(graph, pixels, arguments.static),
        **by_us(graph, pixels, allowed),
    }
    engines = {name: OnnxEngine(model.SerializeToString(), device="cpu") for name, model in models.items()}
    sample = labelled_sample(arguments.labelled, engines["float32"], preprocessing, lambda step: None)
    variance = float(np.square(sample.right - sample.right.mean(axis=0)).mean())
    batch = preprocessing.normalise(np.stack(sample.crops[:BATCH]))

    def runner(engine: OnnxEngine) -> Callable[[], Any]:
        return lambda: engine.run(batch, ["pooler_output"])

    rates = images_per_second({name: runner(engine) for name, engine in engines.items()}, len(batch))
    figures = {}
    print(f"{'':32}   MB  1-cos    nearness  labels  images/s")
    for name, engine in engines.items():
        found = agreement(engine, sample, lambda step: None)
        few = np.stack(sample.crops[:256])
        ours = engine.run(preprocessing.normalise(few), ["pooler_output"])["pooler_output"]
        right = sample.right[:256]
        figures[name] = {
            "megabytes": len(models[name].SerializeToString()) / 1e6,
            "lost_cosine": max(0.0, 1 - float(cosines(right, ours).mean())),
            "nearness": float(np.square(ours - right).mean()) / variance,
            "equal_labels": found.equal,
            "images_per_second": rates[name],
        }
        size, cosine, near, labels, rate = figures[name].values()
        print(f"{name:32} {size:4.1f}  {cosine:.1e}  {near:.1e}  {labels:6.1%}  {rate:8.0f}", flush=True)
    if arguments.output:
        report = {
            "command": command(Path(arguments.labelled).parents[1]),
            "model": arguments.model,
            "pictures": len(sample.labels),
            "vnni": has_vnni(),
            "ways": figures,
        }
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
