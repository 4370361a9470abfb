"""Tokenizers of the class LlamaTokenizer, with the ids that transformers 4 gives on the same directory.

Takes a published directory, gives a tokenizer. transformers 5 builds its LlamaTokenizer anew from the vocabulary and
drops the normalizer of a tokenizer.json; text next to an added token then falls into other pieces. So tokenizer.json is
read as it is, and only `<s>` and `</s>` go by tokenizer_config.json, as they did. It does not know templates.
"""

from pathlib import Path

from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sft.config import UserError


def read(directory: Path, settings: dict) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory whose tokenizer_config.json, the `settings`, names LlamaTokenizer.

    Raises:
        UserError: no tokenizer.json, and settings for which transformers 5 would make other pieces without it.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        if settings.get("legacy", True) is not False:
            raise UserError(
                f"{file}: no such file, and without it a tokenizer with legacy true cannot be read exactly; write it "
                "with transformers 4: AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
            )
        return LlamaTokenizer.from_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.add_bos_token = settings.get("add_bos_token", True)
    tokenizer.add_eos_token = settings.get("add_eos_token", False)
    tokenizer.update_post_processor()
    return tokenizer
