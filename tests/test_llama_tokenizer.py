"""Protects tokenizers of the class LlamaTokenizer: their ids are those of transformers 4.

Text next to added tokens is where they part: transformers 4's LlamaTokenizer with `legacy` true, slow and fast, and the
published InternLM2Tokenizer gave the same ids of these texts on this sentencepiece model; one golden file serves both.
"""

import json
from pathlib import Path

import pytest
from internlm2_files import ADDED, SPECIAL, write_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaTokenizer

from sft.config import UserError
from sft.model import published_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "internlm2_tokens.json").read_text(encoding="utf-8"))


def write(directory: Path, **changes) -> Path:
    """tokenizer.json as transformers 4 wrote it for a Llama tokenizer with legacy true, `<s>` first."""
    write_tokenizer(directory)
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizer", "legacy": True} | changes
    del settings["auto_map"]
    file.write_text(json.dumps(settings))
    built = json.loads(LlamaTokenizer.from_pretrained(directory, legacy=False).backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in built["merges"]]
    backend = Tokenizer(models.BPE(built["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", *SPECIAL, *ADDED])
    backend.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0", special_tokens=[("<s>", 1)])
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize("bos", [True, False, None])
def test_ids_are_those_of_transformers_4(tmp_path, bos):
    tokenizer = published_tokenizer.read(write(tmp_path, **({} if bos is None else {"add_bos_token": bos})))
    first = 0 if bos is not False else 1
    expected = {case["text"]: case["published"][first:] for case in GOLDEN["cases"]}
    assert {text: tokenizer.encode(text) for text in expected} == expected


def test_eos_goes_by_the_settings(tmp_path):
    tokenizer = published_tokenizer.read(write(tmp_path, add_eos_token=True))
    assert tokenizer.encode("") == [1, 2]


def test_without_tokenizer_json_only_what_is_exact_is_read(tmp_path):
    (write(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json: no such file, and without it a tokenizer with legacy true"):
        published_tokenizer.read(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"legacy": False}))
    assert published_tokenizer.read(tmp_path).encode("Sure, [SEG].<|im_end|>")[-3] == 711
