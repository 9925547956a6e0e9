"""Files of the language model, apart from its weights and settings: tokenizer, chat template, generation settings."""

from pathlib import Path

from megatron_vlm.convert.family import Serving
from megatron_vlm.convert.files.processor import chat_template, generation_config
from megatron_vlm.convert.files.tokenizer import AddedTokens, write_tokenizer
from megatron_vlm.convert.folder import write_json
from megatron_vlm.data.text.templates import stop_ids


def write_language_files(folder: Path, serving: Serving) -> AddedTokens:
    """Write the files into a folder; return the tokens that it adds to those of the tokenizer."""
    language, tokenizer, template = serving.model.language, serving.tokenizer, serving.template
    added = write_tokenizer(folder, tokenizer, language)
    generation = generation_config(language, bos_id=tokenizer.bos_id, eos_ids=sorted(stop_ids(template, tokenizer)))
    write_json(folder / "generation_config.json", generation)
    if template.question_text:
        bos, eos = tokenizer.bos, tokenizer.piece(tokenizer.eos_id)
        text = chat_template(template, serving.system, start=added.start, bos=bos, eos=eos, image=added.image)
        (folder / "chat_template.jinja").write_text(text)
    return added
