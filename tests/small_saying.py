"""A small Sa2VA that answers what a test wants: its head is solved for the states along the answer."""

from pathlib import Path

import numpy as np
import small_sa2va as small
import torch

from sft.model.published import Loaded
from sft.model.sa2va import Prompt, Sa2VA

SAID = "It is [SEG]"


def loaded_that_says(words: str, image_HW3: np.ndarray, directory: Path = Path("small")) -> Loaded:
    """A checkpoint whose greedy answer to small.QUESTION about this image is `words`."""
    model = small.build()
    teach(model, small.preprocess(), words, image_HW3)
    return Loaded(model, small.preprocess(), directory)


@torch.no_grad()
def teach(model: Sa2VA, preprocess, words: str, image_HW3: np.ndarray) -> None:
    """Sets the head's rows so that each state along the answer gives its next word the highest logit."""
    image = preprocess.vision_input(image_HW3)
    question = preprocess.question_ids(small.QUESTION, image.layout)
    answer = preprocess.tokenizer.encode(words, add_special_tokens=False)
    ids_1L = torch.tensor([question + answer])
    prompt = Prompt(ids_1L, torch.tensor([0]), None, preprocess.position_ids(ids_1L, [image.layout]))
    states = model.hidden_states(prompt, model.vision_features(image)).normed_BLC[0]
    states_NC = states[len(question) - 1 : -1]  # the states from which the words of the answer are read
    rows_CN = 10 * torch.linalg.pinv(states_NC)
    head = model.head.weight
    head.zero_()
    for token, row_C in zip(answer, rows_CN.T, strict=True):
        head[token] += row_C
