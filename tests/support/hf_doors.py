"""Tokenize the same prompts through every door of transformers.

It imports nothing of this project, so that it also runs with another version of transformers:
`echo '[["folder", ["a text", ...]], ...]' | python hf_doors.py`.
"""

import json
import sys
from typing import Any

from PIL import Image as PILImage
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

Message = dict[str, Any]


def fill(messages: list[Message], image: object) -> list[Message]:
    """Return the messages with a picture in each item of type image."""
    return [
        {**message, "content": [{**item, "image": image} if item["type"] == "image" else item for item in content]}
        if isinstance(content := message["content"], list)
        else message
        for message in messages
    ]


def chat(processor: Any, messages: list[Message], image: object) -> dict[str, list[int]]:
    """Return the ids of a conversation by door; those of the processor have all placeholders of an image."""
    tokenizer = processor.tokenizer
    num_images = sum(
        item["type"] == "image" for m in messages if isinstance(m["content"], list) for item in m["content"]
    )
    pictures = {"images": [image] * num_images} if num_images else {}
    filled = fill(messages, image)
    begins = {"add_generation_prompt": True}
    text = processor.apply_chat_template(messages, **begins)
    own_text = tokenizer.apply_chat_template(messages, tokenize=False, **begins)
    ids = {
        "processor(text)": processor(text=text, **pictures)["input_ids"][0],
        "processor(text of the tokenizer)": processor(text=own_text, **pictures)["input_ids"][0],
        "tokenizer.apply_chat_template": tokenizer.apply_chat_template(messages, return_dict=True, **begins)[
            "input_ids"
        ],
        # What the chat endpoint of vLLM does.
        "tokenizer(text, without special tokens)": tokenizer(text, add_special_tokens=False)["input_ids"],
    }
    if all(isinstance(message["content"], list) for message in messages):
        made = processor.apply_chat_template(filled, tokenize=True, return_dict=True, **begins)
        ids["processor.apply_chat_template"] = made["input_ids"][0]
    return ids


def bare(processor: Any, text: str, image: object) -> dict[str, list[int]]:
    """Return the ids of a text by door."""
    num_images = text.count(processor.image_token)
    pictures = {"images": [image] * num_images} if num_images else {}
    return {
        "processor(text)": processor(text=text, **pictures)["input_ids"][0],
        "tokenizer(text)": processor.tokenizer(text)["input_ids"],
    }


def answer(folder: str, requests: list[Any]) -> dict[str, Any]:
    """Return the ids of the requests, conversations (lists of messages) and bare texts, and what `generate` does.

    Returns:
        `ids`: for each request the ids by door; `inputs`: names of what the processor returns; `num_generated`: tokens
        that `generate` makes of it.
    """
    processor = AutoProcessor.from_pretrained(folder)
    image = PILImage.new("RGB", (40, 30), (200, 30, 90))
    ids = [(bare if isinstance(one, str) else chat)(processor, one, image) for one in requests]
    inputs = processor(images=image, text="<image>\nWhat is it?", return_tensors="pt")
    made = LlavaForConditionalGeneration.from_pretrained(folder).generate(**inputs, max_new_tokens=3, do_sample=False)
    return {"ids": ids, "inputs": sorted(inputs), "num_generated": made.size(1) - inputs["input_ids"].size(1)}


if __name__ == "__main__":
    logging.set_verbosity_error()
    json.dump([answer(folder, requests) for folder, requests in json.load(sys.stdin)], sys.stdout)
