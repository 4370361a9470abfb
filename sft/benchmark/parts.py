"""The parts of a step one by one: encoders, language model, mask decoder, loss, optimizer.

Takes a prepared run and a batch of it, gives times. Each part runs alone, forward and backward, on inputs of the batch.
"""

from collections.abc import Callable

import torch

from sft import data
from sft.benchmark import plain
from sft.benchmark.clock import Times, timed
from sft.features import Batch
from sft.model.sa2va import Masks, Sam2Features
from sft.run import Run
from sft.train import loss_terms


def measure(run: Run, batch: Batch, pairs: list[data.Pair], steps: int, warm_up: int) -> dict[str, Times]:
    """Part -> its times, at the size of the batch; the vision encoder on one image.

    Args:
        run: with an engine that holds vectors (ZeRO-1 or 2).
        batch: what the step is measured on.
        pairs: as many images as SAM2's encoder gets at once.
        steps: timed; warm_up: before them.
    """
    run.ds_engine.train()
    calls = encoders(run, pairs) | trained(run, batch)
    return {name: timed(call, run.ranks.device, steps, warm_up) for name, call in calls.items()}


def encoders(run: Run, pairs: list[data.Pair]) -> dict[str, Callable[[], object]]:
    """The frozen encoders, without gradients."""
    model, device = run.loaded.model, run.ranks.device
    dtype = next(model.parameters()).dtype
    inputs = [plain.read(pair, run.loaded.preprocess, run.config) for pair in pairs]
    vision = inputs[0].vision.to(device, dtype)
    images_B3HW = torch.stack([one.sam2_image_3HW for one in inputs]).to(device, dtype)
    return {
        "vision encoder, one image": torch.no_grad()(lambda: model.vision_features(vision)),
        f"SAM2 encoder, {len(pairs)} images": torch.no_grad()(lambda: model.sam2_features(images_B3HW)),
    }


def trained(run: Run, batch: Batch) -> dict[str, Callable[[], object]]:
    """What a step does with the features, forward and backward; gradients are thrown away."""
    model, engine = run.loaded.model, run.ds_engine
    read_B1 = batch.prompt.seg_position_B[:, None]
    with torch.no_grad():
        states = model.hidden_states(batch.prompt, batch.vision, read_B1)
        sam2 = batch.sam2 if isinstance(batch.sam2, Sam2Features) else model.sam2_features(batch.sam2)
        masks = model.decode_masks(model.text_hidden_fcs(states.seg_BLC[:, 0])[:, None], sam2)
    seg_BC = states.seg_BLC[:, 0].detach().requires_grad_()
    logits_Bhw = masks.logits_Bhw.detach().requires_grad_()

    def language_model() -> None:
        model.hidden_states(batch.prompt, batch.vision, read_B1).seg_BLC.float().sum().backward()
        forget()

    def mask_decoder() -> None:
        decoded = model.decode_masks(model.text_hidden_fcs(seg_BC)[:, None], sam2)
        decoded.logits_Bhw.float().sum().backward()
        seg_BC.grad = None
        forget()

    def loss() -> None:
        of_leaf = Masks(logits_Bhw, masks.candidate_logits_BKhw, masks.predicted_iou_BK)
        loss_terms(of_leaf, batch, run.config)["total"].backward()
        logits_Bhw.grad = None

    def optimizer() -> None:  # with gradients of zero, and the way into DeepSpeed's vectors
        engine.backward(torch.zeros((), device=run.ranks.device, requires_grad=True))
        engine.step()

    def forget() -> None:
        for vector in engine.vectors:
            for leaf in vector.leaves.values():
                leaf.grad = None

    return {
        "language model": language_model,
        "mask decoder": mask_decoder,
        "loss": loss,
        "optimizer": optimizer,
    }
