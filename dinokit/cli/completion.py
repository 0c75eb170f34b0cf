"""`dinokit completion`: the script that a shell reads to complete dinokit's commands."""

from __future__ import annotations

import click

from dinokit.cli._completion import SHELLS, script

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that lets bash, zsh or fish complete commands, options, models and files.

    To try it in the current shell:

    \b
    source <(dinokit completion bash)          # or zsh
    dinokit completion fish | source

    To install it:

    \b
    dinokit completion bash > ~/.local/share/bash-completion/completions/dinokit
    dinokit completion zsh  > ~/.dinokit-completion.zsh    # and in .zshrc, after compinit: source that file
    dinokit completion fish > ~/.config/fish/completions/dinokit.fish

    bash must be version 4.4 or newer.
    """
    from dinokit.cli import cli

    click.echo(script(shell, cli).strip())
