"""A client that stays: asks a node for one answer per line of JSON on stdin, and writes each as a line on stdout.

Run by `tests.bench.site` inside a namespace, where `agent generate` would start a new process for every prompt.
"""

import json
import sys

from agent.client import Answer, stream


def main() -> None:
    """Answer until stdin ends."""
    node, coordinator = sys.argv[1:]
    for line in sys.stdin:
        answer = Answer()
        for _ in stream(node, coordinator, answer, **json.loads(line)):
            pass
        print(json.dumps(answer.document()), flush=True)  # stdout is what it is for


if __name__ == "__main__":
    main()
