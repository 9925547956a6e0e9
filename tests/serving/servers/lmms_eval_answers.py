"""Answer with lmms-eval's adapter of LLaVA: python lmms_eval_answers.py FOLDER QUESTIONS.json ANSWERS.json."""

import json
import sys
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.models.simple.llava_hf import LlavaHf
from PIL import Image

folder, questions, answers = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
model = LlavaHf(pretrained=folder, device="cpu", device_map="cpu", dtype="float32", batch_size=1)
model.task_dict = {"vqa": {"test": questions}}


def pictures(question: dict) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in question["images"]]


requests = [
    Instance(
        request_type="generate_until",
        arguments=(question["text"], {"max_new_tokens": question["max_new_tokens"]}, pictures, place, "vqa", "test"),
        idx=0,
        metadata={"task": "vqa", "doc_id": place, "repeats": 1},
    )
    for place, question in enumerate(questions)
]
answers.write_text(json.dumps(model.generate_until(requests)))
