"""Several runs in one launch, of pre-training or fine-tuning: what `tests/training_runs.py` starts under torchrun."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from mimscale.schema import read_yaml
from mimscale.training.engine import start_ranks, stop_ranks
from mimscale.training.pretraining.task import pretrain
from mimscale.training.recipe import load_recipe
from mimscale.transfer.recipe import load_finetune_recipe
from mimscale.transfer.task import finetune

start_ranks()
for cell in json.loads(sys.argv[1]):
    path = cell.get("recipe", "launchers/recipes/demo.yaml")
    if "task" in read_yaml(Path(path)):
        finetune(load_finetune_recipe(path, cell["overrides"]), cell["config"], cell["output"])
    else:
        pretrain(load_recipe(path, cell["overrides"]), cell["config"], cell["output"])
    dist.barrier()
stop_ranks()
