"""Conversations as segments of text, and segments as tokens with a mask that says which are trained.

Each segment is tokenised on its own and the mask follows from the lengths: nothing is ever inferred from token ids,
so a prompt may hold end-of-sequence or padding tokens, and no token is merged across the border between a prompt and
a completion.
"""

from dataclasses import dataclass, replace

import jinja2
import numpy as np

from .errors import InputError

ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Segment:
    """Text that is trained or not; `eos`: the tokenizer's end-of-sequence token follows it."""

    text: str
    trained: bool
    eos: bool = False


@dataclass(frozen=True)
class Sample:
    """One row of training data: `ids` int32 [T], `trained` bool [T]. A position is learned when it is trained and not
    the first.
    """

    ids: np.ndarray
    trained: np.ndarray

    def __len__(self):
        return len(self.ids)

    @property
    def loss_tokens(self):
        return int(self.trained[1:].sum())

    @property
    def positions(self):
        """How many positions a model needs for it."""
        return len(self)

    @property
    def attended(self):
        """Pairs of tokens of which one attends to the other, for counting operations."""
        return len(self) * (len(self) + 1) // 2

    def arrays(self):
        """What makes it different from another, for fingerprints."""
        yield self.ids
        yield self.trained

    def blank(self):
        """One like it with nothing to learn: a rank without work still takes part in the collectives of the others."""
        return Sample(self.ids, np.zeros_like(self.trained))


def prompt_renderer(tokenizer, prompt_format):
    """Return render(messages, add_generation_prompt, tools) -> str for "auto", "chat", "alpaca" or "plain".

    "auto" is "chat" where the tokenizer has a chat template and "alpaca" elsewhere. Raises InputError when "chat" is
    asked of a tokenizer that has none, and when the tokenizer has no end-of-sequence token, which every completion
    has to end with.
    """
    if tokenizer.eos_token is None:
        raise InputError("the tokenizer has no eos token: set eos_token in its tokenizer_config.json")
    if prompt_format == "auto":
        prompt_format = "chat" if tokenizer.chat_template else "alpaca"
    if prompt_format == "chat":
        if not tokenizer.chat_template:
            raise InputError("--prompt_format chat, but the tokenizer has no chat template; use alpaca or plain")
        return lambda messages, add_generation_prompt, tools: tokenizer.apply_chat_template(
            [_with_joined_input(message) for message in messages],
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    render = {"alpaca": _render_alpaca, "plain": _render_plain}[prompt_format]
    return lambda messages, add_generation_prompt, tools: render(messages, add_generation_prompt, tokenizer.eos_token)


def _with_joined_input(message):
    if "input" not in message:
        return message
    joined = {key: value for key, value in message.items() if key != "input"}
    return {**joined, "content": f"{message['content']}\n{message['input']}"}


def _render_alpaca(messages, add_generation_prompt, eos_token):
    has_input = any("input" in message for message in messages)
    preamble = ALPACA_PREAMBLE_WITH_INPUT if has_input else ALPACA_PREAMBLE
    parts = []
    for message in messages:
        if message["role"] == "system":
            preamble = message["content"]
        elif message["role"] == "user":
            parts.append(f"### Instruction:\n{message['content']}\n\n")
            if "input" in message:
                parts.append(f"### Input:\n{message['input']}\n\n")
        elif message["role"] == "assistant":
            parts.append(f"### Response:\n{message['content']}{eos_token}\n\n")
        else:
            raise InputError(
                f"the Alpaca prompt has no place for role '{message['role']}'; use a tokenizer with a chat template"
            )
    return f"{preamble}\n\n" + "".join(parts) + ("### Response:\n" if add_generation_prompt else "")


def _render_plain(messages, add_generation_prompt, eos_token):
    return "".join(
        message["content"] + message.get("input", "") + (eos_token if message["role"] == "assistant" else "")
        for message in messages
    )


def segments_of(conversation, render, eos_token):
    """Return samples, each a list of Segments, in which every assistant turn is trained exactly once.

    A turn's prompt is what the model will be given when it has to write that turn: the messages before it, with the
    generation prompt. While the rendered history only grows, the turns share one sample; a template that rewrites
    earlier turns (some drop the reasoning of past answers) starts a new sample there. Every sample ends with the
    end-of-sequence token, trained.
    """
    samples, text = [], None
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        try:
            prompt = render(conversation.messages[:index], True, conversation.tools)
            whole = render(conversation.messages[: index + 1], False, conversation.tools)
        except (InputError, jinja2.TemplateError) as error:
            raise InputError(f"{conversation.source}: the prompt cannot be rendered: {error}") from None
        if not whole.startswith(prompt):
            raise InputError(
                f"{conversation.source}: the chat template renders message {index} differently from its generation "
                "prompt, so the tokens to train on cannot be told apart; use --prompt_format alpaca or another template"
            )
        completion, has_eos = _cut_after_eos(whole[len(prompt) :], eos_token)
        if text is not None and prompt.startswith(text):
            samples[-1].append(Segment(prompt[len(text) :], trained=False))
        else:
            samples.append([Segment(prompt, trained=False)])
        samples[-1].append(Segment(completion, trained=True, eos=has_eos))
        text = prompt + completion + (eos_token if has_eos else "")
    return [[*segments[:-1], replace(segments[-1], eos=True)] for segments in samples]


def _cut_after_eos(completion, eos_token):
    """Drop what a template puts after the end of the turn (a newline): the model stops before it."""
    head, eos, tail = completion.rpartition(eos_token)
    return (head, True) if eos and not tail.strip() else (completion, False)


def starts_with_bos(tokenizer):
    """Whether this tokenizer puts a beginning-of-sequence token before plain text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def encode(samples, tokenizer):
    """Tokenise lists of Segments into Samples. A tokenizer that begins plain text with BOS gets exactly one, whatever
    the template wrote.
    """
    texts = [segment.text for segments in samples for segment in segments]
    ids = iter(tokenizer(texts, add_special_tokens=False).input_ids if texts else [])
    bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    encoded = []
    for segments in samples:
        pieces = [(next(ids) + [tokenizer.eos_token_id] * segment.eos, segment.trained) for segment in segments]
        if bos and pieces[0][0][:1] != bos:
            pieces.insert(0, (bos, False))
        encoded.append(
            Sample(
                ids=np.array([token for tokens, _ in pieces for token in tokens], dtype=np.int32),
                trained=np.array([trained for tokens, trained in pieces for _ in tokens], dtype=bool),
            )
        )
    return encoded


def encode_prompt(messages, render, tokenizer, tools=None):
    """Token ids that ask for the next assistant turn, exactly as training has shown them."""
    return encode([[Segment(render(messages, True, tools), trained=False)]], tokenizer)[0].ids.tolist()
