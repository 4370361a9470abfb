"""The embedded base's shape and tokenizer: a Sa2VA with all parts present, small enough for two CPU cores.

Gives the config.json of a published directory and a word-level tokenizer; it does not train or load anything.
"""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TINY_CONFIG = {
    "architectures": ["Sa2VAChatModel"],
    "model_type": "sa2va_chat",
    "template": "qwen_chat",
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "select_layer": -1,
    "force_image_size": 224,
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "image_size": 224,
        "patch_size": 14,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 512,
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "native": {
        "max_tiles": 1,
        "sam2_config": {
            "vision_config": {
                "model_type": "sam2_vision_model",
                "backbone_config": {
                    "model_type": "sam2_hiera_det_model",
                    "image_size": [512, 512],
                    "hidden_size": 32,
                    "num_attention_heads": 1,
                    "patch_stride": [2, 2],  # a grid of 256 x 256 at 512 px, as fine as the published one at 1024 px
                    "blocks_per_stage": [2, 3, 3, 2],
                    "embed_dim_per_stage": [32, 64, 128, 256],
                    "num_attention_heads_per_stage": [1, 2, 4, 8],
                    "window_size_per_stage": [8, 8, 8, 8],
                    "window_positional_embedding_background_size": [8, 8],
                    "global_attention_blocks": [9],
                },
                "backbone_channel_list": [256, 128, 64, 32],
                "backbone_feature_sizes": [[256, 256], [128, 128], [64, 64]],
                "fpn_hidden_size": 96,
                "fpn_top_down_levels": [0, 1, 2, 3],
            },
            "prompt_encoder_config": {"hidden_size": 96, "image_size": 512, "patch_size": 8},
            "mask_decoder_config": {
                "hidden_size": 96,
                "mlp_dim": 384,
                "num_attention_heads": 4,
                "iou_head_hidden_dim": 96,
                "dynamic_multimask_via_stability": False,
            },
        },
    },
}

_SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<unk>", "<img>", "</img>", "<IMG_CONTEXT>")
_ADDED = ("[SEG]", "<p>", "</p>", "<vp>", "</vp>")
# Words of the prompts and answers first, then words a user's own question may hold: these get embeddings of their
# own instead of <unk>, though training never saw them.
_WORDS = """
user assistant Please segment Can you Could please Segment in this image the Sure It is . , ? ! : ; - ' " ( )
a an of and or with all every each that which are can to from on at by for vessel vessels blood artery
arteries vein veins capillary capillaries coronary retinal retina fundus optic disc discs disk cup macula
fovea lesion lesions haemorrhage haemorrhages hemorrhage exudate exudates aneurysm aneurysms microaneurysms
aorta carotid cerebral brain liver lung kidney hepatic portal pulmonary heart left right upper lower top
bottom middle centre center main side branch branches trunk trunks tree trees thin thick fine large small
narrow wide dark bright light red green blue white black grey gray line lines catheter wire guidewire rib ribs
tumour tumor polyp polyps nerve nerves skin cell cells nucleus nuclei bone bones tissue organ background
foreground region regions area areas object objects structure structures network filled contrast angiogram
angiography X-ray photograph picture scan slice frame mask masks find show mark outline highlight give me what
where here there visible only not without but major minor first second
""".split()  # noqa: SIM905 - a list of 200 strings is harder to read


def build_tokenizer(targets: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: one token a word, so that a target's name is not spread over pieces.

    Args:
        targets: phrases whose words must be in the vocabulary.
    """
    words = dict.fromkeys([*_SPECIAL, "\n", *_WORDS, *(word for target in targets for word in target.split())])
    return _word_level({word: index for index, word in enumerate(words)}, (*_SPECIAL[2:], *_ADDED), "<|endoftext|>")


def tokenizer_with(special_ids: dict[str, int]) -> PreTrainedTokenizerFast:
    """The same kind of tokenizer with special tokens at given ids; words that no text has fill what lies between.

    Args:
        special_ids: token -> id; `<|im_end|>` ends a turn.
    """
    taken = {index: token for token, index in special_ids.items()}
    free = (index for index in range(max(taken) + 1) if index not in taken)
    words = dict.fromkeys(["<unk>", "\n", *_WORDS])
    vocabulary = special_ids | dict(zip(words, free, strict=False))
    vocabulary |= {f"unused{index}": index for index in free}
    pad = next(token for token in ("<|endoftext|>", "</s>", "<|im_end|>") if token in special_ids)
    return _word_level(vocabulary, tuple(special_ids), pad)


def _word_level(vocabulary: dict[str, int], special: tuple[str, ...], pad: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token=pad, unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer
