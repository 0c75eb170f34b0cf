"""Fetch one picture by http or https, with the standard library."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request

from dinokit._version import __version__
from dinokit.errors import ImageError
from dinokit.sources.pictures import MOST_BYTES, within_limit

__all__ = ["fetch"]

_TIMEOUT_S = 30.0
_TRIES = 3
_PAUSE_S = 0.5  # before the second try, doubled before the third
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # a retry may succeed
_LEFT_AS_THEY_ARE = ":/?#[]@!$&'()*+,;=%~"  # characters of an address not to percent-encode


def fetch(address: str) -> bytes:
    """The encoded picture at an address; temporary failures are tried three times.

    Raises:
        ImageError: the server refuses, cannot be reached, or sends too many bytes. The message omits the
            address.
    """
    if re.match(r"https?://[^/?#]*@", address, re.IGNORECASE):
        raise ImageError("addresses with a user name or password are not fetched")
    pause = _PAUSE_S
    for attempt in range(1, _TRIES + 1):
        try:
            return _get(address)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in _PASSING or attempt == _TRIES:
                raise ImageError(f"the server answers {error.code} ({error.reason})") from error
        except (ValueError, http.client.InvalidURL) as error:
            raise ImageError(f"this is not a valid address ({error})") from error
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts among them
            if attempt == _TRIES:
                reason = getattr(error, "reason", None) or error
                raise ImageError(f"it cannot be fetched ({reason})") from error
        time.sleep(pause)
        pause *= 2
    raise AssertionError("the last try returns or raises")


def _get(address: str) -> bytes:
    # urllib follows redirects to http, https and ftp only, so an address never leads to a local file.
    quoted = urllib.parse.quote(address, safe=_LEFT_AS_THEY_ARE)
    request = urllib.request.Request(quoted, headers={"User-Agent": f"dinokit/{__version__}"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        data: bytes = answer.read(MOST_BYTES + 1)
    return within_limit(data)
