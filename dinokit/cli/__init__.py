"""The `dinokit` command: a group whose commands are imported when they are run.

This module has what all commands share: the table of commands, a help that imports none of them, and the conversion
of errors into one message on stderr and an exit code.

    0    all done
    1    some inputs failed and are listed
    2    wrong usage
    3    nothing could be done
    130  interrupted by Ctrl-C, SIGTERM or SIGHUP; finished work is kept
"""

from __future__ import annotations

import codecs
import difflib
import errno
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from dinokit._version import __version__
from dinokit.cli._completion import complete_values
from dinokit.cli._defaults import DEFAULTS_HELP, add_variables, defaults_of, misspelt, origin_of_value
from dinokit.cli._outputs import must_be_local
from dinokit.cli._tables import visible
from dinokit.errors import DinokitError

__all__ = ["cli", "main"]

# name: (module, short help). `dinokit --help` prints this table; a command's own --help imports its module.
COMMANDS = {
    "embed": ("dinokit.cli.embed", "Embed photographs into a table."),
    "models": ("dinokit.cli.models", "List the models known by name."),
    "info": ("dinokit.cli.info", "Describe a model: sizes, preprocessing, licence and origin."),
    "attention": ("dinokit.cli.attention", "Draw a model's attention over photographs."),
    "pca": ("dinokit.cli.pca", "Draw the patch features of photographs as colours."),
    "knn": ("dinokit.cli.knn", "Label photographs by their nearest labelled neighbours."),
    "fit": ("dinokit.cli.fit", "Fit a classifier to labelled photographs; write it as ONNX."),
    "classify": ("dinokit.cli.classify", "Label photographs with a classifier written by dinokit fit."),
    "eval": ("dinokit.cli.eval", "Measure how good models are on labelled photographs."),
    "search": ("dinokit.cli.search", "Find the most similar photographs in a table."),
    "index": ("dinokit.cli.index", "Build an approximate index of a table."),
    "duplicates": ("dinokit.cli.duplicates", "Find near-duplicates among photographs."),
    "select": ("dinokit.cli.select", "Choose a few representative photographs."),
    "atlas": ("dinokit.cli.atlas", "Draw a map of photographs as one web page."),
    "train": ("dinokit.cli.train", "Train a backbone on a folder of pictures, without labels."),
    "report": ("dinokit.cli.report", "Write the curves of a training run as one HTML page."),
    "export": ("dinokit.cli.export", "Write a model folder with ONNX files, checked against torch."),
    "card": ("dinokit.cli.card", "Write the README.md of a model folder, and draw its figures."),
    "push": ("dinokit.cli.push", "Upload a model folder to the Hugging Face Hub."),
    "pull": ("dinokit.cli.pull", "Download a model from the Hugging Face Hub."),
    "doctor": ("dinokit.cli.doctor", "Report what works on this machine and what is missing."),
    "completion": ("dinokit.cli.completion", "Print the script for shell completion."),
}
EXIT_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A click group over ``COMMANDS``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)
        add_variables(cmd_name, command)
        must_be_local(command)
        complete_values(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"The commands are: {', '.join(COMMANDS)}."
            ctx.fail(f"No such command {name!r}. {hint}")
        found, command, rest = super().resolve_command(ctx, args)
        asks_for_help = bool({"-h", "--help"} & set(rest))  # help is printed whatever else is wrong
        if found and command and not ctx.resilient_parsing and not asks_for_help:
            others = [other for other in COMMANDS if other != found]
            for variable, meant in misspelt(command, os.environ, others, lambda n: self.get_command(ctx, n)):
                click.echo(f"Warning: {variable} is not known; did you mean {meant}?", err=True)
            ctx.default_map = {found: defaults_of(found, command, COMMANDS)}
            from dinokit.cli._hub_retries import tell_of_retries_once  # here: it imports logging

            tell_of_retries_once()
            if found != "train":  # handles SIGTERM itself, differently with several processes
                _end_as_by_ctrl_c()
        return found, command, rest

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # click's own version would import every command to get its first line of help.
        commands = [
            CompletionItem(name, help=text)
            for name, (_, text) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own version would import every command to get its first line of help.
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command and ends the process with the exit code that it returns, or 0."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        sys.exit(self._run(args, prog_name, complete_var, extra))

    def _run(
        self,
        args: Sequence[str] | None,
        prog_name: str | None,
        complete_var: str | None,
        extra: dict[str, Any],
    ) -> int:
        _open_streams()
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            sys.stdout.flush()
        except click.ClickException as error:
            error.show()
            origin = origin_of_value(error) if isinstance(error, click.UsageError) else None
            if origin is not None:
                click.echo(f"The value comes from {origin}.", err=True)
            return error.exit_code
        except click.Abort:  # click's form of Ctrl-C
            click.echo("Interrupted.", err=True)
            return EXIT_INTERRUPTED
        except BrokenPipeError as error:  # `dinokit models | head`: the reader needs no more
            return _end_of_pipe(error)
        except SystemExit as error:
            # rich, and newer versions of click, report a broken pipe like this; click has wrapped stdout by then.
            if isinstance(error.__context__, BrokenPipeError):
                return _end_of_pipe(error.__context__)
            if "PacifyFlush" in type(sys.stdout).__name__:
                return _end_of_pipe(None)
            raise
        except (DinokitError, OSError, ImportError, MemoryError) as error:
            if os.environ.get("DINOKIT_DEBUG") == "1":
                raise
            # Line ends belong to our messages; those in file names are escaped.
            lines = _describe(error).split("\n")
            click.echo("Error: " + "\n".join(map(visible, lines)), err=True)
            return error.exit_code if isinstance(error, DinokitError) else 3
        return result if isinstance(result, int) else 0


def _describe(error: Exception) -> str:
    if isinstance(error, MemoryError):
        what = f" ({error})" if str(error) else ""
        return f"out of memory{what}; use a smaller --batch-size or --image-size"
    if isinstance(error, ImportError) and not isinstance(error, DinokitError):
        # `python -m dinokit` in the root of a clone that was installed.
        if error.name in ("dinokit.training", "dinokit.export"):
            return (
                f"{error}: Python imported dinokit from the source folder {Path(__file__).parents[1]}, which lacks it; "
                "run this in another folder, or install the clone with pip install -e"
            )
        return f"the installation is incomplete ({error}); run dinokit doctor to see what is missing"
    if isinstance(error, OSError) and error.strerror:  # "out.csv: No space left on device", without the errno
        if error.filename:
            return f"{error.filename}: {error.strerror}"
        where = " while writing the result or temporary files (TMPDIR)" if error.errno == errno.ENOSPC else ""
        return f"{error.strerror}{where}"
    return str(error)


def _end_as_by_ctrl_c() -> None:
    """Makes SIGTERM, from containers and batch systems, and SIGHUP, from a closed terminal, keep work as Ctrl-C does.

    A handler that is already set stays, and so does ``nohup``.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt_once)


def _interrupt_once(number: int, _frame: object) -> None:
    if number != signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)  # the terminal and its shell each send SIGHUP
    raise KeyboardInterrupt


def _open_streams() -> None:
    """Prepares stdout and stderr.

    Python has None for a stream that the shell closed (``dinokit … >&-``), and the next file opened would get its
    number. Characters that a stream's encoding lacks are written as ``\\u2192`` instead of ending the command: pipes
    on Windows and plain locales have a few hundred characters.
    """
    global _stdout  # _end_of_pipe needs it
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115, as long as the process
        elif isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is sys.__stdout__:
        _stdout = _watched(sys.stdout, silent=False)
        sys.stdout = _stdout or sys.stdout
    if sys.stderr is sys.__stderr__:
        sys.stderr = _watched(sys.stderr, silent=True) or sys.stderr


class _Pipe(io.FileIO):
    """A stream of the process that notices when its reader is gone; a silent one then discards what is written.

    What is written to a terminal that has closed is discarded in any case.
    """

    def __init__(self, number: int, *, silent: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self.silent, self.broken, self.is_terminal = silent, False, self.isatty()

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.broken = isinstance(error, BrokenPipeError)
            has_closed = self.is_terminal and error.errno == errno.EIO
            if not (has_closed or (self.broken and self.silent)):
                raise
            return memoryview(data).nbytes


_stdout: io.TextIOWrapper | None = None


def _watched(stream: Any, *, silent: bool) -> io.TextIOWrapper | None:
    """The same stream over a :class:`_Pipe`; None if it is not a plain file, such as a console on Windows."""
    raw = _raw(stream)
    if not isinstance(stream, io.TextIOWrapper) or type(raw) is not io.FileIO:
        return None
    stream.flush()
    pipe: Any = _Pipe(raw.fileno(), silent=silent)
    return io.TextIOWrapper(
        pipe if stream.buffer is raw else io.BufferedWriter(pipe),  # PYTHONUNBUFFERED
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=silent or stream.line_buffering,  # stderr is not buffered beyond a line
        write_through=stream.write_through,
    )


def _raw(stream: Any) -> Any:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _end_of_pipe(error: BrokenPipeError | None) -> int:
    """Returns 0 if the reader of stdout is gone; any other broken pipe, such as a worker's, is an error.

    stdout then goes to the null device, so that the interpreter's last flush does not complain about the closed pipe.
    """
    raw = _raw(_stdout)
    if isinstance(raw, _Pipe) and not raw.broken:
        what = "a pipe to another process broke; run the command again"  # no file: "Broken pipe" says less
        if error is not None and error.filename:
            what = _describe(error)
        click.echo(f"Error: {what}", err=True)
        return 3
    if _stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _stdout.fileno())
    return 0


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"{DEFAULTS_HELP}\n\nDINOKIT_DEBUG=1 shows the full traceback of an error.",
)
@click.version_option(__version__, "-V", "--version", prog_name="dinokit", message="%(prog)s %(version)s")
def cli() -> None:
    """Image features from self-supervised Vision Transformers (DINO).

    \b
    dinokit embed PHOTOS/ -o embeddings.parquet
    dinokit COMMAND --help
    """
    if os.environ.get("DINOKIT_MAX_PIXELS"):  # an invalid number is reported before any work
        from dinokit.pictures.picture_limit import apply_variable

        apply_variable()


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The console entry point: ends the process."""
    cli.main(args, prog_name="dinokit")
    raise AssertionError("cli.main ends the process")
