"""`dinokit push`: upload a model folder to the Hugging Face Hub."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dinokit.export import PushPlan, PushResult

__all__ = ["push"]


@click.command()
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="USER/NAME")
@click.option(
    "--private", is_flag=True, help="Create the repository as private; fails if it exists and is public."
)
@click.option("--revision", metavar="BRANCH", help="Commit to this branch; created if missing.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", metavar="TEXT", help="Commit message.")
@click.option(
    "--overwrite-card", is_flag=True, help="Also replace a README.md on the Hub that was edited by hand."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check folder and card and list what would be sent, without contacting the Hub.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def push(
    folder: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    overwrite_card: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload a model folder (or a run's model/) to the Hugging Face Hub.

    The folder and its card are checked first. The repository is created if it does not exist; in an existing one, ONNX
    files of other weights are removed, and a README.md that was edited by hand is kept. The token comes from
    `hf auth login` or HF_TOKEN; HF_ENDPOINT names another Hub. If the upload is interrupted, run the command again to
    resume it.

    \b
    dinokit push shoes/ me/shoes --dry-run
    dinokit push shoes/ me/shoes --private
    dinokit push runs/shoes me/shoes --revision v2 --message "300 epochs"
    dinokit push shoes/ somebody/shoes --create-pr
    """
    from dinokit.errors import UsageError
    from dinokit.export import plan_push, push_to_hub

    if revision is not None and create_pr:
        raise UsageError(
            "--revision and --create-pr cannot be combined: a pull request has a branch of its own; leave one out"
        )
    if dry_run:
        plan = plan_push(folder, repo_id)
        if as_json:
            click.echo(json.dumps({**plan.to_json(), "dry_run": True}, indent=2))
        else:
            _print_plan(plan)
        return
    result = push_to_hub(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=message,
        overwrite_card=overwrite_card,
    )
    _talk(result)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        click.echo(result.pull_request_url or result.commit_url)


def _print_plan(plan: PushPlan) -> None:
    for name, size in plan.files.items():
        click.echo(f"{size:>14,}  {name}")
    click.echo(f"{sum(plan.files.values()):>14,}  bytes in {len(plan.files)} files")
    for name in plan.left_out:
        click.echo(f"Not sent: {name} (hidden, a pickle, or a link out of the folder)", err=True)
    _say_licence(plan)
    click.echo(
        f"Folder and card are valid. Nothing was sent to {plan.repo_id}: this was a dry run.", err=True
    )


def _say_licence(plan: PushPlan) -> None:
    if plan.folder.config.licence in ("", "other"):
        path = shlex.quote(str(plan.folder.path))
        click.echo(
            "Note: the model has no licence, so users cannot know what they may do with the weights. To set one: "
            f"dinokit export {path} -o {path} --no-onnx --licence apache-2.0",
            err=True,
        )


def _talk(result: PushResult) -> None:
    for name in result.plan.left_out:
        click.echo(f"Not sent: {name} (hidden, a pickle, or a link out of the folder)", err=True)
    for name in result.removed:
        click.echo(f"Removed from the Hub: {name} (it belonged to other weights or preprocessing)", err=True)
    _say_licence(result.plan)
    if result.card == "kept":
        click.echo(
            "README.md on the Hub was edited by hand and is kept; --overwrite-card replaces it.",
            err=True,
        )
    click.echo(f"Pushed {result.plan.folder.path} to {result.url}", err=True)
