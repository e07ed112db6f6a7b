"""Measure the time to tokenise a text of 20 MB with a limit of 8,192 tokens.

python loadtest/truncation.py
"""

from __future__ import annotations

import argparse
import time

from report import spread, write_result
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.core.tokenizer import TextTokenizer
from taskvec.errors import InvalidRequestError

BYTES = 20_000_000
LIMIT = 8192
TEXTS = {
    "English": "The quick brown fox jumps over the lazy dog, and nobody minds at all.\n",
    "white space": " ",
    "one letter": "a",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    tokenizer = TextTokenizer(
        checkpoint.tokenizer,
        max_tokens=LIMIT,
        vocabulary=checkpoint.card.vocabulary,
        threads=1,
    )
    figures = {}
    for name, piece in TEXTS.items():
        text = piece * (BYTES // len(piece))
        for truncate in (True, False):
            times = []
            for _ in range(options.rounds):
                started = time.perf_counter()
                try:
                    (ids,) = tokenizer.encode_now([text], prompt="Document: ", truncate=truncate)
                    outcome = f"{len(ids)} tokens"
                except InvalidRequestError as error:
                    outcome = error.code
                times.append((time.perf_counter() - started) * 1000)
            case = f"{name}, {'truncate' if truncate else 'no truncate'}: {outcome}"
            figures[case] = spread(times)
            print(case, figures[case], flush=True)
    tokenizer.close()
    write_result("truncation", {"bytes": BYTES, "limit": LIMIT, "milliseconds": figures})


if __name__ == "__main__":
    main()
