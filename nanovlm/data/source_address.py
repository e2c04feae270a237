"""An address that a record names -> bytes: http and https alone, public hosts alone, with an end to everything."""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import quote, urljoin, urlsplit

from nanovlm.errors import UserError, printable

LARGEST_DOWNLOAD = 2**26  # bytes
SECONDS = 30  # for an image, redirects included
MOST_REDIRECTS = 5


def download(
    url: str, where: str, most_redirects: int = MOST_REDIRECTS, most_bytes: int | None = None, kind: str = ""
) -> bytes:
    """Fetch a file of a media type that begins with `kind`. Raises UserError that begins with `where` if it cannot.

    The host is looked up once and connected to at just the address that was found to be public, so that neither a
    redirect nor a name that changes its address leads into the network of this machine.
    """
    end, shown = time.monotonic() + SECONDS, printable(url, most=100)
    try:
        for _ in range(most_redirects + 1):
            data, place = _request(url, end, LARGEST_DOWNLOAD if most_bytes is None else most_bytes, kind)
            if place is None:
                return data
            url = place
        raise UserError(f"there are more than {most_redirects} redirects" if most_redirects else "it redirects")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{where} names {shown}, which cannot be fetched: {error or type(error).__name__}") from error


def _request(url: str, end: float, most_bytes: int, kind: str) -> tuple[bytes, str | None]:
    """Return the contents of an address, or where it redirects to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"an address must begin with http:// or https://, not {printable(url, most=60)}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe="/%?&=:;,+~!$'()*@[]")
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock = sock = _connect(parts.hostname, port, parts.scheme == "https", end)
    # A server that sends a byte now and then keeps within every timeout of the socket.
    alarm = threading.Timer(_left(end), lambda: socket.socket.shutdown(sock, socket.SHUT_RDWR))
    alarm.daemon = True
    alarm.start()
    try:
        connection.request("GET", path, headers={"User-Agent": "nanovlm", "Accept": "image/*", "Connection": "close"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and (place := response.headers.get("Location")):
            return b"", urljoin(url, place)
        if response.status != 200:
            raise UserError(f"the server answers {response.status} {printable(response.reason, most=60)}")
        if not (given := response.headers.get("Content-Type", "")).lower().startswith(kind):
            raise UserError(f"its type is {printable(given, most=60) or 'not told'}, not {kind}...")
        data = bytearray()
        while block := response.read1(2**16):
            data += block
            if len(data) > most_bytes:
                raise UserError(f"it has more than {most_bytes} bytes")
        _left(end)  # else the alarm may have ended it
        if response.length:
            raise UserError(f"it ends {response.length} bytes too early")
        return bytes(data), None
    except (OSError, ValueError, http.client.HTTPException):
        _left(end)
        raise
    finally:
        alarm.cancel()
        connection.close()


def _connect(host: str, port: int, is_secure: bool, end: float) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_kind, address in found:
        if not is_public(str(address[0])):
            raise UserError(f"{host} is {address[0]}, which is not a public address")
    sock = socket.create_connection((str(found[0][4][0]), port), timeout=_left(end))
    return ssl.create_default_context().wrap_socket(sock, server_hostname=host) if is_secure else sock


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the internet, not of this machine, its network or its provider."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None) or ip  # an IPv4 address within
    return ip.is_global and not ip.is_multicast


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise UserError(f"it takes more than {SECONDS} s")
    return left
