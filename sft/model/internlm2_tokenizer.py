"""InternLM2's tokenizer, from the directory's `tokenizer.model`, without the directory's code.

Takes a published directory, gives a tokenizer whose ids are those of the published InternLM2Tokenizer: text between
added tokens goes to sentencepiece piece by piece, each piece with sentencepiece's own leading-space mark, and `<s>`
comes first. The library that made the file reads it, since conversions to other formats drop its normalization. It does
not know templates or images.
"""

import shutil
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizer

FILE = "tokenizer.model"


def read(directory: Path, settings: dict) -> PreTrainedTokenizer:
    """The tokenizer of a directory whose tokenizer_config.json, the `settings`, names InternLM2Tokenizer."""
    tokenizer = InternLM2Tokenizer.from_pretrained(directory)
    # transformers 5 takes these two from a tokenizer.json that lies there, which the published class does not read.
    tokenizer.add_bos_token = settings.get("add_bos_token", True)
    tokenizer.add_eos_token = settings.get("add_eos_token", False)
    return tokenizer


class InternLM2Tokenizer(PreTrainedTokenizer):
    """The published class's behaviour; transformers keeps the added tokens and cuts the text at them."""

    vocab_files_names = {"vocab_file": FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | None,
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        pad_token: str = "</s>",
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        sp_model_kwargs: dict | None = None,
        **others,
    ):
        if vocab_file is None:
            raise ValueError(f"no {FILE} in it")  # transformers words an OSError anew
        self.vocab_file, self.add_bos_token, self.add_eos_token = vocab_file, add_bos_token, add_eos_token
        self.sp_model_kwargs = sp_model_kwargs or {}
        self.pieces = sentencepiece.SentencePieceProcessor(**self.sp_model_kwargs)
        self.pieces.Load(vocab_file)
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            sp_model_kwargs=self.sp_model_kwargs,
            **others,
        )

    @property
    def vocab_size(self) -> int:
        """Of sentencepiece's own pieces, without the added tokens."""
        return self.pieces.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Piece or added token -> id."""
        return {self.pieces.IdToPiece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None):
        """Ids with `<s>` before and, where asked for, `</s>` after them."""
        start = [self.pieces.bos_id()] if self.add_bos_token else []
        return start + token_ids_0 + (token_ids_1 or []) + ([self.pieces.eos_id()] if self.add_eos_token else [])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces, and of added tokens as they are."""
        text, pending = "", []
        for token in [*tokens, None]:
            if token is not None and token not in self.added_tokens_encoder:
                pending.append(token)
                continue
            text += self.pieces.decode(pending) + (token or "")
            pending = []
        return text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies tokenizer.model."""
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{FILE}"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def _tokenize(self, text: str, **_) -> list[str]:
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.IdToPiece(index)
