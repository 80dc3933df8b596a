"""Several pre-trainings in one launch: what `tests/training_runs.py` starts under torchrun."""

import json
import sys

import torch.distributed as dist

from mimscale.training.engine import start_ranks, stop_ranks
from mimscale.training.pretraining import pretrain
from mimscale.training.recipe import load_recipe

start_ranks()
for cell in json.loads(sys.argv[1]):
    recipe = load_recipe(cell.get("recipe", "launchers/recipes/demo.yaml"), cell["overrides"])
    pretrain(recipe, cell["config"], cell["output"])
    dist.barrier()
stop_ranks()
