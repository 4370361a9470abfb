"""The native Sa2VA: architecture, preprocessing, the published directory format, LoRA."""
