"""The card of a model folder: what it says, that the Hub understands it, and that a person's words stay."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard, metadata_eval_result
from PIL import Image
from small_models import config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.card import (
    CardSettings,
    card_is_ours,
    card_problems,
    carry_over,
    draw_attention,
    draw_neighbours,
    keep_record,
    make_record,
    read_facts,
    record_of_run,
    render_card,
    write_card,
)
from dinokit.card import figures as drawing
from dinokit.card.training_section import knn_while_training
from dinokit.cli import cli
from dinokit.errors import ModelError, UsageError
from dinokit.export.hub import _name_repository, plan_push
from dinokit.loading.locate import starter_path
from dinokit.loading.zoo import ZOO
from dinokit.model_folder.architecture import TimmArchitecture
from dinokit.model_folder.config import BackboneConfig
from dinokit.model_folder.folder import ModelFolder, read_model_folder, write_model_folder

REPORT_OF_ONE = {
    "file": "onnx/model.onnx",
    "bytes": 2_500_000,
    "max_difference": 2e-6,
    "cosine_mean": 1.0,
    "cosine_p1": 1.0,
    "cosine_min": 0.999999,
    "labels": None,
    "images_per_second": 123.4,
    "speed_of": "batches of 8",
    "passed": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    return write_model_folder(tmp_path / "shoes", config_for(name="shoes"), random_weights(seed=1))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two runs, the second of which went on from the first."""
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    common = {"arch": "vit_tiny_patch16_224", "batch_size": 32, "lr": 4e-3, "knn_images": 500, "workers": 3}
    for path, extra, steps in (
        (first, {"epochs": 2}, 20),
        (second, {"epochs": 3, "init_from": str(first), "labelled": "/home/me/clothing/train"}, 30),
    ):
        path.mkdir(parents=True)
        (path / "recipe.yaml").write_text(yaml.safe_dump({**common, **extra}, sort_keys=False))
        lines: list[dict[str, Any]] = [
            {"step": step, "epoch": step / 10, "loss": 5 - step / 10, "images_per_s": 70 + step}
            for step in (10, steps)
        ]
        if "labelled" in extra:
            lines[0]["knn_teacher"], lines[0]["knn_student"] = 0.25, 0.24
            lines[1]["knn_teacher"], lines[1]["knn_student"] = 0.3125, 0.3
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / "metrics.jsonl").write_text(text + '{"step": 99, "lo')  # cut by a kill
    return second


def data_of(text: str) -> dict[str, Any]:
    values: dict[str, Any] = ModelCard(text).data.to_dict()
    return values


def text_of(folder: ModelFolder) -> str:
    return (folder.path / "README.md").read_text(encoding="utf-8")


# -- what it says


def test_a_new_folder_has_a_whole_card(folder: ModelFolder) -> None:
    text = text_of(folder)
    assert not list(card_problems(text, "apache-2.0"))
    data = data_of(text)
    assert (data["library_name"], data["pipeline_tag"]) == ("timm", "image-feature-extraction")
    assert data["license"] == "apache-2.0" and "license_name" not in data
    assert "transformers" in data["tags"] and "onnx" not in data["tags"]  # there is no ONNX file yet
    assert "# shoes\n" in text and "48 numbers per picture" in text
    params = sum(array.size for array in random_weights(seed=1).values())
    assert f"| parameters | {f'{params:,}' if params < 1e5 else f'{params / 1e6:.1f} million'} |" in text
    assert (
        "### transformers\n" in text and "### Transformers.js" not in text and "### ONNX Runtime" not in text
    )
    assert "How it was trained" not in text and "model-index" not in text
    assert card_is_ours(folder.path)


def test_what_is_not_known_is_not_claimed(folder: ModelFolder) -> None:
    facts = read_facts(folder)
    for source, known in [
        ("timm/resnet50.a1_in1k", False),
        ("timm/vit_small_patch16_224.dino", True),
        ("", False),
        ("dinosaurs/vit", False),
        ("/home/me/dinosaurs/vit", False),
    ]:
        text = render_card(replace(facts, config=replace(facts.config, source=source)))
        assert ("self-supervised" in data_of(text)["tags"], "unlabelled pictures" in text) == (
            known,
            known,
        ), source
    for name, known in [("dino_vits16", True), ("dino_deitsmall16_pretrain", True), ("dinosaurs", False)]:
        text = render_card(replace(facts, config=replace(facts.config, name=name)))
        assert ("self-supervised" in data_of(text)["tags"]) == known, name
    # a path of the machine does not leave it
    text = render_card(replace(facts, config=replace(facts.config, source="/home/me/dino.pth")))
    assert "/home/me" not in text and "| source | dino.pth |" in text


def test_names_are_no_markup(tmp_path: Path) -> None:
    text = text_of(write_model_folder(tmp_path / "m", config_for(name="<b>a*b"), random_weights()))
    assert "# \\<b>a\\*b\n" in text


def test_converted_weights_name_their_base(folder: ModelFolder) -> None:
    known = ZOO["dino_vits16"]
    facts = replace(read_facts(folder), config=replace(known.config, licence="apache-2.0"))
    text = render_card(facts)
    data = data_of(text)
    assert (data["base_model"], data["datasets"]) == (known.repo, ["imagenet-1k"])
    assert "74.5 % (facebookresearch/dino" in text and "not measured here" in text
    assert "eval_results" not in data  # published by others, not measured here


def test_a_network_of_another_kind(tmp_path: Path) -> None:
    config = BackboneConfig(
        name="r50",
        architecture=TimmArchitecture(embed_dim=2048, stride=32, image_size=(224, 224), token_dim=2048),
        timm_architecture="resnet50",
        source="timm/resnet50.a1_in1k",
    )
    folder = write_model_folder(tmp_path / "r50", config, {"w": np.zeros((3, 5), np.float32)})
    text = text_of(folder)
    assert "| parameters | 15 |" in text and "other sizes work too" in text and "blocks, heads" not in text
    assert "### timm" in text and "### transformers" not in text
    data = data_of(text)
    assert data["base_model"] == "timm/resnet50.a1_in1k" and data["tags"] == ["dinokit"]


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("mit", {"license": "mit"}),
        ("other", {"license": "other"}),
        ("house rules", {"license": "other", "license_name": "house rules"}),
        (
            "dinov3-license",
            {
                "license": "other",
                "license_name": "dinov3-license",
                "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
            },
        ),
    ],
)
def test_licences(folder: ModelFolder, licence: str, expected: dict[str, str]) -> None:
    text = render_card(replace(read_facts(folder), config=replace(folder.config, licence=licence)))
    data = data_of(text)
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected
    assert not list(card_problems(text, licence))
    if licence != "other":
        assert any("make them agree" in problem for problem in card_problems(text, "gpl-3.0"))


def test_code_only_for_what_can_load_it(folder: ModelFolder) -> None:
    facts = read_facts(folder)
    (folder.path / "onnx").mkdir()
    (folder.path / "onnx" / "model.onnx").write_bytes(b"")
    with_onnx = render_card(read_facts(folder))
    titles = [line for line in with_onnx.splitlines() if line.startswith("### ")]
    assert titles == [
        "### dinokit",
        "### timm",
        "### transformers",
        "### ONNX Runtime",
        "### Transformers.js",
    ]
    # at another size than its position embedding's, timm and transformers resize by rules of their own
    larger = replace(folder.config, preprocessing=folder.config.preprocessing.with_image_size(64))
    text = render_card(replace(facts, config=larger))
    assert "### timm" not in text and "### transformers" not in text and "### dinokit" in text


def test_the_onnx_files_of_these_weights(folder: ModelFolder) -> None:
    report = {
        "weights_sha256": folder.weights_sha256,
        "photographs": ["a.jpg", "b.jpg"],
        "variants": [REPORT_OF_ONE],
        "machine": {"processor": "Fast  9000", "cpu_count": 4},
    }
    assert write_card(folder.path, report=report) == "written"
    text = text_of(folder)
    assert "| `onnx/model.onnx` | 2.5 MB | 2.0e-06 |" in text and "| 123 |" in text
    assert "batches of 8 (Fast 9000, 4 processors)." in text
    assert write_card(folder.path, report={**report, "weights_sha256": "of others"}) == "written"
    assert "ONNX files" not in text_of(folder)


@pytest.mark.parametrize(
    "damage",
    [
        {"variants": [{}]},
        {"variants": 3},
        {"variants": [{**REPORT_OF_ONE, "bytes": "x"}]},
        {"variants": [{**REPORT_OF_ONE, "labels": 3}]},
        {"photographs": None},
    ],
)
def test_a_damaged_report_is_left_out(folder: ModelFolder, damage: dict[str, Any]) -> None:
    report = {
        "weights_sha256": folder.weights_sha256,
        "photographs": ["a.jpg"],
        "variants": [REPORT_OF_ONE],
        **damage,
    }
    (folder.path / "export_report.json").write_text(json.dumps(report))
    assert write_card(folder.path) == "written"
    assert "ONNX files" not in text_of(folder)


# -- how it was trained


@pytest.mark.parametrize(
    ("taught_by", "sentence", "column"),
    [
        (None, "are those of the teacher.", "| epoch | teacher | student |"),
        (
            "large",
            "are those of the student's moving average.",
            "| epoch | moving average | student |",
        ),
    ],
)
def test_whose_k_nn_it_is(taught_by: str | None, sentence: str, column: str) -> None:
    run = {
        "recipe": {"distill_from": taught_by},
        "knn": [{"epoch": 1, "knn_teacher": 0.5, "knn_student": 0.4}],
    }
    text = "\n".join(knn_while_training(run))
    assert sentence in text and column in text


def test_the_record_of_two_runs(folder: ModelFolder, run: Path) -> None:
    runs = record_of_run(run, n_images=700)
    assert [(entry["name"], entry["step"]) for entry in runs] == [("first", 20), ("second", 30)]
    assert "/home/me" not in json.dumps(runs) and "workers" not in runs[1]["recipe"]
    assert [line["knn_teacher"] for line in runs[1]["knn"]] == [0.25, 0.3125]
    assert (runs[1]["labelled"], runs[1]["metrics"]) == ("clothing", {"loss": 2.0})
    assert [entry["step"] for entry in record_of_run(run, step=10)] == [20, 10]  # a run that went on beyond
    run.parent.rename(run.parent.with_name("moved"))  # both together
    assert len(record_of_run(run.parent.with_name("moved") / "second")) == 2

    keep_record(folder, make_record(runs))
    write_card(folder.path)
    text = text_of(folder)
    assert "in 2 runs, each starting from the weights of the one before" in text
    assert (
        "|  | first | second |" in text
        and "| `epochs` | 2 | 3 |" in text
        and "| pictures seen | 640 | 960 |" in text
    )
    assert "learned from 700 pictures" in text and "| 3 | 31.2 % | 30.0 % |" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["epochs"] == 3
    # model-index, against the Hub client's own
    theirs = metadata_eval_result(
        model_pretty_name="shoes",
        task_pretty_name="classification with frozen features",
        task_id="image-classification",
        metrics_pretty_name="k-NN top-1 (k=20, T=0.07, leave-one-out), %",
        metrics_id="accuracy",
        metrics_value=31.25,
        dataset_pretty_name="clothing",
        dataset_id="clothing",
    )
    del theirs["model-index"][0]["results"][0]["metrics"][0]["verified"]  # False; the Hub's to say
    assert yaml.safe_load(text.split("---\n")[1])["model-index"] == theirs["model-index"]
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_value, result.dataset_name) == (31.25, "clothing")


@pytest.mark.parametrize(
    ("parts", "method"),
    [
        ({}, "DINO"),
        ({"target_normalisation": "sinkhorn"}, "DINO"),
        ({"ibot_weight": 0.0}, "DINO"),
        ({"ibot_weight": 1.0, "koleo_weight": 0.1}, "iBOT"),
        ({"target_normalisation": "sinkhorn", "teacher": "student"}, "SwAV"),
        ({"loss": "squared_error", "predictor": True}, "BYOL"),
        ({"loss": "info_nce"}, "MoCo"),
    ],
)
def test_methods_have_their_names(folder: ModelFolder, run: Path, parts: dict[str, Any], method: str) -> None:
    runs = record_of_run(run)
    runs[-1]["recipe"] |= parts
    keep_record(folder, make_record(runs))
    write_card(folder.path)
    assert f"self-supervised with {method} ([" in text_of(folder)
    assert method.lower() in data_of(text_of(folder))["tags"]


def test_that_attention_was_taught_is_said(folder: ModelFolder, run: Path) -> None:
    runs = record_of_run(run)
    keep_record(folder, make_record(runs))
    write_card(folder.path)
    assert "foreground_weight" not in text_of(folder)
    runs[-1]["recipe"]["foreground_weight"] = 1.0
    keep_record(folder, make_record(runs))
    write_card(folder.path)
    assert "whose colours differ from the border of the picture" in text_of(folder)
    assert re.search(r"`foreground_weight` .*\b1\b", text_of(folder))


def test_the_record_belongs_to_the_weights(folder: ModelFolder, run: Path, tmp_path: Path) -> None:
    record = make_record(record_of_run(run))
    trained = write_model_folder(folder.path, folder.config, random_weights(seed=2), record=record)
    assert "How it was trained" in text_of(trained)
    copy = write_model_folder(tmp_path / "copy", folder.config, random_weights(seed=2))
    carry_over(trained.path, copy.path)
    write_card(copy.path)
    assert "How it was trained" in text_of(copy)
    other = write_model_folder(tmp_path / "other", folder.config, random_weights(seed=3))
    carry_over(trained.path, other.path)
    assert not (other.path / "training.json").exists()
    # weights that are trained no more by that run
    again = write_model_folder(folder.path, folder.config, random_weights(seed=4))
    assert "How it was trained" not in text_of(again) and not (folder.path / "training.json").exists()


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a training run \(no recipe.yaml\)"):
        record_of_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [1")
    with pytest.raises(ModelError, match="cannot be read: it is not valid YAML"):
        record_of_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"init_from: {tmp_path}\nbatch_size: 8\n")  # of itself
    assert len(record_of_run(tmp_path)) <= 2
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "recipe.yaml").write_text(f"init_from: {tmp_path}\n")
    assert len(record_of_run(tmp_path / "later")) > 1
    (tmp_path / "recipe.yaml").write_text("a: [1")  # an earlier run that was damaged since
    assert len(record_of_run(tmp_path / "later")) == 1


def test_what_dinokit_eval_measured(folder: ModelFolder, run: Path, tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "b/3.png"):
        place = tmp_path / "fruit" / "train" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        picture(60, 50, seed=ord(name[0])).save(place)
    arguments = [
        "eval",
        "--reference",
        str(tmp_path / "fruit" / "train"),
        "-m",
        str(folder.path),
        "-k",
        "1,3",
        "-q",
    ]
    scores = tmp_path / "scores.json"
    done = CliRunner().invoke(cli, [*arguments, "--no-linear", "--json"])
    scores.write_text(done.stdout)
    told = json.loads(done.stdout)["results"]
    assert invoke(folder.path, "--no-figures", "--measured", scores).exit_code == 0
    text = text_of(folder)
    share = told[0]["knn"][-1]["top1"]
    cell = f"{100 * share['value']:.1f} % ({100 * share['low']:.1f} – {100 * share['high']:.1f}) (k = 3)"
    assert f"| fruit, 2 classes | 6 / 6, leave-one-out | {cell} | – |" in text
    (result,) = ModelCard(text).data.eval_results
    assert (result.dataset_name, result.metric_name) == (
        "fruit",
        "k-NN top-1 (k=3, T=0.07, leave-one-out), %",
    )
    assert result.metric_value == round(100 * share["value"], 2)
    assert str(tmp_path) not in (folder.path / "evaluation.json").read_text()
    # once more: in its place; and beside what training measured on another set
    keep_record(folder, make_record(record_of_run(run)))
    assert invoke(folder.path, "--no-figures", "--measured", scores).exit_code == 0
    assert [found.dataset_name for found in ModelCard(text_of(folder)).data.eval_results] == [
        "fruit",
        "clothing",
    ]

    other = write_model_folder(tmp_path / "other", folder.config, random_weights(seed=8))
    refused = invoke(other.path, "--no-figures", "--measured", scores)
    assert refused.exit_code == 2 and "has no scores of the model in" in refused.stderr
    scores.write_text("{}")
    refused = invoke(folder.path, "--no-figures", "--measured", scores)
    assert (
        refused.exit_code == 3
        and "is not the output of `dinokit eval --json`: it lacks results" in refused.stderr
    )
    head = dict.fromkeys(
        ("reference", "protocol", "references", "judged", "classes", "temperature", "dinokit"), 1
    )
    for damaged in ([3], 3, None, [{"weights_sha256": folder.weights_sha256}]):
        scores.write_text(json.dumps({**head, "results": damaged}))
        refused = invoke(folder.path, "--no-figures", "--measured", scores)
        assert refused.exit_code in (2, 3) and "Error: " in refused.stderr, refused.output
    write_model_folder(folder.path, folder.config, random_weights(seed=4))
    assert not (folder.path / "evaluation.json").exists() and "## Results" not in text_of(folder)


# -- whose words they are


def test_a_person_s_words_stay(folder: ModelFolder) -> None:
    card = folder.path / "README.md"
    card.write_text(text_of(folder) + "\nMine.\n")
    before = card.read_bytes()
    assert write_card(folder.path) == "kept"
    assert card.read_bytes() == before
    assert write_card(folder.path, overwrite=True) == "written"
    assert "\nMine." not in text_of(folder) and write_card(folder.path) == "written"


def test_words_that_were_handed_in_keep_their_place(tmp_path: Path) -> None:
    given = "---\nlicense: mit\n---\n\n# Told by hand\n"
    folder = write_model_folder(tmp_path / "m", config_for(), random_weights(), card=given)
    report = {"weights_sha256": folder.weights_sha256, "photographs": [], "variants": [REPORT_OF_ONE]}
    for _ in range(2):
        assert write_card(folder.path, report=report) == "section"
        assert text_of(folder).startswith(given) and text_of(folder).count("## ONNX files") == 1
    assert write_card(folder.path) == "section"
    assert text_of(folder) == given


def test_settings_stay_with_the_card(folder: ModelFolder) -> None:
    settings = CardSettings(repo="me/shoes", datasets=("me/pictures",))
    write_card(folder.path, settings=settings)
    assert CardSettings.of(text_of(folder)) == settings
    assert 'load_backbone("me/shoes")' in text_of(folder) and data_of(text_of(folder))["datasets"] == [
        "me/pictures"
    ]
    write_card(folder.path)
    write_model_folder(folder.path, folder.config, random_weights(seed=5))
    assert CardSettings.of(text_of(folder)) == settings
    assert CardSettings.of("<!-- dinokit card [] -->") is None


def test_a_push_names_the_repository_in_the_code(folder: ModelFolder) -> None:
    assert _name_repository(plan_push(folder.path, "me/shoes"))
    assert 'hf-hub:me/shoes"' in text_of(folder) and card_is_ours(folder.path)
    assert not _name_repository(plan_push(folder.path, "me/shoes"))
    edited = text_of(folder) + "\nMine.\n"
    (folder.path / "README.md").write_text(edited)
    assert not _name_repository(plan_push(folder.path, "me/boots")) and text_of(folder) == edited


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("library_name: timm", "library_name: 3", "library_name 3; expected a library's name"),
        ("license: apache-2.0", "license: [", "the YAML front matter of README.md cannot be read"),
        ("tags:", "model-index: 3\ntags:", "the YAML front matter of README.md cannot be read"),
        ("---\n", "", "does not begin with YAML between two lines ---"),
    ],
)
def test_what_the_hub_would_not_understand(folder: ModelFolder, old: str, new: str, message: str) -> None:
    text = text_of(folder).replace(old, new)
    assert any(message in problem for problem in card_problems(text, "apache-2.0"))


# -- figures


def test_the_attention_figure(folder: ModelFolder, tmp_path: Path) -> None:
    backbone = load_backbone(folder.path, device="cpu")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for number in range(7):
        picture(90, 70, seed=number).save(tmp_path / f"{number}.png")
    photos = [tmp_path / "broken.jpg", *(tmp_path / f"{number}.png" for number in range(7))]
    figure = draw_attention(folder.path, backbone, photos)
    assert [Path(path).name for path, _ in figure.failures] == ["broken.jpg"]
    assert figure.left_out == 1 and figure.file.stat().st_size <= 300_000
    with Image.open(figure.file) as drawn:
        assert drawn.width == 860 and drawn.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    write_card(folder.path)
    text = text_of(folder)
    assert "![What the model looks at](figures/attention.png)" in text and "CC0" not in text
    # figures of other weights go, and so does what shows them
    write_model_folder(folder.path, folder.config, random_weights(seed=9))
    assert not (folder.path / "figures").exists() and "figures/" not in text_of(folder)


def test_a_person_s_card_keeps_the_figures_it_shows(folder: ModelFolder, tmp_path: Path) -> None:
    picture(90, 70).save(tmp_path / "a.png")
    figure = draw_attention(folder.path, load_backbone(folder.path, device="cpu"), [tmp_path / "a.png"]).file
    write_card(folder.path)
    (folder.path / "README.md").write_text(text_of(folder) + "\nMine.\n")
    write_model_folder(folder.path, folder.config, random_weights(seed=9))
    assert "figures/attention.png" in text_of(folder) and figure.is_file()


def test_every_number_of_heads_fits(folder: ModelFolder) -> None:
    shown = [picture(64, 64, seed=0)]
    rng = np.random.default_rng(0)
    for n_heads in (1, 3, 6, 7, 12, 16, 17, 24, 32):
        maps = rng.random((1, n_heads, 4, 4)).astype(np.float32)
        drawn = np.asarray(drawing._attention_picture(shown, maps, title="t"))
        margins = [drawn[:, :14], drawn[:, -10:], drawn[-12:]]
        assert all((margin == 255).all() for margin in margins), n_heads
    with pytest.raises(UsageError, match="r50 has no attention to draw"):
        draw_attention(folder.path, SimpleNamespace(num_heads=0, name="r50"))  # type: ignore[arg-type]


def test_the_neighbours_are_the_nearest(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(folder.path, device="cpu")
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(40, 5)).astype(np.float32)
    vectors[7] = np.nan  # could not be read
    pictures = [picture(40, 40, seed=number) for number in range(40)]
    rows: list[Sequence[Sequence[drawing.Tile]]] = []
    original = drawing._neighbour_picture

    def spy(drawn: Sequence[Sequence[drawing.Tile]], *, title: str) -> Image.Image:
        rows.append(drawn)
        return original(drawn, title=title)

    monkeypatch.setattr(drawing, "_neighbour_picture", spy)
    labels = [str(number) for number in range(40)]
    figure = draw_neighbours(folder.path, backbone, pictures, vectors, labels=labels)
    assert figure.entry["pictures"] == 39
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for (_, own, _), *others in rows[0]:
        cosines = unit @ unit[int(own or 0)]
        cosines[[7, int(own or 0)]] = -2
        expected = np.argsort(-cosines)[:6]
        assert [label for _, label, _ in others] == [str(number) for number in expected]
        np.testing.assert_allclose([cosine for *_, cosine in others], cosines[expected], atol=1e-6)
    with pytest.raises(UsageError, match="1 of 2 photographs can be used"):
        draw_neighbours(folder.path, backbone, pictures[6:8], vectors[6:8])


# -- the command


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli, ["card", *map(str, arguments)])


def test_the_command(folder: ModelFolder, run: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        picture(60, 50, seed=len(name)).save(photos / name)
    (photos / "b" / "broken.jpg").write_bytes(b"no picture")
    done = invoke(
        folder.path, "--neighbours", photos, "--run", run, "--repo", "me/shoes", "--dataset", "me/a", "--json"
    )
    assert done.exit_code == 1, done.output  # a picture could not be read, and is listed
    assert "broken.jpg" in done.stderr
    said = json.loads(done.stdout)
    assert said["card_is"] == "written" and [Path(f["file"]).name for f in said["figures"]] == [
        "attention.png",
        "neighbours.png",
    ]
    text = text_of(folder)
    assert (
        "figures/attention.png" in text
        and "figures/neighbours.png" in text
        and "CC0 or in the public" in text
    )
    assert "How it was trained" in text and data_of(text)["datasets"] == ["me/a"] and '"me/shoes"' in text
    assert not list(card_problems(text, "apache-2.0")) and card_is_ours(folder.path)
    read_model_folder(folder.path)

    elsewhere = invoke(folder.path, "--no-figures", "-o", tmp_path / "out")
    assert elsewhere.exit_code == 0, elsewhere.output
    assert "How it was trained" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    (folder.path / "README.md").write_text("mine\n")
    kept = invoke(folder.path, "--no-figures")
    assert (kept.exit_code, kept.stdout, text_of(folder)) == (3, "", "mine\n")
    assert "was edited by hand and is kept" in kept.stderr and "Wrote" not in kept.stderr
    assert invoke(folder.path, "--no-figures", "--overwrite-card", "-q").exit_code == 0
    assert text_of(folder).startswith("---\nlibrary_name")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "nowhere does not exist; a card belongs to a model folder"),
        (
            ["dino_vits16"],
            2,
            "is a model on the Hub; a card belongs to a model folder. Write one with `dinokit export",
        ),
        (["EMPTY"], 2, "is not a model folder"),
        (["FOLDER", "--repo", "shoes"], 2, "--repo 'shoes' does not name its owner"),
        (["FOLDER", "--repo", "a/b/c"], 2, "--repo 'a/b/c' is not a valid repository name"),
        (["FOLDER", "--photos", "nowhere.jpg"], 2, "no photographs found"),
        (["FOLDER", "--no-figures", "--photos", "a.jpg"], 2, "contradicts"),
        (["FOLDER", "--run", "EMPTY"], 3, "is not a training run"),
        (["FOLDER", "--figure"], 2, "No such option"),
    ],
)
def test_what_stands_in_the_way(
    folder: ModelFolder, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    before = text_of(folder)
    places = {"FOLDER": str(folder.path), "EMPTY": str(tmp_path / "empty")}
    done = invoke(*(places.get(word, word) for word in arguments))
    assert done.exit_code == code and message in " ".join(done.stderr.split()), done.output
    assert text_of(folder) == before


@pytest.mark.parametrize(
    ("name", "repo"), [("me/shoes", "me/shoes"), ("my shoes", "user/my-shoes"), ("a/b/c", "user/a-b-c")]
)
def test_the_code_names_the_model(tmp_path: Path, name: str, repo: str) -> None:
    folder = write_model_folder(tmp_path / "m", replace(config_for(), name=name), random_weights())
    assert f'load_backbone("{repo}")' in text_of(folder)


def test_the_bundled_model_keeps_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundled = starter_path()
    before = {path: path.read_bytes() for path in bundled.rglob("*") if path.is_file()}
    refused = CliRunner().invoke(cli, ["card", "starter"])
    assert refused.exit_code == 2 and "give -o FOLDER" in refused.output
    assert CliRunner().invoke(cli, ["card", "starter", "--no-figures", "-o", "mine"]).exit_code == 0
    assert (tmp_path / "mine" / "README.md").is_file()
    assert {path: path.read_bytes() for path in bundled.rglob("*") if path.is_file()} == before


def test_a_damaged_folder_says_so(folder: ModelFolder) -> None:
    (folder.path / "training.json").write_text("{")
    (folder.path / "figures").mkdir()
    (folder.path / "figures" / "figures.json").write_text('{"attention": 3}')
    (folder.path / "export_report.json").write_text("[]")
    assert write_card(folder.path) == "written"
    shutil.copy(folder.path / "config.json", folder.path / "timm.safetensors")
    with pytest.raises(ModelError, match="not a safetensors file"):
        write_card(folder.path)


def test_record_and_figures_of_old_weights_leave_the_hub(folder: ModelFolder) -> None:
    from dinokit.export.hub import _outdated

    there = ["README.md", "training.json", "figures/attention.png", "figures/mine.png", "onnx/model.onnx"]
    api: Any = SimpleNamespace(list_repo_files=lambda *_, **__: there)
    plan = plan_push(folder.path, "me/shoes")
    gone = ("training.json", "figures/attention.png", "onnx/model.onnx")
    assert _outdated(api, plan, None, figures=True) == gone
    # a card that a person edited may show the figures still
    assert _outdated(api, plan, None, figures=False) == ("training.json", "onnx/model.onnx")
