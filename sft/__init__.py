"""sa2va-sft: fine-tunes a Sa2VA checkpoint for vessel segmentation with LoRA adapters."""

__version__ = "0.1.0"
