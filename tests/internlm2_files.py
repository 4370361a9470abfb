"""The tokenizer files of an InternLM2 checkpoint, of a sentencepiece model of 700 pieces (BPE, byte fallback)."""

import json
import shutil
from pathlib import Path

MODEL = Path(__file__).parent / "golden" / "internlm2_tokenizer.model"
PIECES = 700
SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>")
SPECIAL += ("<box>", "</box>")
ADDED = ("[SEG]", "<p>", "</p>", "<vp>", "</vp>")
ROWS = PIECES + len(SPECIAL) + len(ADDED)


def write_tokenizer(directory: Path, kind: str = "published") -> Path:
    """Writes a directory's tokenizer files as the published checkpoints have them, or a variant of them."""
    directory.mkdir(exist_ok=True)
    shutil.copyfile(MODEL, directory / "tokenizer.model")
    ids = {token: PIECES + index for index, token in enumerate(SPECIAL + ADDED)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(index): {"content": token} | flags for index, token in enumerate(("<unk>", "<s>", "</s>"))}
    decoder |= {str(index): {"content": token} | flags for token, index in ids.items()}
    settings = {"tokenizer_class": "InternLM2Tokenizer", "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    settings |= {"additional_special_tokens": list(SPECIAL), "clean_up_tokenization_spaces": False}
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}
    settings |= {"added_tokens_decoder": decoder, "model_max_length": 8192}
    words = {"[SEG]": {"special": False, "normalized": True}, "<vp>": {"lstrip": True}, "</vp>": {"rstrip": True}}
    words |= {"<p>": words["[SEG]"], "</p>": words["[SEG]"]}
    match kind:
        case "published":
            pass
        case "added_tokens.json alone":
            del settings["added_tokens_decoder"]
        case "plain words":
            for one in decoder.values():
                one |= words.get(one["content"], {})
        case "no bos, eos":
            settings |= {"add_bos_token": False, "add_eos_token": True}
        case _:
            raise ValueError(f"kind {kind!r}: see the cases above")
    named = {name: settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "added_tokens.json").write_text(json.dumps(ids))
    (directory / "special_tokens_map.json").write_text(json.dumps(named | {"additional_special_tokens": list(SPECIAL)}))
    return directory
