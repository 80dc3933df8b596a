"""What a run needs, imported once in the process that forks for each run of a study: these imports take seconds."""

import matplotlib.pyplot  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import mimscale.training.pretraining.task
import mimscale.transfer.classification.task  # noqa: F401
