"""One side of `benchmark.py tokenize`: reads and tokenizes a file as often as it is asked to, and says what it took.

The package is the one on the path, be it this checkout or another; so nothing is used but what has long been there.
"""

import hashlib
import json
import sys
import time

from prefalign_jax.data.chat import load_tokenizer, tokenize_records
from prefalign_jax.data.records import read_records


def main(data: str, tokenizer: str, chat_template: str, max_length: str) -> None:
    """For each line that is read prints processor seconds of reading and of tokenizing, pairs, and a digest."""
    loaded = load_tokenizer(tokenizer, chat_template or None)
    for _ in sys.stdin:
        times = [time.process_time()]
        records, _ = read_records(data)
        times.append(time.process_time())
        pairs, _ = tokenize_records(records, loaded, max_length=int(max_length))
        times.append(time.process_time())
        digest = hashlib.sha256()
        for pair in pairs:
            for ids in (pair.prompt, pair.chosen, pair.rejected):
                digest.update(ids.tobytes() + b"\0")
        print(json.dumps([times[1] - times[0], times[2] - times[1], len(pairs), digest.hexdigest()]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
