"""Tokens to text while they arrive: whole characters only, and nothing of a stop string.

What has been handed out is never taken back, so text is held back while a later token could still change it: the bytes
of a character that is not complete, and the beginning of a stop string.
"""

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_WAIT = 16  # tokens; a model that writes invalid bytes for ever must not make decoding slower and slower


class CharacterStream:
    """Decodes tokens one at a time. The pieces joined are what the tokenizer makes of all tokens at once, wherever
    these are valid UTF-8.

    Tokens are decoded together with those of the piece before: some tokenizers drop the space that begins a text. An
    unfinished character shows as up to three replacement characters at the end (one for each byte, or one for all).
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._context, self._pending = [], []  # tokens handed out last, and those after them
        self._handed_out = 0  # characters of `_pending` that have left already

    def push(self, token):
        """Take one token; return the text that it makes certain."""
        self._pending.append(token)
        text = self._pending_text()
        if not text.endswith(UNFINISHED):
            return self._hand_out(text, len(text))
        if len(self._pending) > LONGEST_WAIT:
            return self._hand_out(text, len(text))
        held = min(3, len(text) - len(text.rstrip(UNFINISHED)))
        piece, self._handed_out = text[self._handed_out : len(text) - held], max(self._handed_out, len(text) - held)
        return piece

    def finish(self):
        """The rest, be it whole or not."""
        text = self._pending_text()
        return self._hand_out(text, len(text))

    def _pending_text(self):
        before = self._decode(self._context)
        both = self._decode(self._context + self._pending)
        # Where the bytes before are no longer what they were (invalid ones joined them), the new tokens stand alone.
        return both[len(before) :] if both.startswith(before) else self._decode(self._pending)

    def _hand_out(self, text, end):
        piece = text[self._handed_out : end]
        self._context, self._pending, self._handed_out = self._pending, [], 0
        return piece

    def _decode(self, tokens):
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class TextStream:
    """Characters of one answer up to the first of the `stop` strings, which is left out.

    `stopped` turns true when one was found; whoever feeds tokens should then stop.
    """

    def __init__(self, tokenizer, stop=()):
        self._characters = CharacterStream(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token):
        """Take one token; return the text that it makes certain."""
        return self._advance(self._characters.push(token))

    def finish(self):
        """The text still held back: no more tokens will come."""
        piece = self._advance(self._characters.finish()) + self._held
        self._held = ""
        return piece

    def _advance(self, text):
        if self.stopped:
            return ""
        text = self._held + text
        found = [position for position in (text.find(stop) for stop in self._stop) if position >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = _longest_beginning(text, self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _longest_beginning(text, stops):
    """How many characters at the end of `text` could be the beginning of one of `stops`."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
