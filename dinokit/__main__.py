"""``python -m dinokit``, and the console script ``dinokit``: the command from its first moment on."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """The console entry point: ends the process.

    What the command needs is imported here, not above: Ctrl-C while Python still imports is an interruption too.
    """
    try:
        from dinokit.cli import main as run

        run()
    except KeyboardInterrupt:
        import sys

        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
