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
_BLOCK = 1 << 18
# The timeout is that of a single read: a server that sends a byte now and then would be waited for without end.
_LEAST_BYTES_PER_S = 1000
_LEFT_AS_THEY_ARE = ":/?#[]@!$&'()*+,;=%~"  # characters of an address not to percent-encode


def fetch(address: str) -> bytes:
    """The encoded picture at an address; temporary failures are tried three times.

    Raises:
        ImageError: the server refuses, cannot be reached, is too slow, or sends too many bytes. The message omits the
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
                reason = " ".join(str(error.reason).split())  # that of a redirect loop has several lines
                raise ImageError(f"the server answers {error.code} ({reason})") from error
        except (ValueError, http.client.InvalidURL) as error:
            raise ImageError(f"this is not a valid address ({error})") from error
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts among them
            if attempt == _TRIES:
                raise ImageError(
                    f"it cannot be fetched ({getattr(error, 'reason', None) or error})"
                ) from error
        time.sleep(pause)
        pause *= 2
    raise AssertionError("the last try returns or raises")


def _get(address: str) -> bytes:
    # urllib follows redirects to http, https and ftp only, so an address never leads to a local file.
    quoted = urllib.parse.quote(address, safe=_LEFT_AS_THEY_ARE)
    request = urllib.request.Request(quoted, headers={"User-Agent": f"dinokit/{__version__}"})
    started = time.monotonic()
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        declared = getattr(answer, "length", None)  # None: until the server closes the connection
        most = MOST_BYTES + 1 if declared is None else min(declared, MOST_BYTES + 1)
        data = bytearray()
        while len(data) < most and (block := answer.read1(min(most - len(data), _BLOCK))):
            data += block
            seconds = time.monotonic() - started
            if seconds > _TIMEOUT_S and len(data) < _LEAST_BYTES_PER_S * seconds:
                raise ImageError(f"the server is too slow: {len(data):,} bytes in {seconds:.0f} s")
    if declared is not None and len(data) < most:
        raise http.client.IncompleteRead(bytes(data), most - len(data))
    return within_limit(bytes(data))
