"""Where a graph's weights go: inside the file, beside it from 2 GiB on, or straight into a session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from small_models import SMALL, random_weights

from dinokit.errors import ModelError
from dinokit.export.graphs.external_data import write_onnx
from dinokit.loading.zoo import ZOO
from dinokit.model_folder.contract import OUTPUTS
from dinokit.model_folder.weights import expected_shapes
from dinokit.runtime.onnx import OnnxEngine
from dinokit.vit_graph import build_vit_graph, split_vit_graph

PIXELS = np.random.default_rng(0).normal(size=(2, 3, 40, 24)).astype(np.float32)


def outputs(engine: OnnxEngine) -> list[np.ndarray]:
    found = engine.run(PIXELS, OUTPUTS)
    return [found[name] for name in OUTPUTS]


def test_all_three_are_the_same_network(tmp_path: Path) -> None:
    weights = random_weights()
    right = outputs(OnnxEngine(build_vit_graph(SMALL, weights).SerializeToString(), device="cpu"))
    graph, beside = split_vit_graph(SMALL, weights, metadata={"dinokit": "x"})
    in_memory = OnnxEngine(graph.SerializeToString(), weights=beside, device="cpu")
    assert in_memory.metadata == {"dinokit": "x"}
    assert len(graph.SerializeToString()) < sum(array.nbytes for array in weights.values()) / 4
    files = write_onnx(graph, tmp_path / "m.onnx", beside, largest=1000)
    assert files == (tmp_path / "m.onnx", tmp_path / "m.onnx_data")
    del beside, weights  # the session must not look at memory that is gone
    in_two_files = OnnxEngine(tmp_path / "m.onnx", device="cpu")
    for engine in (in_memory, in_two_files):
        for found, expected in zip(outputs(engine), right, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_two_files_are_valid_and_hold_everything_once(tmp_path: Path) -> None:
    whole = build_vit_graph(SMALL, random_weights())
    graph, beside = split_vit_graph(SMALL, random_weights())
    write_onnx(graph, tmp_path / "m.onnx", beside, largest=1000)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    model = onnx.load(tmp_path / "m.onnx")  # onnx's own reader of external data
    inside = {t.name: onnx.numpy_helper.to_array(t) for t in whole.graph.initializer}
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert found.keys() == inside.keys()
    for name, array in inside.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    bare = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    places = [{e.key: e.value for e in t.external_data} for t in bare.graph.initializer if t.external_data]
    assert places and {place["location"] for place in places} == {"m.onnx_data"}
    assert not any(int(place["offset"]) % 4096 for place in places)  # so that they can be mapped
    n_bytes = sum(array.nbytes for array in inside.values())
    assert (tmp_path / "m.onnx_data").stat().st_size < n_bytes + 4096 * len(inside)


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    graph, beside = split_vit_graph(SMALL, random_weights())
    assert write_onnx(graph, tmp_path / "m.onnx", beside) == (tmp_path / "m.onnx",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]
    model = build_vit_graph(SMALL, random_weights())
    assert (tmp_path / "m.onnx").read_bytes() == model.SerializeToString()


def test_a_file_without_its_data_is_an_error(tmp_path: Path) -> None:
    graph, beside = split_vit_graph(SMALL, random_weights())
    write_onnx(graph, tmp_path / "m.onnx", beside, largest=1000)
    (tmp_path / "m.onnx_data").unlink()
    with pytest.raises(ModelError, match=r"m\.onnx cannot be opened by ONNX Runtime .*m\.onnx_data"):
        OnnxEngine(tmp_path / "m.onnx", device="cpu")


def test_one_model_too_large_for_protobuf_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinokit.vit_graph.LARGEST_FILE", 1000)
    with pytest.raises(ModelError, match=r"less than 2 GiB. Use split_vit_graph"):
        build_vit_graph(SMALL, random_weights())


@pytest.mark.slow  # and 7 GB of memory
def test_really_more_than_two_gibibytes(tmp_path: Path) -> None:
    """DINOv2 giant's first 20 blocks."""
    vit = replace(ZOO["dinov2_vitg14_reg"].vit, depth=20)
    shapes = expected_shapes(vit)
    assert shapes is not None
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in shapes.items()
    }
    assert sum(array.nbytes for array in weights.values()) > 2**31
    with pytest.raises(ModelError, match=r"the weights take 2\.1 GiB"):
        build_vit_graph(vit, weights)
    pixels = rng.standard_normal((1, 3, 56, 70), np.float32)
    graph, beside = split_vit_graph(vit, weights)
    right = OnnxEngine(graph.SerializeToString(), weights=beside, device="cpu").run(pixels, OUTPUTS)
    write_onnx(graph, tmp_path / "m.onnx", beside)
    del graph, beside, weights
    found = OnnxEngine(tmp_path / "m.onnx", device="cpu").run(pixels, OUTPUTS)
    for name in OUTPUTS:
        assert np.isfinite(right[name]).all()
        np.testing.assert_array_equal(found[name], right[name])
