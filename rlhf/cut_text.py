"""Plain text as rows for pretraining, cut where sentences end.

    megalith cut-text book.txt rows.jsonl --max_chars 2000

Every row is `{"text": …}` of at most so many characters; together the rows are the text, character for character.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from tqdm import tqdm

from .errors import InputError, exit_on_input_error

# A sentence ends with its mark, closing quotes and brackets after it, and the space up to the next.
SENTENCE_END = re.compile(r"""(?:[。.!?！？]+["'”’)\]」』）]*|\n)\s*""")


def cut(text, max_chars):
    """Pieces of `text`, which they add up to: as many whole sentences as fit into `max_chars`; a longer sentence is cut
    at its last space that fits, or inside of a word where there is none."""
    pieces, start = [], 0
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    position = 0
    while start < len(text):
        stop = None
        while position < len(ends) and ends[position] - start <= max_chars:
            stop = ends[position]
            position += 1
        if stop is None:
            space = text.rfind(" ", start, start + max_chars)
            stop = space + 1 if space > start else start + max_chars
        pieces.append(text[start:stop])
        start = stop
    return pieces


def main(argv=None):
    exit_on_input_error(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv):
    parser = argparse.ArgumentParser(prog="megalith cut-text", description=__doc__.split("\n")[0])
    parser.add_argument("input", type=Path, help="UTF-8 text")
    parser.add_argument("output", type=Path, help="jsonl file to write")
    parser.add_argument("--max_chars", type=int, default=2000, help="the most characters a row")
    options = parser.parse_args(argv)
    if options.max_chars < 1:
        raise InputError(f"--max_chars is {options.max_chars}; it has to be at least 1")
    try:
        text = options.input.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{options.input}: cannot be read: {error}") from None
    pieces = [piece for piece in cut(text, options.max_chars) if piece.strip()]
    if not pieces:
        raise InputError(f"{options.input}: has no text")
    try:
        with options.output.open("w", encoding="utf-8") as file:
            for piece in tqdm(pieces, unit="row", dynamic_ncols=True):
                file.write(json.dumps({"text": piece}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{options.output}: cannot be written: {error.strerror}") from None
    print(f"{options.output}: {len(pieces)} rows, {len(text)} characters")


if __name__ == "__main__":
    main()
