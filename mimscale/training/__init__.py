"""Training: the recipe, the DeepSpeed engine, the loop, and what a run writes."""
