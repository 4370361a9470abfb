"""The loop that one writes first: transformers, peft and torch, a sample at a time; what ours is compared with.

Same native model, images, questions and loss, and in every step both encoders, the language model's own forward pass
with logits for every token, non-reentrant activation checkpointing, clipping, AdamW. Eager, no DeepSpeed. Images are
read and prepared ahead, so that it never waits for the disk. It does not know the run or its features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sft import data, losses
from sft.config import TrainConfig
from sft.model import lora, published
from sft.model.preprocess import Preprocess
from sft.model.sa2va import Prompt, Sa2VA, Sam2Features, VisionFeatures, VisionInput, upsample


@dataclass(frozen=True)
class Inputs:
    """One sample before the encoders, on the host."""

    vision: VisionInput
    sam2_image_3HW: Tensor
    mask_HW: Tensor
    question: str


class PlainLoop:
    """The model in training and its optimizer.

    Args:
        config: model, LoRA, loss, learning rate; batch size, checkpointing and DeepSpeed's settings are not used.
        device: where it runs.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self._config, self._device = config, device
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        loaded = published.load(config.model_path, dtype=self._dtype, device=device)
        self.model, self.preprocess = loaded.model, loaded.preprocess
        self.peft_model = lora.wrap(self.model, config).to(device)
        _checkpoint_layers(self.model.decoder)
        self.peft_model.train()
        self._trained = [parameter for parameter in self.peft_model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=config.learning_rate, weight_decay=config.weight_decay)

    def step(self, inputs: Inputs) -> Tensor:
        """One sample and one update; returns the loss."""
        loss = self.loss(inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, self._config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def loss(self, inputs: Inputs) -> Tensor:
        """The loss of one sample, at the mask's own size."""
        config, model = self._config, self.model
        vision, sam2 = self._encode(inputs)
        with_labels = config.text_weight > 0
        prompt = self.preprocess.prompt([inputs.question], [inputs.vision.layout], with_labels=with_labels)
        prompt = prompt.to(self._device)
        logits_BLV, seg_BLC = language_model(model, prompt, vision)
        seg_BC = seg_BLC[torch.arange(len(seg_BLC), device=self._device), prompt.seg_position_B]
        masks = model.decode_masks(model.text_hidden_fcs(seg_BC)[:, None], sam2)
        truth_BHW = inputs.mask_HW[None].to(self._device)
        total = losses.by_formulas(upsample(masks.logits_Bhw, tuple(truth_BHW.shape[1:])), truth_BHW, config)["total"]
        if with_labels:
            text = functional.cross_entropy(logits_BLV.float().flatten(0, 1), prompt.labels_BL.flatten())
            total = total + config.text_weight * text
        return total

    def _encode(self, inputs: Inputs) -> tuple[VisionFeatures, Sam2Features]:
        """Both encoders; gradients only where LoRA trains SAM2's, or the mask decoder's own first convolutions."""
        config, image_3HW = self._config, inputs.sam2_image_3HW.to(self._device, self._dtype)
        with torch.no_grad():
            vision = self.model.vision_features(inputs.vision.to(self._device, self._dtype))
        with torch.set_grad_enabled("sam2_encoder" in config.lora_scope):
            project = "mask_decoder" not in config.train_modules
            return vision, self.model.sam2_features(image_3HW[None], project=project)


def read(pair: data.Pair, preprocess: Preprocess, config: TrainConfig) -> Inputs:
    """What a loader hands over for one pair."""
    sample = data.read(pair)
    question = f"Please segment {sample.phrase} in this image." if sample.phrase else config.question
    images = preprocess.vision_input(sample.image_HW3), preprocess.sam2_image(sample.image_HW3)
    return Inputs(*images, torch.from_numpy(sample.mask_HW), question)


def language_model(model: Sa2VA, prompt: Prompt, vision: VisionFeatures) -> tuple[Tensor, Tensor]:
    """transformers' own forward pass: logits of every token (B, L, V) and the states that [SEG] is read from."""
    settings, unnormed = {"use_cache": False}, []
    if prompt.position_ids_3BL is not None:  # Qwen-VL; the plain count of the positions comes first
        positions_3BL = prompt.position_ids_3BL
        plain_1BL = torch.arange(positions_3BL.shape[2], device=positions_3BL.device).expand_as(positions_3BL[:1])
        settings["position_ids"] = torch.cat([plain_1BL, positions_3BL])
    if vision.deepstack_KMC is not None:
        settings["visual_pos_masks"] = prompt.input_ids_BL == model.image_token_id
        settings["deepstack_visual_embeds"] = list(vision.deepstack_KMC)
    hook = model.decoder.norm.register_forward_pre_hook(lambda _norm, inputs: unnormed.append(inputs[0]))
    try:
        embeddings_BLC = model.input_embeddings(prompt.input_ids_BL, vision)
        normed_BLC = model.decoder(inputs_embeds=embeddings_BLC, **settings).last_hidden_state
    finally:
        hook.remove()
    return model.head(normed_BLC), unnormed[0] if model.seg_before_norm else normed_BLC


def _checkpoint_layers(decoder: nn.Module) -> None:
    enable = getattr(decoder, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # transformers before 5.20 knows only the older name
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
