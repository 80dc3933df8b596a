"""What a pre-trained encoder is worth: fine-tuning, and probes of its frozen features."""
