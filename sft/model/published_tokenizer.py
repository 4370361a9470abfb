"""The tokenizer of a published directory, by its concrete class, and whether it has the words that Sa2VA needs.

Takes a directory, gives transformers' tokenizer. It does not know config.json or templates.
"""

import functools
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from sft.config import UserError
from sft.model import internlm2_tokenizer, llama_tokenizer
from sft.model.published_json import read_json

# Of every family here, none of which is Mistral's: without it, transformers 5.17 warns of a wrong regex, wrongly, where
# config.json names no version of transformers.
AS_IT_IS = {"fix_mistral_regex": False}


def read(directory: Path) -> PreTrainedTokenizerBase:
    """The concrete tokenizer class: AutoTokenizer would ask on the terminal whether to run the directory's code.

    Raises:
        UserError: no tokenizer there, a kind that is not supported, or a broken file.
    """
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; copy the published model's tokenizer files there")
    settings = read_json(file)
    name = settings.get("tokenizer_class") or ""
    match name.removesuffix("Fast"):
        case "Qwen2Tokenizer":
            reader = functools.partial(Qwen2Tokenizer.from_pretrained, **AS_IT_IS)
        case "LlamaTokenizer":
            reader = functools.partial(llama_tokenizer.read, settings=settings)
        case "PreTrainedTokenizer" | "TokenizersBackend":
            reader = functools.partial(PreTrainedTokenizerFast.from_pretrained, **AS_IT_IS)
        case "InternLM2Tokenizer":
            reader = functools.partial(internlm2_tokenizer.read, settings=settings)
        case _:
            raise UserError(
                f"{file}: tokenizer_class {name!r} is not supported yet; supported: Qwen2Tokenizer, LlamaTokenizer, "
                "InternLM2Tokenizer, PreTrainedTokenizerFast"
            )
    try:
        return reader(directory)
    except UserError:
        raise
    except Exception as error:  # the tokenizers package raises bare Exception on a broken file
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{directory}: its {name} cannot be read ({reason}); copy the published tokenizer files again"
        ) from error


def check_words(tokenizer: PreTrainedTokenizerBase, needed: tuple[str, ...], rows: int, directory: Path) -> None:
    """Raises a UserError where a needed word is none of the tokenizer's, or beyond the model's `rows` of embeddings."""
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in needed if token not in vocabulary]
    if absent:
        raise UserError(
            f"{directory}: the tokenizer lacks {', '.join(absent)}; this is not a Sa2VA checkpoint's tokenizer"
        )
    beyond = [token for token in needed if vocabulary[token] >= rows]
    if beyond:
        raise UserError(
            f"{directory}: the tokenizer numbers {', '.join(beyond)} beyond the {rows} words of config.json; "
            "tokenizer and model are not of one checkpoint"
        )
