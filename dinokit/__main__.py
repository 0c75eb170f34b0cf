"""``python -m dinokit``, and the console script ``dinokit``: the command, from the moment it starts."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """The console entry point; ends the process.

    The command is imported here, not above, so that Ctrl-C is handled while Python still imports.
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
