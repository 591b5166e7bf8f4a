"""The announcement's routes: /generate answers with a JSON string, /generate/stream with events `generate`, then `end`.

The last turn of `history` is the question, and its response is to be empty.
"""

import logging

from fastapi import APIRouter, Request
from pydantic import Field, model_validator

from .server_service import EventStream, SamplingFields, Strict, whole_texts

logger = logging.getLogger(__name__)


class Turn(Strict):
    instruction: str = Field(max_length=10_000_000)
    response: str = Field("", max_length=10_000_000)


class GenerateRequest(SamplingFields):
    history: list[Turn] = Field(min_length=1)
    max_new_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ends_with_a_question(self):
        if self.history[-1].response:
            raise ValueError("the last turn of 'history' has a response already")
        return self

    def messages(self):
        turns = [("user", turn.instruction, "assistant", turn.response) for turn in self.history]
        messages = [{"role": role, "content": text} for turn in turns for role, text in (turn[:2], turn[2:])]
        return messages[:-1]


def _event(name, text):
    """One server-sent event; a line break in `text` begins another data line, as the format wants it."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return f"event: {name}\n" + "".join(f"data: {line}\n" for line in lines) + "\n"


async def _events(answers):
    try:
        async for piece in answers.pieces():
            if piece.text:
                yield _event("generate", piece.text)
    except Exception as error:
        logger.exception("an answer failed")
        yield _event("error", str(error))
    yield _event("end", "")


def generate_routes(service):
    """The router of these routes for one Service."""
    router = APIRouter()

    async def start(body):
        prompt = await service.chat_prompt(body.messages())
        return service.answers([prompt], body, body.max_new_tokens, max_tokens_name="max_new_tokens")

    @router.post("/generate")
    async def generate(body: GenerateRequest, request: Request):
        texts, _ = await whole_texts(service, await start(body), request)
        return texts[0]

    @router.post("/generate/stream")
    async def generate_stream(body: GenerateRequest):
        answers = await start(body)
        return EventStream(service, answers, _events(answers))

    return router
