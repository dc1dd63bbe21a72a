"""One file from the web, within bounds of size and time."""

from __future__ import annotations

import time
import urllib.request
from typing import Any
from urllib.error import URLError

from blip2.errors import ImageError

TIMEOUT = 30.0  # seconds for the whole of a download
SCHEMES = ("http://", "https://")


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never out of the web."""

    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str):
        if not newurl.lower().startswith(SCHEMES):
            raise ImageError(f"redirects to {newurl}, which is neither http nor https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, max_bytes: int) -> bytes:
    """The body at an http or https address.

    Raises:
        ImageError: it cannot be had within `TIMEOUT`, is larger than `max_bytes`, or redirects out of the web.
    """
    opener = urllib.request.OpenerDirector()  # built by hand: the default one also opens files and FTP
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _WebRedirects(),
    ):
        opener.add_handler(handler)
    deadline = time.monotonic() + TIMEOUT
    body = bytearray()
    try:
        with opener.open(urllib.request.Request(url, headers={"User-Agent": "blip2"}), timeout=TIMEOUT) as response:
            while chunk := response.read1(1 << 16):
                body += chunk
                if len(body) > max_bytes:
                    raise ImageError(f"is larger than {max_bytes:,} bytes; download it and make it smaller")
                if time.monotonic() > deadline:
                    raise TimeoutError
    except URLError as error:  # an HTTPError too
        raise ImageError(f"cannot be fetched ({error}); check the address, or download it first") from error
    except TimeoutError as error:
        raise ImageError(f"did not arrive within {TIMEOUT:.0f} s; download it first") from error
    return bytes(body)
