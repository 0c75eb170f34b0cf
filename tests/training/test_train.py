"""Whole runs on CPU: the folder that comes out, going on, Ctrl-C, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from tiny_runs import RECIPE, TINY, tiny_options, weights

from dinokit import load_backbone
from dinokit.cli import cli
from dinokit.errors import DinokitError, TrainingError, UsageError
from dinokit.training import trainer
from dinokit.training.adapt import adapt
from dinokit.training.monitoring.step_metrics import stop_unless_finite
from dinokit.training.recipe import bundled_recipes, load_recipe, save_recipe, with_overrides
from dinokit.training.run import checkpoint
from dinokit.training.trainer import TrainingState, train


def test_a_run_leaves_a_model_folder_that_both_engines_load(tmp_path: Path, photos: Path) -> None:
    state = train([photos], tmp_path / "run", RECIPE)
    assert state.step == state.n_steps == 4
    run = tmp_path / "run"
    assert load_recipe(run / "recipe.yaml") == state.recipe
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(line["teacher_entropy"] + line["kl"])
        assert 0 < line["teacher_entropy"] <= np.log(16) + 1e-5

    # What was written is the teacher, and training's own network agrees with what users load.
    onnx, plain = load_backbone(str(run), engine="onnx"), load_backbone(str(run), engine="torch")
    picture = photos / "chelsea.jpg"
    features = onnx.embed(picture)
    np.testing.assert_allclose(features, plain.embed(picture), atol=1e-5)
    assert onnx.image_size == (32, 32)
    pixels = onnx.transform(picture)
    with torch.no_grad():
        teacher = state.teacher.backbone.eval()(torch.from_numpy(pixels)[None])[0].numpy()
    np.testing.assert_allclose(features, teacher, atol=1e-5)


def test_the_student_learns_and_the_teacher_follows(tmp_path: Path, photos: Path) -> None:
    start = train([photos], tmp_path / "start", replace(RECIPE, lr=0.0, min_lr=0.0))
    end = train([photos], tmp_path / "end", replace(RECIPE, lr=0.1))
    before, after = start.teacher.backbone.state_dict(), end.teacher.backbone.state_dict()
    student = end.student.backbone.state_dict()
    name = "blocks.1.mlp.fc1.weight"
    moved, far = (after[name] - before[name]).norm(), (student[name] - before[name]).norm()
    assert 0 < moved < far


def test_a_run_cut_short_ends_with_the_same_weights(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train([photos], tmp_path / "whole", RECIPE)

    class Killed(Exception):
        pass

    class KilledAfterThree:
        def told(self, *_: Any) -> None: ...
        def started(self, *_: Any) -> None: ...
        def saved(self, *_: Any) -> None: ...
        def warned(self, *_: Any) -> None: ...
        def stepped(self, state: TrainingState, *_: Any) -> None:
            if state.step == 3:
                raise Killed

    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        train([photos], cut, RECIPE, observer=KilledAfterThree())
    assert [p.name for p in checkpoint.checkpoints(cut / "checkpoint")] == ["step-0000000002.pt"]
    torch.manual_seed(99)  # the state of the generator must come from the checkpoint
    resumed = train([photos], cut, RECIPE)

    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert torch.equal(whole.targets.center, resumed.targets.center)

    def metrics(run: Path) -> list[Any]:
        # without the timings
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in lines]

    assert metrics(cut) == metrics(tmp_path / "whole")


def test_a_run_can_begin_with_another_ones_weights(tmp_path: Path, photos: Path) -> None:
    first = train([photos], tmp_path / "first", RECIPE)
    still = replace(RECIPE, lr=0.0, min_lr=0.0, init_from=str(tmp_path / "first"), teacher_momentum=1.0)
    second = train([photos], tmp_path / "second", still)
    assert second.step == 4  # schedules of its own
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name
    # At another size of crops too: the position embedding belongs to image_size_px.
    larger = replace(RECIPE, global_crop_px=48, image_size_px=32, init_from=str(tmp_path / "first"))
    assert train([photos], tmp_path / "larger", larger).step == 4
    assert load_backbone(str(tmp_path / "larger")).image_size == (32, 32)

    with pytest.raises(
        UsageError, match=r"last_layer.weight_\w of the student is \(16, \d\) there and \(8, "
    ):
        train([photos], tmp_path / "other", replace(still, n_prototypes=8))
    with pytest.raises(UsageError, match="has no checkpoint"):
        train([photos], tmp_path / "none", replace(RECIPE, init_from=str(tmp_path)))


def test_a_run_of_other_channels_says_so_and_leaves_no_folder(tmp_path: Path, photos: Path) -> None:
    train([photos], tmp_path / "grey", with_overrides(RECIPE, ["channels=1"]))
    recipe = with_overrides(RECIPE, [f"init_from={tmp_path / 'grey'}"])
    with pytest.raises(UsageError, match=r"1 tensor in all\)\. Use its settings: --set channels=1"):
        train([photos], tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_was_there_stays_when_the_run_is_refused(tmp_path: Path, photos: Path) -> None:
    recipe = with_overrides(RECIPE, [f"init_from={tmp_path}"])
    (tmp_path / "run").mkdir()
    save_recipe(adapt(recipe, 5)[0], tmp_path / "run" / "recipe.yaml")
    with pytest.raises(DinokitError):
        train([photos], tmp_path / "run", recipe)
    assert (tmp_path / "run" / "recipe.yaml").is_file()


def test_a_finished_run_stays_as_it_is(tmp_path: Path, photos: Path) -> None:
    first = train([photos], tmp_path / "run", RECIPE)
    again = train([photos], tmp_path / "run", RECIPE)
    assert again.step == first.step
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(first).items())


def test_a_last_save_that_was_broken_off_is_made_up_for(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = trainer.write_teacher

    def broken_off(run: Path, teacher: Any, recipe: Any, step: int, n_steps: int, n_images: int) -> Path:
        if step == n_steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(run, teacher, recipe, step, n_steps, n_images)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_teacher", broken_off)
        with pytest.raises(TrainingError, match=r"resumes from the last save, after step 4\b"):
            train([photos], run, RECIPE)
    state = train([photos], run, RECIPE)
    assert state.step == state.n_steps == 4
    found = load_backbone(run / "model", engine="torch").module.state_dict()
    assert torch.equal(found["norm.weight"], state.teacher.backbone.norm.weight)
    # Once; what somebody changed in it since stays.
    (run / "model" / "README.md").write_text("mine")
    train([photos], run, RECIPE)
    assert (run / "model" / "README.md").read_text() == "mine"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, step, {"step": step, "x": torch.ones(3)})
    newest = tmp_path / "step-0000000002.pt"
    newest.write_bytes(newest.read_bytes()[:200])
    state, warnings = checkpoint.load_newest(tmp_path)
    assert state is not None and state["step"] == 1
    assert len(warnings) == 1 and "step-0000000002.pt is damaged" in warnings[0]
    (tmp_path / "step-0000000001.pt").write_bytes(b"")
    with pytest.raises(TrainingError, match="none of the 2 checkpoints"):
        checkpoint.load_newest(tmp_path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save_checkpoint(tmp_path, 1, {"step": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*run the same command again"):
        checkpoint.save_checkpoint(tmp_path, 2, {"step": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000000001.pt"]


def test_checkpoints_are_kept_in_the_number_asked_for(tmp_path: Path) -> None:
    for step in range(1, 5):
        checkpoint.save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    assert [p.name[-4:-3] for p in checkpoint.checkpoints(tmp_path)] == ["2", "3", "4"]


def test_checkpoints_hold_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch " + str(tmp_path / "run"),)

    torch.save({"step": 1, "x": Evil()}, tmp_path / "step-0000000001.pt")
    with pytest.raises(TrainingError, match="none of the 1 checkpoints"):
        checkpoint.load_newest(tmp_path)
    assert not (tmp_path / "run").exists()


def test_another_recipe_is_refused_in_the_same_folder(tmp_path: Path, photos: Path) -> None:
    train([photos], tmp_path / "run", RECIPE)
    with pytest.raises(UsageError, match=r"another recipe \(lr: 0.0005 there, 0.1 now\)"):
        train([photos], tmp_path / "run", replace(RECIPE, lr=0.1))
    with pytest.raises(UsageError, match="holds a run on 5 pictures, but 10 are given now"):
        train([photos, photos], tmp_path / "run", RECIPE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="neither empty nor a training run"):
        train([photos], tmp_path / "mine", RECIPE)


def test_a_run_folder_among_the_photos_gives_no_pictures(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(photos, tmp_path / "photos"))
    Path("linked").symlink_to("run")
    for _ in range(2):
        assert train(["."], "run", RECIPE).step == 4
    assert list(Path("run/attention").glob("*.jpg"))
    assert "# 5 pictures: few" in run_cli(".", "--explain", "-o", "run", *tiny_options()).stdout
    with pytest.raises(UsageError, match="no pictures in run; expected"):
        train(["run"], "run", RECIPE)
    for other in ((), ("-o", "second")):  # nor to another run
        assert "# 5 pictures: few" in run_cli(".", "--explain", *other, *tiny_options()).stdout


class Listening:
    """An observer that remembers what it was warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, message: str) -> None:
        self.warnings.append(message)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_other_pictures_of_the_same_number_are_told_of(tmp_path: Path, photos: Path) -> None:
    train([photos], tmp_path / "run", RECIPE)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in photos.glob("*.jpg"):
        shutil.copy(path, moved / path.name)
    same, other = Listening(), Listening()
    train([moved], tmp_path / "run", RECIPE, observer=same)
    assert not same.warnings
    (moved / "rocket.jpg").rename(moved / "sputnik.jpg")
    train([moved], tmp_path / "run", RECIPE, observer=other)
    assert len(other.warnings) == 1 and "begun with pictures of other names" in other.warnings[0]


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.training_step

    def diverges(state: TrainingState, *crops: Any, **more: Any) -> Any:
        result = step(state, *crops, **more)
        return replace(result, loss=result.loss * float("nan")) if state.step == 3 else result

    monkeypatch.setattr(trainer, "training_step", diverges)
    with pytest.raises(TrainingError, match=r"nan at step 3.*last good checkpoint is .*step-0000000002.pt"):
        train([photos], tmp_path / "run", RECIPE)


def test_weights_ruined_by_a_gradient_are_not_saved(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.training_step

    def ruined(state: TrainingState, *crops: Any, **more: Any) -> Any:
        weight = state.student.backbone.patch_embed.proj.weight
        handle = weight.register_hook(lambda grad: grad * float("nan")) if state.step == 3 else None
        result = step(state, *crops, **more)
        if handle is not None:
            handle.remove()
        return result

    monkeypatch.setattr(trainer, "training_step", ruined)
    with pytest.raises(
        TrainingError, match=r"gradient is not finite at step 4.*checkpoint is .*step-0000000002.pt"
    ):
        train([photos], tmp_path / "run", RECIPE)
    assert "epochs, 3 steps" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    monkeypatch.undo()
    assert train([photos], tmp_path / "run", RECIPE).step == 4


def test_a_loss_that_is_not_finite_names_what_helps_in_this_precision(tmp_path: Path) -> None:
    metrics = {"loss": float("nan"), "step": 3}
    for dtype, advice in (
        (torch.float32, "Lower lr: changed"),
        (torch.bfloat16, "Lower lr or train with --set precision=fp32: changed"),
    ):
        with pytest.raises(
            TrainingError, match=rf"{advice} settings are another run, which needs another -o"
        ):
            stop_unless_finite(metrics, tmp_path, dtype)


def run_cli(*args: Any) -> Any:
    return CliRunner().invoke(cli, ["train", *map(str, args)])


def test_the_command_trains_and_says_where_the_model_is(tmp_path: Path, photos: Path) -> None:
    run = tmp_path / "run"
    result = run_cli(photos, "-o", run, *tiny_options())
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{run / 'model'}\n"
    assert "5 pictures: 2 epochs of 2 steps" in result.stderr
    assert "teacher_momentum = 0.99 (" in result.stderr
    again = run_cli(photos, "-o", run, "--json", *tiny_options())
    assert "This run is finished: all 4 steps are done." in again.stderr
    told = json.loads(again.stdout)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert told["step"] == 4 and told["loss"] == last["loss"] and told["kl"] == last["kl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "epoch=3"], "unknown key 'epoch'; did you mean 'epochs'?"),
        (
            ["--set", "freeze=3"],
            "unknown key 'freeze'; did you mean 'freeze_last_layer_epochs' or 'freeze_backbone_epochs'?",
        ),
        (["--set", "epochs"], "has no '='"),
        (["--set", "epochs=many"], "epochs='many' must be a whole number"),
        (["--set", "global_crop_px=100"], "not a multiple of patch_size=16; use 96 or 112"),
        (["--set", "teacher_temp=0"], "teacher_temp=0.0 must be above 0"),
        (["--set", "global_crops_scale=0.4"], "must be two numbers"),
        (["--set", "optimizer=adam"], "use one of adamw, sgd, lars"),
        (["--set", "arch=vgg11"], "Set drop_path_rate=0 if that is what it does not know"),
        (["--set", "arch=vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'"),
        (["--recipe", "smok"], "Did you mean 'smoke'?"),
        (["--set", "device=cuda:7"], "finds 0 CUDA devices"),
    ],
)
def test_mistakes_get_an_answer_to_act_on(
    tmp_path: Path, photos: Path, options: list[str], message: str
) -> None:
    if "cuda" in str(options) and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    result = run_cli(photos, "-o", tmp_path / "run", *tiny_options(), *options)
    assert message in result.stderr
    assert result.exit_code in (2, 3) and "Traceback" not in result.output


def test_folders_without_readable_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run_cli(tmp_path / "empty", "-o", tmp_path / "run", *tiny_options())
    assert result.exit_code == 2 and str(tmp_path / "empty") in result.stderr
    bad = tmp_path / "bad"
    bad.mkdir()
    for i in range(3):
        (bad / f"{i}.jpg").write_text("not a picture")
    result = run_cli(bad, "-o", tmp_path / "run", *tiny_options())
    assert result.exit_code == 3 and "can be read; the reason for one:" in result.stderr
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "checkpoint").exists()


def test_a_start_that_came_to_nothing_does_not_hold_the_folder(tmp_path: Path, photos: Path) -> None:
    run = tmp_path / "run"
    assert run_cli(photos, "-o", run, *tiny_options(), "--set", "arch=vgg11").exit_code == 2
    assert run_cli(photos, "-o", run, *tiny_options()).exit_code == 0


def test_explain_prints_the_whole_recipe_with_reasons(photos: Path) -> None:
    result = run_cli(photos, "--explain")
    assert result.exit_code == 0
    assert "n_prototypes: 2048" in result.stdout and "# 5 pictures: 2048 prototypes" in result.stdout
    assert "mean: [0.485, 0.456, 0.406]" in result.stdout and "std: [0.229, 0.224, 0.225]" in result.stdout
    told = run_cli(photos, "--explain", "--set", "mean=auto", "--set", "std=[0.2, 0.2, 0.2]").stdout
    line = next(line for line in told.splitlines() if line.startswith("mean: "))
    assert line.split() == ["mean:", "auto", "#", "measured", "before", "the", "first", "step"]
    assert "std: [0.2, 0.2, 0.2]\n" in told
    result = run_cli(photos, *tiny_options())
    assert result.exit_code == 2 and "name a run folder: -o runs/mine" in result.stderr


def test_what_explain_prints_is_a_recipe(tmp_path: Path, photos: Path) -> None:
    words = [
        "distill_from=[starter, hog]",
        "loss=relations",
        'distill_pictures=[null, "*/p: #1/*"]',
        "epochs=10",
    ]
    words += [
        "global_crop_px=[32, 48]",
        "image_size_px=64",
        "warmup_epochs=9",
        "min_lr=1e-6",
        "n_prototypes=null",
    ]
    options = [part for word in words for part in ("--set", word)]
    (tmp_path / "p: #1").mkdir()
    shutil.copy(photos / "coffee.jpg", tmp_path / "p: #1")
    first = run_cli(photos, tmp_path / "p: #1", "--explain", *tiny_options(), *options)
    assert first.exit_code == 0, first.output
    (tmp_path / "ex.yaml").write_text(first.stdout)
    expected, _ = adapt(with_overrides(load_recipe("default"), [*TINY, *words]), 6, teacher_dim=192 + 900)
    assert replace(load_recipe(tmp_path / "ex.yaml"), mean=None, std=None) == expected
    again = run_cli(photos, tmp_path / "p: #1", "--explain", "--recipe", tmp_path / "ex.yaml")
    assert [line.partition(" # ")[0].strip() for line in again.stdout.splitlines()] == [
        line.partition(" # ")[0].strip() for line in first.stdout.splitlines()
    ]


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        ("device=tpu", 2, "device='tpu' is not known to the torch engine"),
        (
            "device=cuda:7",
            0,
            "Warning: device='cuda:7' was requested, but torch",
        ),  # a run for another machine
        ("n_prototypes=100000000000", 3, "Error: there is not enough memory for batch_size=2. Keep fewer"),
    ],
)
def test_explain_finds_what_the_run_would_not_survive(
    photos: Path, option: str, code: int, message: str
) -> None:
    if "cuda" in option and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    result = run_cli(photos, "--explain", *tiny_options(), "--set", option)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert "Nothing was saved" not in result.stderr


def test_explain_says_what_the_run_would_say_of_few_steps(photos: Path) -> None:
    assert "4 steps are few" in run_cli(photos, "--explain", *tiny_options()).stderr


def test_explain_warns_of_a_damaged_source_as_the_run_would(tmp_path: Path, photos: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for file in sorted(photos.iterdir()):
            archive.add(file, file.name)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    result = run_cli(tmp_path / "a.tar", "--explain", *tiny_options())
    assert result.exit_code == 0 and "Warning: " in result.stderr, result.stderr
    assert "a.tar: the archive is damaged" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "arch=vit_tinny_patch16_224"], "has no model 'vit_tinny_patch16_224'; did you mean"),
        (["--init-from", "runs/nothing"], "No file or folder here is called runs/nothing"),
        (
            ["--init-from", "starter", "--set", "arch=vit_small_patch16_224"],
            "init_from=starter is a model of another",
        ),
        (["--labelled", "classes/nothing"], "classes/nothing: no such file or folder"),
        (["--labelled", "PHOTOS"], "holds 6 files and no folders; expected one subfolder per class"),
        (
            [
                "--recipe",
                "distill",
                "--distill-from",
                "hog",
                "--set",
                "loss=relations",
                "--set",
                "distill_pictures=[x]",
            ],
            "distill_pictures leaves",
        ),
    ],
)
def test_explain_looks_for_what_the_run_needs(photos: Path, options: list[str], message: str) -> None:
    options = [str(photos) if option == "PHOTOS" else option for option in options]
    result = run_cli(photos, "--explain", "--offline", *options)
    assert result.exit_code != 0 and not result.stdout, result.output
    assert message in result.stderr


def test_explain_tells_what_a_run_begins_with(photos: Path) -> None:
    options = [
        "--recipe",
        "distill",
        "--distill-from",
        "starter",
        "--distill-from",
        "hog",
        "--init-from",
        "starter",
    ]
    settings = [
        "arch=vit_tiny_patch16_224",
        "loss=similarity",
        "foreground_weight=1",
        "mean=auto",
        "image_size_px=96",
    ]
    result = run_cli(photos, "--explain", *options, *(word for s in settings for word in ("--set", s)))
    assert result.exit_code == 0, result.output
    assert "foreground_weight: 1.0" in result.stdout
    assert "starter has no projection head, so a new one starts on trained features" in result.stderr


def test_device_and_workers_are_options_so_that_the_variables_for_all_commands_hold(photos: Path) -> None:
    def explained(*options: str, **variables: str) -> list[str]:
        command = ["train", str(photos), "--explain", *options]
        lines = CliRunner(env=variables).invoke(cli, command).stdout.splitlines()
        return [line.strip() for line in lines if line.startswith(("device: ", "workers: "))]

    assert explained("--device", "mps", "--workers", "3") == ["device: mps", "workers: 3"]
    variables = {"DINOKIT_DEVICE": "cpu", "DINOKIT_WORKERS": "0"}
    assert explained(**variables) == ["device: cpu", "workers: 0"]
    assert explained("--set", "device=cuda:1", **variables) == ["device: cuda:1", "workers: 0"]


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_bundled_recipes_load_and_survive_saving(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert name in CliRunner().invoke(cli, ["train", "--list"]).stdout


def test_without_torch_the_command_names_the_extra(tmp_path: Path, photos: Path) -> None:
    # A process in which torch is not to be found, as on a plain installation.
    hide = (
        "import importlib.util as u, sys; find = u.find_spec;"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest);"
        "from dinokit.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", hide, "train", str(photos), "-o", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == (
        "Error: training needs torch, which is not installed. Install it with: pip install 'dinokit[train]'\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.skipif(os.name == "nt", reason="no such names")
def test_a_run_folder_of_two_lines_names_a_model_of_one(tmp_path: Path, photos: Path) -> None:
    train([photos], tmp_path / "two\nlines", replace(RECIPE, epochs=1))
    assert load_backbone(tmp_path / "two\nlines").name == "two lines"


def test_ctrl_c_keeps_everything_and_the_same_command_goes_on(tmp_path: Path, photos: Path) -> None:
    run = tmp_path / "run"
    options = [*tiny_options(), "--set", "epochs=20", "--set", "save_every_epochs=1000"]
    options += ["--set", "arch=vit_tiny_patch16_224"]
    command = [sys.executable, "-m", "dinokit", "train", str(photos), "-o", str(run), *options]
    # A terminal's own process group, and default handling of SIGINT, whatever the test runner was started from.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Interrupted after step" in stderr and "resumes from there" in stderr and "Traceback" not in stderr
    assert stdout == f"{run / 'model'}\n"
    assert load_backbone(str(run)).embed(photos / "coffee.jpg").shape == (192,)
    last = checkpoint.checkpoints(run / "checkpoint")[-1]
    done = int(last.stem.split("-")[1])
    assert metrics.read_text().count("\n") == done

    again = CliRunner().invoke(cli, ["train", str(photos), "-o", str(run), *options])
    assert again.exit_code == 0, again.output
    assert f"Resuming after step {done}." in again.stderr
