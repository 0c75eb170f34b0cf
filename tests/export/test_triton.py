"""Triton's model repository: its configuration fits Triton's schema, and the network fits the configuration."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

pytest.importorskip("timm")

import onnx
import onnxruntime as ort
from small_models import SMALL, config_for, random_weights

from dinokit import LinearClassifier
from dinokit.cli.export import export as export_command
from dinokit.errors import DinokitError, ModelError, UsageError
from dinokit.export import export_classifier, export_folder, write_triton_classifier, write_triton_repository
from dinokit.model_folder.contract import METADATA_KEY
from dinokit.model_folder.folder import write_model_folder
from dinokit.pictures.preprocess import Preprocessing

# Of Triton's model_config.proto (triton-inference-server/common), what is used here: message to its fields, * for
# lists and % for maps. Where tritonclient is installed, a test compares this table with the original.
SCHEMA = {
    "ModelConfig": "name:string backend:string default_model_filename:string max_batch_size:int32 *input:ModelInput "
    "*output:ModelOutput dynamic_batching:ModelDynamicBatching *instance_group:ModelInstanceGroup "
    "version_policy:ModelVersionPolicy optimization:ModelOptimizationPolicy *model_warmup:ModelWarmup "
    "%parameters:ModelParameter",
    "ModelInput": "name:string data_type:DataType *dims:int64",
    "ModelOutput": "name:string data_type:DataType *dims:int64 label_filename:string",
    "ModelDynamicBatching": "*preferred_batch_size:int32 max_queue_delay_microseconds:uint64",
    "ModelInstanceGroup": "count:int32 kind:Kind",
    "ModelVersionPolicy": "latest:Latest",
    "Latest": "num_versions:uint32",
    "ModelOptimizationPolicy": "execution_accelerators:ExecutionAccelerators",
    "ExecutionAccelerators": "*gpu_execution_accelerator:Accelerator",
    "Accelerator": "name:string %parameters:string",
    "ModelWarmup": "name:string batch_size:uint32 %inputs:Input",
    "Input": "data_type:DataType *dims:int64 zero_data:bool",
    "ModelParameter": "string_value:string",
}
ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_UINT8", "TYPE_FP32"],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU"],
}
NUMPY = {"TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32}


def model_config_class() -> Any:
    """A protobuf message of the table above: its parser refuses what is not in there."""
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="t.proto", package="t", syntax="proto3")
    for enum, names in ENUMS.items():
        added = file.enum_type.add(name=enum)
        for number, name in enumerate(names):
            added.value.add(name=name, number=number)
    for message, fields in SCHEMA.items():
        added = file.message_type.add(name=message)
        for number, field in enumerate(fields.split(), 1):
            mark, (name, kind) = field[0], field.lstrip("*%").split(":")
            repeated = mark in "*%"
            made = added.field.add(name=name, number=number, label=3 if repeated else 1)
            if mark == "%":  # a map is a list of entries with key and value
                entry = added.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=1, type=types.TYPE_STRING)
                describe(entry.field.add(name="value", number=2, label=1), kind)
                describe(made, f"{message}.{entry.name}")
            else:
                describe(made, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


def describe(field: Any, kind: str) -> None:
    types = descriptor_pb2.FieldDescriptorProto
    if kind in ENUMS:
        field.type, field.type_name = types.TYPE_ENUM, f".t.{kind}"
    elif kind[0].isupper():
        field.type, field.type_name = types.TYPE_MESSAGE, f".t.{kind}"
    else:
        field.type = types.Type.Value(f"TYPE_{kind.upper()}")


def tritons_own() -> Any:
    """Triton's generated schema; its package is not imported, as it needs gRPC."""
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tritonclient is not installed; pip install --no-deps tritonclient")
    path = Path(spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    own = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert own is not None and own.loader is not None
    module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with files of all kinds; read only."""
    there = tmp_path_factory.mktemp("exported")
    source = write_model_folder(there / "source", config_for(name="my shoes"), random_weights()).path
    out = there / "out"
    export_folder(source, out, precision="fp16,int8", target="embedder,ort-cuda")
    export_folder(out, out, precision="fp16", target="embedder", image_size=(48, 24), external_data=True)
    return out


FILES = {  # file to its Triton model, input shape and where it runs
    "onnx/embedder_fp16.onnx": ("my-shoes-embedder_fp16", [32, 32, 3], "KIND_AUTO"),
    "onnx/embedder_int8.onnx": ("my-shoes-embedder_int8", [32, 32, 3], "KIND_CPU"),
    "onnx/model_cuda_fp16.onnx": ("my-shoes-model_cuda_fp16", [3, 32, 32], "KIND_GPU"),
    "onnx/embedder_fp16_48x24.onnx": ("my-shoes-embedder_fp16_48x24", [48, 24, 3], "KIND_AUTO"),
}


@pytest.fixture(scope="module")
def repository(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = tmp_path_factory.mktemp("triton") / "models"
    write_triton_repository(folder, there, list(FILES), max_batch_size=5)
    return there


def parsed(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), model_config_class()())


def test_the_folders_are_as_triton_wants_them(folder: Path, repository: Path) -> None:
    assert sorted(path.name for path in repository.iterdir()) == sorted(name for name, *_ in FILES.values())
    for file, (name, *_) in FILES.items():
        files = {str(p.relative_to(repository / name)) for p in (repository / name).rglob("*") if p.is_file()}
        data = {"1/embedder_fp16_48x24.onnx_data"} if "48x24" in file else set()
        assert files == {"config.pbtxt", "1/model.onnx"} | data
        assert (repository / name / "1" / "model.onnx").read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("file", sorted(FILES))
def test_the_network_fits_its_configuration(repository: Path, file: str) -> None:
    """What Triton checks when it loads a model, and its warm-up, done with plain ONNX Runtime."""
    name, shape, kind = FILES[file]
    config = parsed(repository / name)
    assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 5)
    (source,) = config.input
    assert list(source.dims) == shape
    (group,) = config.instance_group
    assert (group.count, ENUMS["Kind"][group.kind]) == (1, kind)
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        repository / name / "1" / config.default_model_filename, options, providers=["CPUExecutionProvider"]
    )
    assert [i.name for i in session.get_inputs()] == [source.name]
    assert not isinstance(session.get_inputs()[0].shape[0], int)  # a free batch, which max_batch_size needs
    assert [o.name for o in session.get_outputs()] == [o.name for o in config.output]
    assert [warm.batch_size for warm in config.model_warmup] == [1, 5]
    for warm in config.model_warmup:
        tensor = warm.inputs[source.name]
        assert tensor.zero_data and list(tensor.dims) == shape and tensor.data_type == source.data_type
        images = np.zeros((warm.batch_size, *tensor.dims), NUMPY[ENUMS["DataType"][tensor.data_type]])
        for output, found in zip(config.output, session.run(None, {source.name: images}), strict=True):
            assert found.shape == (warm.batch_size, *output.dims)
            assert found.dtype == NUMPY[ENUMS["DataType"][output.data_type]]
    told = json.loads(config.parameters["dinokit"].string_value)
    assert told["preprocessing"]["crop_px"] == (shape[:2] if shape[-1] == 3 else shape[1:])
    assert told["name"] == "my shoes" and told["architecture"] == json.loads(json.dumps(SMALL.to_json()))


def test_tensorrt(folder: Path, tmp_path: Path) -> None:
    (made,) = write_triton_repository(folder, tmp_path, ["onnx/embedder_fp16_48x24.onnx"], tensorrt=True)
    config = parsed(made)
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt" and config.instance_group[0].kind == 1
    options = dict(accelerator.parameters)
    assert options["precision_mode"] == "FP16" and options["trt_layer_norm_fp32_fallback"] == "true"
    assert options["trt_profile_min_shapes"] == "image:1x48x24x3"
    assert options["trt_profile_max_shapes"] == "image:64x48x24x3"
    assert options["trt_engine_cache_path"] == f"/cache/{made.name}"
    # Of the file, as ONNX Runtime would take the engine of another model of this name.
    content = (folder / "onnx" / "embedder_fp16_48x24.onnx").read_bytes()
    assert options["trt_engine_cache_prefix"] == hashlib.sha256(content).hexdigest()[:16]
    for file, words in (
        ("onnx/embedder_int8.onnx", "embedder_int8.onnx is not for TensorRT"),
        ("onnx/model_cuda_fp16.onnx", "model_cuda_fp16.onnx is not for TensorRT"),
        ("onnx/embedder_fp16.onnx", "pictures of every size, and TensorRT builds an engine for one"),
    ):
        with pytest.raises(UsageError, match=words):
            write_triton_repository(folder, tmp_path / "no", [file], tensorrt=True)
    assert not (tmp_path / "no").exists()


# -- against Triton's own schema


def test_triton_parses_it(folder: Path, repository: Path, tmp_path: Path) -> None:
    own = tritons_own()
    write_triton_repository(folder, tmp_path, ["onnx/embedder_fp16_48x24.onnx"], tensorrt=True)
    for file in (*repository.glob("*/config.pbtxt"), *tmp_path.glob("*/config.pbtxt")):
        config = text_format.Parse(file.read_text(encoding="utf-8"), own.ModelConfig())
        assert config.name == file.parent.name and config.dynamic_batching.max_queue_delay_microseconds


def test_the_table_agrees_with_triton() -> None:
    own = tritons_own()
    theirs, seen = {}, [own.ModelConfig.DESCRIPTOR]
    while seen:
        message = seen.pop()
        if message.full_name not in theirs:
            theirs[message.full_name] = message
            seen += [field.message_type for field in message.fields if field.message_type]
    by_name: dict[str, list[Any]] = {}
    for message in theirs.values():
        by_name.setdefault(message.name, []).append(message)
    for name, fields in SCHEMA.items():
        for field in fields.split():
            field_name, kind = field.lstrip("*%").split(":")
            (found,) = [m.fields_by_name[field_name] for m in by_name[name] if field_name in m.fields_by_name]
            if field[0] == "%":
                found = found.message_type.fields_by_name["value"]
            named = found.message_type or found.enum_type
            numbers = descriptor_pb2.FieldDescriptorProto.Type
            assert (named.name if named else numbers.Name(found.type)[5:].lower()) == kind, (name, field)


# -- what stands in the way, and the command


def test_a_model_of_dinokits_is_replaced_and_others_are_not(folder: Path, tmp_path: Path) -> None:
    files = ["onnx/embedder_int8.onnx"]
    (made,) = write_triton_repository(folder, tmp_path, files)
    (made / "1" / "old").write_text("gone")
    (tmp_path / "another").mkdir()
    assert write_triton_repository(folder, tmp_path, files, max_batch_size=2) == (made,)
    assert not (made / "1" / "old").exists() and parsed(made).max_batch_size == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", made.name]
    (made / "config.pbtxt").write_text('name: "mine"')
    with pytest.raises(UsageError, match="exists and was not written by dinokit"):
        write_triton_repository(folder, tmp_path, files)
    assert (made / "config.pbtxt").read_text() == 'name: "mine"'


def test_what_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_batch_size=0 is not valid"):
        write_triton_repository(folder, tmp_path / "t", ["onnx/embedder_int8.onnx"], max_batch_size=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; name a folder"):
        write_triton_repository(folder, tmp_path / "file", ["onnx/embedder_int8.onnx"])
    with pytest.raises(UsageError, match="is a model folder; name another one"):
        write_triton_repository(folder, folder, ["onnx/embedder_int8.onnx"])
    with pytest.raises(ModelError, match=r"none\.onnx does not exist"):
        write_triton_repository(folder, tmp_path / "t", ["onnx/none.onnx"])
    out = Path(shutil.copytree(folder, tmp_path / "out"))
    (out / "onnx" / "embedder_fp16_48x24.onnx_data").unlink()
    with pytest.raises(
        ModelError, match=r"has its weights in embedder_fp16_48x24\.onnx_data, which is missing"
    ):
        write_triton_repository(out, tmp_path / "t", ["onnx/embedder_fp16_48x24.onnx"])
    assert not (tmp_path / "t").exists()


def changed(folder: Path, file: str, **changes: Any) -> None:
    """Writes other values into the contract of an ONNX file."""
    model = onnx.load(folder / file, load_external_data=False)
    (entry,) = [entry for entry in model.metadata_props if entry.key == METADATA_KEY]
    entry.value = json.dumps({**json.loads(entry.value), **changes})
    (folder / file).write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"name": 'x\nmodel_operations { op_library_filename: "evil.so" }\n# '},
            "name is .* one line of text",
        ),
        ({"weights_sha256": "0" * 64}, "does not belong to its folder: its weights_sha256 differ"),
        ({"preprocessing": Preprocessing().to_json()}, "its preprocessing differ"),
        ({"preprocessing": {}}, r"lacks preprocessing\.resize_px, preprocessing\.crop_px"),
        ({"preprocessing": {**Preprocessing().to_json(), "crop_px": 3}}, "crop_px is 3"),
        ({"precision": "fp8"}, "precision is 'fp8', expected one of fp32, fp16, int8"),
        ({"target": []}, r"target is \[\], expected one of"),
        ({"format_version": 99}, r"has format_version 99 \(dinokit .*Update dinokit"),
    ],
)
def test_a_file_that_load_backbone_would_refuse(
    folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    out, file = Path(shutil.copytree(folder, tmp_path / "out")), "onnx/embedder_int8.onnx"
    changed(out, file, **changes)
    with pytest.raises(ModelError, match=words):
        write_triton_repository(out, tmp_path / "models", [file])
    assert not (tmp_path / "models").exists()


def test_a_file_of_another_size_is_of_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """Its preprocessing may be another, nothing else."""
    out, file = Path(shutil.copytree(folder, tmp_path / "out")), "onnx/embedder_fp16_48x24.onnx"
    changed(out, file, weights_sha256="0" * 64)
    with pytest.raises(ModelError, match="does not belong to its folder: its weights_sha256 differ"):
        write_triton_repository(out, tmp_path / "models", [file])


def test_one_file_by_its_name(folder: Path, tmp_path: Path) -> None:
    (made,) = write_triton_repository(folder, tmp_path, "onnx/embedder_int8.onnx")
    assert made.name == "my-shoes-embedder_int8"


def test_names_in_a_graph_end_no_comment(folder: Path, tmp_path: Path) -> None:
    out, file = Path(shutil.copytree(folder, tmp_path / "out")), "onnx/embedder_int8.onnx"
    model = onnx.load(out / file)
    model.graph.output[0].name = 'y\nbackend: "python"\n#'
    (out / file).write_bytes(model.SerializeToString())
    (made,) = write_triton_repository(out, tmp_path / "models", file)
    assert parsed(made).backend == "onnxruntime"


@pytest.mark.parametrize("target", ["embedder", "portable"])
def test_a_classifier_with_the_names_of_its_classes(folder: Path, tmp_path: Path, target: str) -> None:
    rng = np.random.default_rng(0)
    head = LinearClassifier(C=1.0)
    head.fit(rng.normal(size=(20, SMALL.embed_dim)), ["größe", "two\nlines", "a b", "c"] * 5)
    (file,) = export_classifier(folder, head, tmp_path / "my kinds.onnx", target=target).files
    made = write_triton_classifier(file, tmp_path / "models", max_batch_size=3)
    assert made == tmp_path / "models" / "my-kinds"
    assert (made / "1" / "model.onnx").read_bytes() == file.read_bytes()
    assert (made / "labels.txt").read_text(encoding="utf-8") == "a b\nc\ngröße\ntwo lines\n"
    config = parsed(made)
    assert (config.name, config.max_batch_size) == ("my-kinds", 3)
    labelled = {output.name: output.label_filename for output in config.output if output.label_filename}
    assert labelled == {"probabilities": "labels.txt"}
    told = json.loads(config.parameters["dinokit_classifier"].string_value)
    assert told["classes"] == head.classes_.tolist()
    (probabilities,) = (list(output.dims) for output in config.output if output.name == "probabilities")
    assert probabilities == [len(told["classes"])]

    # As one file of a folder it is a model like others, without a file of labels that Triton would miss.
    out = Path(shutil.copytree(folder, tmp_path / "out"))
    shutil.copyfile(file, out / "onnx" / "kinds.onnx")
    (plain,) = write_triton_repository(out, tmp_path / "plain", "onnx/kinds.onnx")
    assert not any(output.label_filename for output in parsed(plain).output)

    with pytest.raises(ModelError, match="has no classifier in it"):
        write_triton_classifier(folder / "onnx" / "embedder_fp16.onnx", tmp_path / "models")
    (made / "config.pbtxt").write_text('name: "mine"')
    with pytest.raises(UsageError, match="exists and was not written by dinokit"):
        write_triton_classifier(file, tmp_path / "models")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    arguments = [
        str(folder),
        "--triton",
        str(tmp_path / "models"),
        "--triton-batch",
        "3",
        "--image-size",
        "32",
    ]
    done = CliRunner().invoke(export_command, [*arguments, "--triton-tensorrt"])
    assert done.exit_code == 0, done.output
    (made,) = (tmp_path / "models").iterdir()
    assert made.name == "my-shoes-embedder_32x32" and f"Wrote {made}" in done.stderr
    assert parsed(made).max_batch_size == 3
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_files_that_an_earlier_export_proved_are_served_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinokit.export.triton_export.export_folder", None)
    run = [str(folder), "--triton", str(tmp_path / "models"), "--precision"]
    done = CliRunner().invoke(export_command, [*run, "fp16,int8", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((folder / "export_report.json").read_text())
    assert "from an earlier export; nothing was exported again" in done.stderr
    made = sorted(path.name for path in (tmp_path / "models").iterdir())
    assert made == ["my-shoes-embedder_fp16", "my-shoes-embedder_int8"]
    # What is missing, would be another, or was changed since, is made.
    for more in (
        ["fp32"],
        ["fp16", "--image-size", "32"],
        ["fp16", "--name", "new"],
        ["fp16", "--photos", "x"],
    ):
        assert isinstance(CliRunner().invoke(export_command, [*run, *more]).exception, TypeError)
    out = Path(shutil.copytree(folder, tmp_path / "out"))
    changed(out, "onnx/embedder_fp16.onnx", written_by="somebody")
    assert isinstance(CliRunner().invoke(export_command, [str(out), *run[1:], "fp16"]).exception, TypeError)


def test_what_stands_in_tritons_way_is_told_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinokit.export.triton_export.export_folder", None)
    (tmp_path / "models" / "my-shoes-embedder").mkdir(parents=True)
    (tmp_path / "models" / "mine-embedder").mkdir(parents=True)
    (tmp_path / "file").touch()
    run = [str(folder), "--precision", "fp32", "--triton"]
    for arguments, words in (
        ([str(tmp_path / "models")], "my-shoes-embedder exists and was not written by dinokit"),
        ([str(tmp_path / "models"), "--name", "mine"], "mine-embedder exists and was not written"),
        ([str(tmp_path / "file" / "models")], "cannot be written: no file can be made in"),
    ):
        done = CliRunner().invoke(export_command, [*run, *arguments])
        assert isinstance(done.exception, DinokitError)
        assert words in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no output given; name a model folder with -o"),
        (["--triton", __file__], "is a file; name a folder for Triton's models"),
        (["-o", "x", "--triton-tensorrt"], "name its repository with --triton"),
        (
            ["-o", "x", "--triton-batch", "8"],
            "--triton-batch sets how Triton runs the model; name its repository",
        ),
        (
            ["--triton", "x", "--triton-tensorrt"],
            r"TensorRT builds an engine for one; name it with --image-size",
        ),
        (["--triton", "x", "--triton-tensorrt", "--precision", "int8"], "is not for TensorRT"),
    ],
)
def test_what_is_refused_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(export_command, [str(folder), *arguments])
    assert isinstance(done.exception, DinokitError)
    with pytest.raises(UsageError, match=words):
        raise done.exception
    assert not list(tmp_path.iterdir())
