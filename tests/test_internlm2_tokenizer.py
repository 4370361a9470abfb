"""Protects InternLM2's tokenizer: its ids are those that the published tokenization_internlm2.py gave, text by text.

golden/internlm2_tokens.json holds the ids of the published class, bos and eos included, for four kinds of directory; a
kind that is not named in a case gave the same ids as `published` did.
"""

import json
from pathlib import Path

import pytest
from internlm2_files import ROWS, write_tokenizer
from tokenizers import processors
from transformers import LlamaTokenizer

from sft.config import UserError
from sft.model import published_tokenizer
from sft.model.internlm2_tokenizer import InternLM2Tokenizer
from sft.model.preprocess import TEMPLATES, PreprocessInternVL

GOLDEN = json.loads((Path(__file__).parent / "golden" / "internlm2_tokens.json").read_text(encoding="utf-8"))
BOS, EOS = 1, 2


@pytest.mark.parametrize("kind", GOLDEN["kinds"])
def test_ids_are_those_of_the_published_tokenizer(tmp_path, kind):
    tokenizer = published_tokenizer.read(write_tokenizer(tmp_path, kind))
    expected = {case["text"]: case.get(kind, case["published"]) for case in GOLDEN["cases"]}
    assert len(expected) > 90 and len(tokenizer) == ROWS
    assert {text: tokenizer.encode(text) for text in expected} == expected
    bare = {text: tokenizer.encode(text, add_special_tokens=False) for text in expected}
    ends = (kind != "no bos, eos", -1 if kind == "no bos, eos" else None)
    assert bare == {text: ids[ends[0] : ends[1]] for text, ids in expected.items()}


def test_the_prompt_begins_with_bos_and_ends_at_seg(tmp_path):
    tokenizer = published_tokenizer.read(write_tokenizer(tmp_path))
    preprocess = PreprocessInternVL(tokenizer, TEMPLATES["internlm2_chat"], 56, 4, 12, True, sam2_px=128)
    ids = preprocess.prompt(["Please segment  the vessels."], [(1, 2, 2)]).input_ids_BL[0].tolist()
    words = "<|im_start|>user\n<img>" + "<IMG_CONTEXT>" * 4 + "</img>\nPlease segment  the vessels.<|im_end|>\n"
    assert tokenizer.decode(ids) == f"<s>{words}<|im_start|>assistant\n Sure, [SEG]"
    assert ids[0] == BOS and ids[-1] == preprocess.seg_token_id == 711
    assert preprocess.stop_token_ids == [711, 701]


def test_a_tokenizer_json_that_lies_there_changes_nothing(tmp_path):
    """As LlamaTokenizer's fast form leaves it, with `<s>` first, where tokenizer_config.json wants none."""
    write_tokenizer(tmp_path, "no bos, eos")
    before = published_tokenizer.read(tmp_path)
    backend = LlamaTokenizer.from_pretrained(tmp_path).backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0", special_tokens=[("<s>", BOS)])
    backend.save(str(tmp_path / "tokenizer.json"))
    after = published_tokenizer.read(tmp_path)
    assert [after.encode(text) for text in ("a", "[SEG] b")] == [before.encode(text) for text in ("a", "[SEG] b")]
    assert after.encode("a")[0] != BOS and after.encode("a")[-1] == EOS


def test_vocabulary_and_files_make_the_round_trip(tmp_path):
    tokenizer = InternLM2Tokenizer.from_pretrained(write_tokenizer(tmp_path / "a"))
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(ROWS)) and vocabulary["[SEG]"] == 711
    tokenizer.save_pretrained(tmp_path / "b")
    again = InternLM2Tokenizer.from_pretrained(tmp_path / "b")
    assert again.get_vocab() == vocabulary
    text = "<|im_start|>  vessels\n[SEG] <p>x</p>"
    assert again.encode(text) == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == f"<s>{text}".replace(" ", "")


def test_a_directory_without_its_model_or_with_half_of_it_is_one_line(tmp_path):
    directory = write_tokenizer(tmp_path)
    file = directory / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=f"{directory}: its InternLM2Tokenizer cannot be read .*copy the published"):
        published_tokenizer.read(directory)
    file.unlink()
    with pytest.raises(UserError, match=f"{directory}: its InternLM2Tokenizer cannot be read .*no tokenizer.model"):
        published_tokenizer.read(directory)
