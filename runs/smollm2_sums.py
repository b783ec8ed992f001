"""Two-digit sums asked in words: FOLDER/train.jsonl, and held_out.jsonl with 200 of the 8,100.

python runs/smollm2_sums.py out/smollm2
"""

import json
import random
import sys
from pathlib import Path

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
random.Random(0).shuffle(pairs)
for name, part in (("train", pairs[:-200]), ("held_out", pairs[-200:])):
    with open(folder / f"{name}.jsonl", "w") as file:
        for a, b in part:
            text = f"What is {a}+{b}? Answer with the number only."
            row = {"prompt": [{"role": "user", "content": text}], "answer": str(a + b)}
            file.write(json.dumps(row) + "\n")
