"""`megalith serve MODEL`: one model behind OpenAI's API, the announcement's, and a chat page.

Loopback by default. Without --api_key everybody who reaches the port may ask; with it, `/` and `/health` alone are
open.
"""

import base64
import contextlib
import dataclasses
import hashlib
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from transformers.hf_argparser import HfArg

from .arguments import parse
from .chat_model import BatchingArguments, ChatModelArguments, positional_model, start
from .errors import InputError
from .server_generate import generate_routes
from .server_guard import Guard, error_response
from .server_http import HttpProtocol
from .server_metrics import CountedRequests, Metrics, memory_bytes
from .server_openai import openai_routes
from .server_service import ApiError, Limits, Service

PAGE = Path(__file__).parent / "page" / "index.html"
ROUTES = (
    "/",
    "/health",
    "/metrics",
    "/stats",
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/generate",
    "/generate/stream",
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class ServerArguments:
    """Where it listens, who may ask, and for how much."""

    host: str = HfArg(default="127.0.0.1", aliases=["--http_host"], help="address to listen on")
    port: int = HfArg(default=8000, aliases=["--http_port"], help="port to listen on; 0: any free one")
    api_key: str | None = HfArg(
        default=None, help="bearer key that requests need; better set as MEGALITH_API_KEY, which no process list shows"
    )
    allowed_hosts: str | None = HfArg(
        default=None, help="comma-separated names that a Host header may hold; default: loopback names on loopback"
    )
    served_model_name: str | None = HfArg(default=None, help="the model's name in the API; default: its folder's")
    max_tokens: int = HfArg(default=2048, help="tokens that one answer may have")
    max_body_bytes: int = HfArg(default=2_000_000, help="bytes that one request may have")
    body_timeout_s: float = HfArg(default=30.0, help="seconds in which a request's body has to arrive")
    grace_s: int = HfArg(default=30, help="seconds that running answers get when the server is told to stop")

    def __post_init__(self):
        for name in ("max_tokens", "max_body_bytes", "body_timeout_s", "grace_s"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name} is {getattr(self, name)}; it has to be > 0")
        if not 0 <= self.port < 2**16:
            raise InputError(f"--port is {self.port}; it has to be between 0 and 65535")
        if self.api_key is None and "MEGALITH_API_KEY" in os.environ:
            object.__setattr__(self, "api_key", os.environ["MEGALITH_API_KEY"])  # as a frozen dataclass allows
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key):
            raise InputError("--api_key has to be printable ASCII without spaces, and not empty")


GROUPS = (ChatModelArguments, BatchingArguments, ServerArguments)


def page_response(path=PAGE):
    """The chat page with a policy that lets it run its own script and style alone, and talk to this server alone."""
    html = path.read_text(encoding="utf-8")
    inline = {tag: re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL) for tag in ("script", "style")}
    hashes = {
        tag: " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)
        for tag, texts in inline.items()
    }
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(html, headers={"content-security-policy": policy})


def create_app(service, options):
    """The FastAPI application for one Service; `options` are ServerArguments. The batcher is closed when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        service.batcher.close(timeout_s=0)  # uvicorn has waited for the answers that still had a reader

    # No pages of API documentation: they would load their scripts from elsewhere.
    app = FastAPI(title="megalith", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(openai_routes(service))
    app.include_router(generate_routes(service))
    page = page_response()
    started = time.time()

    @app.get("/")
    async def index():
        return Response(page.body, headers=dict(page.headers))

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics():
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/stats")
    async def stats():
        model = service.model
        return {
            "model": model.name,
            "device": str(model.device),
            "weights": model.precision,
            "weight_bytes": model.weight_bytes,
            "memory_bytes": memory_bytes(model.device),
            "context_length": model.context_length,
            "max_tokens": service.limits.max_tokens,
            "uptime_s": time.time() - started,
            **dataclasses.asdict(service.batcher.stats()),
        }

    _add_error_handlers(app)
    app.add_middleware(
        Guard,
        api_key=options.api_key,
        max_body_bytes=options.max_body_bytes,
        body_timeout_s=options.body_timeout_s,
        allowed_hosts=_allowed_hosts(options),
    )
    app.add_middleware(CountedRequests, metrics=service.metrics, routes=ROUTES)
    return app


def _allowed_hosts(options):
    if options.allowed_hosts is not None:
        return {name.strip().lower() for name in options.allowed_hosts.split(",")}
    return {"127.0.0.1", "localhost", "[::1]"} if options.host in LOOPBACK else None


def _add_error_handlers(app):
    @app.exception_handler(ApiError)
    async def api_error(request, error):
        headers = {"retry-after": "1"} if error.status == 429 else None
        return error_response(error.status, error.message, error.kind, error.code, error.param, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        message = first["msg"].removeprefix("Value error, ")
        return error_response(
            400, f"{place}: {message}" if place else message, code="invalid_value", param=place or None
        )

    @app.exception_handler(HTTPException)
    async def http_error(request, error):
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request, error):
        return error_response(500, "the server failed; its log says why", kind="server_error", code="internal_error")


def listening_socket(host, port):
    """A socket that listens on the address, taken before a model is loaded. Raises InputError where there is none."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=256)
    except OSError as error:
        raise InputError(f"cannot listen on --host {host} --port {port}: {error.strerror}") from None


def uvicorn_server(app, options):
    """The server of an app: on SIGTERM or SIGINT it takes no more requests and lets running ones end for `grace_s`."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        http=HttpProtocol,
        ws="none",
        timeout_graceful_shutdown=options.grace_s,
    )
    return uvicorn.Server(config)


def main(argv=None):
    model_args, batching_args, options = parse(GROUPS, positional_model(argv), prog="megalith serve")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again when it has stopped
    with listening_socket(options.host, options.port) as listener, contextlib.suppress(KeyboardInterrupt):
        model, batcher = start(model_args, batching_args, options.served_model_name)
        service = Service(model, batcher, Metrics(model.device, batcher), Limits(options.max_tokens))
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"{model.name} ({model.precision} on {model.device}) at {address}", flush=True)
        if options.host not in LOOPBACK and options.api_key is None:
            print("anybody who reaches this address may use it: set --api_key", file=sys.stderr, flush=True)
        uvicorn_server(create_app(service, options), options).run(sockets=[listener])


if __name__ == "__main__":
    main()
