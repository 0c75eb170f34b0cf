"""While the Hub does not answer, prints once that it is tried again, instead of two lines per attempt."""

from __future__ import annotations

import logging
import os

import click

__all__ = ["tell_of_retries_once"]

_OF_RETRIES = ("thrown while requesting", "Retrying in")


class _Once(logging.Filter):
    """Drops the log records of retries; prints one line of our own in place of the first."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not any(part in message for part in _OF_RETRIES):
            return True
        context = click.get_current_context(silent=True)
        quiet = context is not None and context.params.get("quiet", False)
        if not self.told and not quiet and "Retrying in" in message:
            self.told = True
            click.echo("The Hub does not answer; trying again for up to half a minute.", err=True)
        return False


_once = _Once()


def tell_of_retries_once() -> None:
    """Replaces huggingface_hub's own messages, unless HF_HUB_VERBOSITY or DINOKIT_DEBUG asks for them."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    if "HF_HUB_VERBOSITY" in os.environ or os.environ.get("DINOKIT_DEBUG") == "1":
        logger.removeFilter(_once)
        return
    _once.told = False
    logger.addFilter(_once)
