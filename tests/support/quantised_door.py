"""Load a quantised folder with transformers, as a script in an environment that has the packages for it.

    python tests/support/quantised_door.py FOLDER OUTPUT < IDS

`IDS` is a JSON list of token ids; `OUTPUT` gets the logits, float32[s, v], and the class of the first quantised module.
"""

import json
import sys

import torch
from transformers import LlavaForConditionalGeneration


def main() -> None:
    """Run the model on a text."""
    folder, output = sys.argv[1:]
    ids = torch.tensor([json.load(sys.stdin)])
    model = LlavaForConditionalGeneration.from_pretrained(folder, device_map="cpu").eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float()
    (module,) = (one for name, one in model.named_modules() if name.endswith("language_model.layers.0.mlp.down_proj"))
    torch.save({"logits": logits, "module": type(module).__name__}, output)


if __name__ == "__main__":
    main()
