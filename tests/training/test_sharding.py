"""strategy=fsdp: weights in parts over two processes train as the whole network does in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import timm
from two_processes import (
    RESNET,
    SETTINGS,
    Case,
    assert_same_training,
    new_state,
    of_two,
    recipe_of,
    run_command,
    train,
    train_command,
)

import dinokit
from dinokit.errors import UsageError
from dinokit.training.devices import sharding
from dinokit.training.devices.processes import Processes
from dinokit.training.recipe import load_recipe, with_overrides
from dinokit.training.run import checkpoint
from dinokit.training.trainer import train as train_run

pytestmark = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 cannot shard on CPUs")

ALONE = Processes(torch.device("cpu"))

CASES = {
    "vit": Case(),
    "pieces": Case(pieces=((2, 1), (1, 2))),
    "one-size": Case(("n_local_crops=0",)),
    "clip": Case(("clip_grad=0.05",)),
    "clip-each": Case(("clip_grad=0.02", "clip_per_parameter=true")),
    "lars": Case(("optimizer=lars", "lr=5")),
    "adamw": Case(("optimizer=adamw", "lr=0.01", "norm_last_layer=false", "freeze_last_layer_epochs=0")),
    "resnet": Case(RESNET, pieces=((4,), (3,))),
    "xcit": Case(("arch=xcit_nano_12_p16_224", "koleo_weight=0.0")),
    "ibot": Case(("ibot_weight=1.0", "ibot_separate_head=true")),
    "foreground": Case(("foreground_weight=0.5",)),
    "rotary": Case(("arch=vit_tiny_patch16_dinov3_qkvb", "ibot_weight=0.7")),
}


def of_a_process(rank: int, folder: str) -> None:
    with_all = Processes(torch.device("cpu"), rank=rank, world_size=2)
    processes = Processes(torch.device("cpu"), rank=rank, world_size=2, strategy="fsdp")
    found: dict[str, Any] = {name: train(case, processes) for name, case in CASES.items()}
    # Half-way, as the first process writes it and both read it, and the same from a run with whole networks.
    for name, before in (("resumed", processes), ("from-ddp", with_all)):
        saved = train(CASES["pieces"], before, until=2)
        if rank == 0:
            torch.save(saved, f"{folder}/{name}-saved.pt")
        torch.distributed.barrier()
        saved = torch.load(f"{folder}/{name}-saved.pt", weights_only=True)
        found[name] = train(CASES["pieces"], processes, saved=saved)
        found.setdefault("saved", saved)
    state = new_state(recipe_of(CASES["vit"]), processes)
    with torch.no_grad():
        state.teacher([torch.zeros(2, 1, 3, 32, 32)])
    networks = {"student": state.student, "teacher": state.teacher}
    found["held"] = {
        name: sum(sharding.local(p).numel() for p in network.parameters())
        for name, network in networks.items()
    }
    for name, answer in (
        ("refused", lambda _: torch.tensor(2.0)),
        ("too-old", lambda tensor: tensor.no_such),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "local", answer)
            with pytest.raises(UsageError) as refused:
                new_state(recipe_of(CASES["vit"]), processes)
            found[name] = str(refused.value)
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return of_two(of_a_process, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_a_part_each_train_as_one(name: str, two: Any) -> None:
    # What is added to all keys changes nothing after the softmax: its gradient is rounding, which AdamW makes steps of.
    but_for = "qkv.bias" if name == "adamw" else "nothing"
    # A fifth of a step: where a gradient is nearly 0, AdamW makes a step of its rounding, which differs between CPUs.
    atol = 2e-3 if name == "adamw" else 1e-5
    assert_same_training(train(CASES[name], ALONE), two[0][name], atol=atol, what=name, but_for=but_for)


def test_each_holds_its_part_of_the_weights(two: Any) -> None:
    state = new_state(recipe_of(CASES["vit"]), ALONE)
    for name, network in (("student", state.student), ("teacher", state.teacher)):
        n_weights = sum(parameter.numel() for parameter in network.parameters())
        held = [process["held"][name] for process in two]
        assert sum(held) == n_weights and max(held) < 0.52 * n_weights


# -- what is saved


def test_a_checkpoint_is_that_of_one_process(two: Any) -> None:
    one, other = train(CASES["adamw"], ALONE), two[0]["adamw"]
    assert one.keys() == other.keys()
    for part in ("student", "teacher"):
        assert {k: (v.shape, v.dtype) for k, v in one[part].items()} == {
            k: (v.shape, v.dtype) for k, v in other[part].items()
        }
    assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    assert len(other["torch_rng"]) == 2
    assert (
        not two[1]["adamw"]["student"] and not two[1]["adamw"]["optimizer"]["state"]
    )  # the first writes them


def test_going_on_is_exact(two: Any) -> None:
    whole, resumed = two[0]["pieces"], two[0]["resumed"]
    assert resumed["step"] == whole["step"] == 3 and len(resumed["results"]) == 1
    assert_same_training(whole, resumed, atol=0)


def test_going_on_alone(two: Any) -> None:
    resumed = train(CASES["pieces"], ALONE, saved=two[0]["saved"])
    assert len(resumed["results"]) == 1
    assert_same_training(two[0]["pieces"], resumed, atol=1e-5)


def test_going_on_from_a_run_that_was_alone_or_had_it_all(two: Any) -> None:
    assert_same_training(two[0]["pieces"], two[0]["from-ddp"], atol=1e-5)


# -- as a user


@pytest.mark.slow
def test_a_run_with_knn_goes_on_alone(tmp_path: Path, photos: Path) -> None:
    run = tmp_path / "run"
    labelled = tmp_path / "labelled.csv"
    names = [str(path) for path in sorted(photos.glob("*.jpg"))[:4]]
    labelled.write_text(
        "path,label\n" + "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names)), encoding="utf-8"
    )
    settings = [
        *(s for s in SETTINGS if not s.startswith(("arch=", "lr="))),
        *("arch=vit_tiny_patch16_224", "lr=0.02", "batch_size=2", "epochs=2", "keep_checkpoints=9"),
        *("workers=0", "tensorboard=false"),
        *("save_every_minutes=0", "log_every_steps=1", f"labelled={labelled}"),
    ]
    done = run_command(train_command(names, run, [*settings, "strategy=fsdp", "devices=2"]))
    if "cannot average gradients of strategy=fsdp on CPUs" in done.stderr and torch.__version__.startswith(
        "2.6."
    ):
        pytest.skip("torch 2.6 cannot do this on CPUs")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.split() == [str(run / "model")]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "knn_teacher" in line] == [0, 2, 4]
    assert (run / "attention" / "step-0000000004.jpg").exists()
    in_parts, _ = checkpoint.load_newest(run / "checkpoint")
    assert in_parts is not None
    found = dinokit.load_backbone(run / "model", engine="torch").module.state_dict()
    torch.testing.assert_close(found["norm.weight"], in_parts["teacher"]["backbone.norm.weight"])
    assert load_recipe(run / "recipe.yaml").strategy == "fsdp"

    # The same run, from half-way on by one process.
    checkpoint.checkpoints(run / "checkpoint")[-1].unlink()
    train_run(names, run, with_overrides(load_recipe("default"), settings))
    alone, _ = checkpoint.load_newest(run / "checkpoint")
    assert alone is not None and alone["step"] == in_parts["step"] == 4
    for part in ("student", "teacher"):
        for name, value in in_parts[part].items():
            torch.testing.assert_close(alone[part][name], value, rtol=0, atol=1e-5, msg=f"{part}.{name}")
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line.get("knn_teacher") for line in again] == [line.get("knn_teacher") for line in lines]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["strategy=fdsp"], "strategy='fdsp' is not known; use one of ddp, fsdp"),
        (
            ["strategy=fsdp", "compile=true"],
            "compile=true is not supported with strategy=fsdp; use compile=false",
        ),
        (["strategy=fsdp", "precision=fp16"], "precision=fp16 .* use bf16, fp32 or strategy=ddp"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_overrides(load_recipe("default"), settings)


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(UsageError, match=r"there is one; use devices=2 or more .*, or strategy=ddp"):
        Processes.start("cpu", strategy="fsdp")


@pytest.mark.parametrize("name", ["refused", "too-old"])
def test_a_torch_that_adds_up_instead_of_averaging_is_refused(two: Any, name: str) -> None:
    assert "cannot average gradients of strategy=fsdp on CPUs; use strategy=ddp" in two[0][name]


# -- what is fetched at once


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("vit_tiny_patch16_224", [f"blocks.{i}" for i in range(12)]),
        ("resnet18", [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]),
        ("regnetx_002", ["s4"]),  # no lists: what has a tenth of the weights
        ("convnext_atto", [f"stages.{i}" for i in range(4)]),  # the stem is a list, too, and small
    ],
)
def test_blocks(arch: str, expected: list[str]) -> None:
    backbone = timm.create_model(arch, num_classes=0)
    names = {id(part): name for name, part in backbone.named_modules()}
    assert [names[id(part)] for part in sharding._blocks(backbone)] == expected
