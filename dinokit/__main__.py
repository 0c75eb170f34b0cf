"""``python -m dinokit`` is the command ``dinokit``."""

from dinokit.cli import main

if __name__ == "__main__":
    main()
