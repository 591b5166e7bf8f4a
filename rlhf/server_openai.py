"""OpenAI's routes: /v1/chat/completions, /v1/completions, /v1/models.

What a request may say is what its model here lists; a field that would change the answer and is not built (tools,
logprobs, response formats) is refused by name, unless its value asks for nothing. Bookkeeping fields are taken and
change no answer, as at OpenAI.
"""

import json
import logging
import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool

from .server_service import ApiError, EventStream, SamplingFields, Stop, Strict, whole_texts

logger = logging.getLogger(__name__)
NOTHING_ASKED = {  # field → values that a client may send without wanting anything
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "logprobs": [False, 0],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "store": [False],
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "tool_calls": [[]],
    "annotations": [[]],
}
Text = Annotated[str, Field(max_length=10_000_000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class OpenAiObject(Strict):
    @model_validator(mode="before")
    @classmethod
    def _without_empty_wishes(cls, values):
        if not isinstance(values, dict):
            return values
        for name in values.keys() & NOTHING_ASKED.keys() - cls.model_fields.keys():
            if values[name] is not None and values[name] not in NOTHING_ASKED[name]:
                raise ValueError(f"'{name}' is not supported by this server")
        return {name: value for name, value in values.items() if name not in NOTHING_ASKED or name in cls.model_fields}


class TextPart(OpenAiObject):
    type: Literal["text"]
    text: Text


class Message(OpenAiObject):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = Field(None, max_length=200)  # handed to the chat template

    def as_dict(self):
        parts = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": parts} | ({"name": self.name} if self.name else {})


class StreamOptions(OpenAiObject):
    include_usage: bool = False


class GenerationRequest(OpenAiObject, SamplingFields):
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Bookkeeping that changes no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stop_strings(self):
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self):
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only for 'stream': true")
        return self


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self):
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("'max_tokens' and 'max_completion_tokens' are two names of one limit, and differ")
        return self


class CompletionRequest(GenerationRequest):
    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1)]


def _usage(answers):
    counts = {"prompt_tokens": answers.prompt_tokens, "completion_tokens": answers.completion_tokens}
    details = {"cached_tokens": answers.reused_prompt_tokens}
    return {**counts, "total_tokens": sum(counts.values()), "prompt_tokens_details": details}


def _event(data):
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _chat_choice(index, text, finish_reason):
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}


def _chat_delta(index, delta, finish_reason=None):
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _text_choice(index, text, finish_reason=None):
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _chat_deltas(piece):
    """A choice's last chunk is its finish reason alone."""
    if piece.text:
        yield _chat_delta(piece.choice, {"content": piece.text})
    if piece.finish_reason:
        yield _chat_delta(piece.choice, {}, piece.finish_reason)


async def _events(answers, body, head, first_choices, choices_of):
    """The stream of one request: `head` is what all chunks share, `choices_of(piece)` their choices."""
    usage = {"usage": None} if body.wants_usage else {}
    for choice in first_choices:
        yield _event({**head, "choices": [choice], **usage})
    try:
        async for piece in answers.pieces():
            for choice in choices_of(piece):
                yield _event({**head, "choices": [choice], **usage})
    except Exception as error:  # the status has been sent: the error can only follow in the stream
        logger.exception("an answer failed")
        yield _event({"error": {"message": str(error), "type": "server_error", "param": None, "code": "answer_failed"}})
        return
    if body.wants_usage:
        yield _event({**head, "choices": [], "usage": _usage(answers)})
    yield "data: [DONE]\n\n"


def openai_routes(service):
    """The router of these routes for one Service."""
    router = APIRouter(prefix="/v1")
    created = int(time.time())
    card = {"id": service.model.name, "object": "model", "created": created, "owned_by": "megalith"}
    card["max_model_len"] = service.model.context_length

    def check_model(name):
        if name is not None and name != service.model.name:
            raise ApiError(
                404, f"no model '{name}'; this server has '{service.model.name}'", code="model_not_found", param="model"
            )

    def head(prefix, kind):
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": service.model.name,
        }

    @router.get("/models")
    async def models():
        return {"object": "list", "data": [card]}

    @router.get("/models/{name:path}")
    async def model(name: str):
        check_model(name)
        return card

    @router.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request):
        check_model(body.model)
        prompt = await service.chat_prompt([message.as_dict() for message in body.messages])
        max_tokens = body.max_completion_tokens or body.max_tokens
        answers = service.answers([prompt], body, max_tokens, body.stop_strings, body.n)
        if body.stream:
            shared = head("chatcmpl", "chat.completion.chunk")
            roles = [_chat_delta(index, {"role": "assistant", "content": ""}) for index in range(body.n)]
            return EventStream(service, answers, _events(answers, body, shared, roles, _chat_deltas))
        texts, reasons = await whole_texts(service, answers, request)
        choices = [_chat_choice(*choice) for choice in zip(range(body.n), texts, reasons, strict=True)]
        return {**head("chatcmpl", "chat.completion"), "choices": choices, "usage": _usage(answers)}

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request):
        check_model(body.model)
        prompts = await run_in_threadpool(_prompts, body.prompt, service.model)
        answers = service.answers(prompts, body, body.max_tokens, body.stop_strings, body.n)
        if body.stream:
            shared = head("cmpl", "text_completion")
            choices_of = lambda piece: [_text_choice(piece.choice, piece.text, piece.finish_reason)]  # noqa: E731
            return EventStream(service, answers, _events(answers, body, shared, [], choices_of))
        texts, reasons = await whole_texts(service, answers, request)
        choices = [_text_choice(*choice) for choice in zip(range(len(texts)), texts, reasons, strict=True)]
        return {**head("cmpl", "text_completion"), "choices": choices, "usage": _usage(answers)}

    return router


def _prompts(prompt, model):
    """The token ids of one prompt or several, text or ids."""
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = prompt if several else [prompt]
    for ids in prompts:
        if isinstance(ids, list) and max(ids) >= model.vocab_size:
            raise ApiError(400, f"token id {max(ids)}; the vocabulary has {model.vocab_size}", param="prompt")
    return [model.tokenizer(each).input_ids if isinstance(each, str) else each for each in prompts]
