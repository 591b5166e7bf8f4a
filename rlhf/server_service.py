"""What the routes share: the model, its batcher, the limits, and the way from a checked request to Answers."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Annotated

import jinja2
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from .batching import Batcher, ClosedError, QueueFullError
from .chat_model import ChatModel
from .errors import InputError
from .sampling import SamplingOptions
from .server_answers import Answers
from .server_metrics import Metrics
from .templates import encode_prompt

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """A request that gets an error for an answer: HTTP status, message, and OpenAI's `type`, `code` and `param`."""

    def __init__(self, status, message, kind="invalid_request_error", code=None, param=None):
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param


class Strict(BaseModel):
    """A JSON object that says no more than its fields. A null counts as absent, as clients write both."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values):
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class SamplingFields(Strict):
    """How tokens are chosen; shared by all routes."""

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)  # 0 and -1: all
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)


Stop = Annotated[str, Field(min_length=1, max_length=200)]


@dataclass(frozen=True)
class Limits:
    """Tokens that one answer may have, and answers that one request may ask for."""

    max_tokens: int
    max_choices: int = 16


@dataclass(frozen=True)
class Service:
    """One model behind all routes."""

    model: ChatModel
    batcher: Batcher
    metrics: Metrics
    limits: Limits

    async def chat_prompt(self, messages):
        """Token ids of a conversation that asks for the next assistant turn. Raises ApiError where the template refuses
        the messages.
        """
        try:
            return await run_in_threadpool(encode_prompt, messages, self.model.render, self.model.tokenizer)
        except (InputError, jinja2.TemplateError) as error:
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from None

    def answers(self, prompts, sampling, max_tokens, stop=(), n=1, max_tokens_name="max_tokens"):
        """Start `n` choices of each prompt (lists of token ids). Raises ApiError for what does not fit the limits and
        the context, and when the queue is full.
        """
        if len(prompts) * n > self.limits.max_choices:
            raise ApiError(400, f"{len(prompts) * n} answers asked for; one request gets {self.limits.max_choices}")
        lengths = [self._answer_length(len(prompt), max_tokens, max_tokens_name) for prompt in prompts]
        options = [[self._options(sampling, length, index) for index in range(n)] for length in lengths]
        try:
            return Answers(self.batcher, self.model.tokenizer, prompts, options, stop)
        except QueueFullError as error:
            raise ApiError(429, f"{error}; try again", kind="rate_limit_error", code="queue_full") from None
        except ClosedError:
            raise ApiError(503, "the server is stopping", kind="server_error", code="stopping") from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    def _answer_length(self, prompt_length, max_tokens, name):
        room = self.model.context_length - prompt_length
        if prompt_length == 0:
            raise ApiError(400, "the prompt has no tokens", param="prompt")
        if max_tokens is not None and max_tokens > self.limits.max_tokens:
            raise ApiError(
                400, f"{name} is {max_tokens} and this server's limit is {self.limits.max_tokens}", param=name
            )
        if room < (max_tokens or 1):
            raise ApiError(
                400,
                f"this model's context has {self.model.context_length} tokens; the prompt has {prompt_length} and the "
                f"answer asks for {max_tokens or 1}",
                code="context_length_exceeded",
                param="messages",
            )
        return max_tokens or min(room, self.limits.max_tokens)

    def _options(self, sampling, length, index):
        return SamplingOptions(
            max_new_tokens=length,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=max(sampling.top_k, 0),
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            stop_ids=self.model.stop_ids,
            seed=None if sampling.seed is None else (sampling.seed + index) % 2**63,
        )


class EventStream(StreamingResponse):
    """Server-sent events made from Answers, which are closed when the client has all of them or has gone."""

    def __init__(self, service, answers, events):
        super().__init__(self._until_end(events), media_type="text/event-stream; charset=utf-8")
        self._service, self._answers, self._finished = service, answers, False

    async def _until_end(self, events):
        async for event in events:
            yield event
        self._finished = True

    async def __call__(self, scope, receive, send):
        # Here and not in the generator, which never starts when the client is gone already.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()
            self._service.metrics.record(self._answers, self._finished)


async def whole_texts(service, answers, request):
    """Texts and finish reasons of all choices. Raises ApiError: 499 when the client goes away before they are there,
    500 when the model fails.
    """
    texts = asyncio.create_task(answers.texts())
    gone = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait({texts, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not texts.done():
            raise ApiError(499, "the client has gone", code="cancelled")
        return texts.result()
    except ApiError:
        raise
    except Exception as error:
        logger.exception("an answer failed")
        raise ApiError(500, f"the answer failed: {error}", kind="server_error", code="answer_failed") from None
    finally:
        finished = texts.done() and texts.exception() is None
        texts.cancel()
        gone.cancel()
        answers.close()
        service.metrics.record(answers, finished)


async def _until_gone(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass
