"""Fine-tuning for detection and instance segmentation."""
