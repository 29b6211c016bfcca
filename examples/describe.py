"""Says what is in pictures.

```shell
python examples/describe.py --model examples/tiny/checkpoint/stage1 photo.jpg https://example.org/picture.png
```

Prints a line for each picture. A picture that cannot be read is named on stderr, the others still get their sentence,
and the exit status is 1 then.
"""

import argparse
import json
import sys
from typing import Any

import torch
from tqdm import tqdm
from transformers import pipeline

import modeling_minigpt4  # noqa: F401 - registers the model
from processing import load_rgb_image


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file or a URL")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint: a folder or a repository")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to ask. Default: what the checkpoint was trained to be asked"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list with image and text (or error) of each")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--untrained", action="store_true", help="draw a fresh projection, to see what is said without training"
    )
    return parser.parse_args()


def describe(pipe: Any, source: str, prompt: str | None) -> dict[str, str]:
    """The record of a picture: what is said, or why it cannot be read."""
    try:
        return {"image": source, "text": pipe(load_rgb_image(source, timeout=30), text=prompt)[0]["generated_text"]}
    except ValueError as error:
        tqdm.write(f"error: {source}: {error}", file=sys.stderr)
        return {"image": source, "error": str(error)}


def main() -> None:
    arguments = parse_arguments()
    try:
        pipe = pipeline("image-to-text", model=arguments.model, max_new_tokens=arguments.max_new_tokens)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if arguments.untrained:
        torch.manual_seed(0)
        pipe.model.init_projection()
    records = []
    for source in tqdm(arguments.images, disable=len(arguments.images) == 1, unit="picture"):
        records.append(describe(pipe, source, arguments.prompt))
        if not arguments.json and "text" in records[-1]:
            tqdm.write(f"{source}: {records[-1]['text']}", file=sys.stdout)
    if arguments.json:
        print(json.dumps(records, ensure_ascii=False, indent=2))
    sys.exit(int(any("error" in record for record in records)))


if __name__ == "__main__":
    main()
