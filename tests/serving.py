"""A real server on loopback, in this process, for tests."""

import contextlib
import threading
import time

import torch
from fake_batcher import FakeBatcher
from megalith.rlhf.chat_model import ChatModel
from megalith.rlhf.server import ServerArguments, create_app, listening_socket, uvicorn_server
from megalith.rlhf.server_metrics import Metrics
from megalith.rlhf.server_service import Limits, Service
from megalith.rlhf.templates import prompt_renderer
from megalith.rlhf.tokenizer import byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def chat_model(template=CHATML, context_length=4096):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    render = prompt_renderer(tokenizer, "auto")
    return ChatModel(
        name="tiny",
        tokenizer=tokenizer,
        render=render,
        stop_ids=(tokenizer.eos_token_id,),
        context_length=context_length,
        vocab_size=320,
        device=torch.device("cpu"),
        precision="fp32",
        weight_bytes=1_000_000,
    )


@contextlib.contextmanager
def serving(batcher, model=None, **options):
    """Serve `batcher`; yields the address. `options` are those of ServerArguments."""
    model = model or chat_model()
    options = ServerArguments(**{"port": 0, "grace_s": 2, **options})
    service = Service(model, batcher, Metrics(model.device, batcher), Limits(options.max_tokens))
    with listening_socket(options.host, options.port) as listener:
        server = uvicorn_server(create_app(service, options), options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def serving_replies(reply, pause_s=0.0, max_queue=64, model=None, **options):
    """Serve a FakeBatcher that answers `reply(prompt)`; yields (address, batcher)."""
    model = model or chat_model()
    batcher = FakeBatcher(model.tokenizer, reply, pause_s, max_queue)
    with serving(batcher, model, **options) as address:
        yield address, batcher
