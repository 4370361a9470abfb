"""Proof that what we compute is what the published code computes, number by number.

Two processes, since the published code needs an older transformers and packages that ours does without:

- the reference, `published.py` (with `shrink.py`, `fused.py`): under a Python of its own and against a checkout of the
  published code it builds small checkpoints with the published classes, fills every weight from a seed, saves as
  `save_pretrained` does, runs the published forward and writes down what came out;
- ours, `test_parity.py` (with `native.py`): loads that directory natively, computes the same and compares.

`cases.py` (sizes, inputs), `seeded.py` (weights), `figures.py` (digests, tolerances) serve both and need numpy alone.
`golden/` holds digests of the reference's results; `tests/test_golden.py` regenerates the weights from the seed and
holds us to them where no published code is installed. They were written with bytedance/Sa2VA at 9832e1a, transformers
4.57.1, torch 2.14.1, peft 0.17.1.

To run the comparison:

    git clone https://github.com/bytedance/Sa2VA ~/Sa2VA
    python3.11 -m venv ~/sa2va_reference
    ~/sa2va_reference/bin/pip install torch torchvision transformers==4.57.1 peft==0.17.1 timm einops sentencepiece \
        accelerate qwen_vl_utils
    SA2VA_UPSTREAM=~/Sa2VA SA2VA_UPSTREAM_PYTHON=~/sa2va_reference/bin/python pytest tests/parity

SA2VA_UPSTREAM_PYTHON_OLD may name a second Python with transformers 4.49.0, which names Qwen2.5-VL tensors otherwise.
Without the first two variables these tests are skipped. To write the golden files anew, from `tests/`:

    SA2VA_UPSTREAM=~/Sa2VA ~/sa2va_reference/bin/python -m parity.published golden
"""
