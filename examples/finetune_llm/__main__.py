"""Fine-tunes a language model from its Hugging Face folder, on a laptop or a pod.

pip install -e '.[llm]'
python -m examples.finetune_llm --model DIR --data train.jsonl --output OUT
python -m examples.finetune_llm --demo          # no folder needed: a few minutes
"""

import os
import sys
from collections.abc import Sequence

from examples.finetune_llm.errors import Refused
from examples.finetune_llm.options import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; what it refuses is one line, and the exit status is 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options = parse(argv, __doc__)
        from examples.finetune_llm.job import run  # takes seconds

        run(options)
    except Refused as error:
        print(f"finetune_llm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
