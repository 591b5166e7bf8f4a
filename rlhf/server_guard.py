"""What every request passes before it reaches a route: host, key, size and patience; and the headers of every response.

Bodies are read here, whole and bounded, so that no route can be made to read more than the limit.
"""

import asyncio
import hashlib
import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

OPEN_PATHS = ("/", "/health")  # answered without a key
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


def error_response(status, message, kind="invalid_request_error", code=None, param=None, headers=None):
    """An error in the shape that OpenAI's clients read."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers=headers)


class Guard:
    """ASGI middleware.

    `api_key`: None or the bearer key that all but OPEN_PATHS need. `max_body_bytes`: larger bodies are answered with
    413. `body_timeout_s`: a body that takes longer to arrive is answered with 408. `allowed_hosts`: None, or the names
    that a Host header may hold: a page of another site whose name has been made to resolve to this machine sends its
    own.
    """

    def __init__(self, app, api_key, max_body_bytes, body_timeout_s, allowed_hosts):
        self._app = app
        self._key_digest = None if api_key is None else _digest(api_key.encode())
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = _with_headers(send)
        refusal = self._refusal(scope["method"], scope["path"], Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._body_timeout_s):
                body, size = await self._read_body(receive)
        except TimeoutError:
            late = error_response(408, "the body did not arrive in time", headers={"connection": "close"})
            await late(scope, receive, send)
            return
        if body is None:
            return  # the client has gone
        if size > self._max_body_bytes:
            await self._too_large(size)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _refusal(self, method, path, headers):
        """The response to a request that may not come in, or None."""
        if self._allowed_hosts is not None and _host_name(headers.get("host", "")) not in self._allowed_hosts:
            return error_response(
                421, f"this server does not answer to '{headers.get('host', '')}'; see --allowed_hosts", code="bad_host"
            )
        if self._key_digest is not None and path not in OPEN_PATHS and not self._has_key(headers):
            return error_response(
                401,
                "a valid key is needed: Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # A page of another site may send forms and plain text here unasked, and never JSON.
            return error_response(415, "the body has to be JSON, with Content-Type: application/json")
        declared = headers.get("content-length", "")
        waits = "100-continue" in headers.get("expect", "")  # nothing has been sent yet, and need not be
        if waits and declared.isdecimal() and int(declared) > self._max_body_bytes:
            return self._too_large(int(declared))
        return None

    def _has_key(self, headers):
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Digests have one length, so that the time to compare tells nothing of the key's.
        same = hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._key_digest)
        return scheme.lower() == "bearer" and same

    async def _read_body(self, receive):
        """The body and its size; what exceeds the limit is read and dropped, because a client reads no answer before
        it has sent all. (None, 0) when the client has gone.
        """
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None, 0
            size += len(message.get("body", b""))
            if size <= self._max_body_bytes:
                chunks.append(message.get("body", b""))
            else:
                chunks.clear()
            more = message.get("more_body", False)
        return b"".join(chunks), size

    def _too_large(self, size):
        message = f"the body has {size} bytes and the limit is {self._max_body_bytes} (--max_body_bytes)"
        return error_response(413, message, code="body_too_large")


def _digest(value):
    return hashlib.sha256(value).digest()


def _host_name(host):
    """The name of a Host header, without the port."""
    return host.rsplit("]", 1)[0] + "]" if host.startswith("[") else host.split(":", 1)[0].lower()


def _with_headers(send):
    async def send_with_headers(message):
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers


def _replay(body, receive):
    """A `receive` that gives `body` once, and then what the client still says: that it has gone."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed():
        return messages.pop() if messages else await receive()

    return replayed
