"""A small Sa2VA that answers what a test wants: its head is solved for the states along the answer."""

from pathlib import Path

import numpy as np
import small_sa2va as small
import torch

from sft.model.published import Loaded
from sft.model.sa2va import Sa2VA

SAID = "It is [SEG]"


def loaded_that_says(words: str, image_HW3: np.ndarray, directory: Path = Path("small")) -> Loaded:
    """A checkpoint whose greedy answer to small.QUESTION about this image is `words`."""
    model = small.build()
    teach(model, small.preprocess(), words, image_HW3)
    return Loaded(model, small.preprocess(), directory)


@torch.no_grad()
def teach(model: Sa2VA, preprocess, words: str, image_HW3: np.ndarray) -> None:
    """Sets the head's rows so that each state along the answer gives its next word the highest logit."""
    tiles = preprocess.tiles(image_HW3)
    question = preprocess.question_ids(small.QUESTION, len(tiles))
    answer = preprocess.tokenizer.encode(words, add_special_tokens=False)
    states = model.hidden_states(torch.tensor([question + answer]), model.vision_tokens(tiles))[0]
    states_NC = states[len(question) - 1 : -1]  # the states from which the words of the answer are read
    rows_CN = 10 * torch.linalg.pinv(states_NC)
    head = model.language_model.get_output_embeddings().weight
    head.zero_()
    for token, row_C in zip(answer, rows_CN.T, strict=True):
        head[token] += row_C
