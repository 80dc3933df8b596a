"""Pre-training by masked image modelling: the task, its module, its validation."""
