"""What detection and semantic segmentation share: data in folders, a feature pyramid, heads whose initial weights survive ZeRO-3.

A dense task is a subclass of :class:`DenseTask` with

- ``schema``: a :class:`DenseRecipe` with a ``data`` section derived from :class:`DenseData`, and sections for its heads;
- ``images`` and ``held_out``: its splits (:class:`mimscale.transfer.dense.stream.DenseImages`), set when it is made;
- ``heads(recipe, classes)``: everything beside the encoder, as one module that owns a :class:`PyramidNorms`;
- ``join(recipe, encoder, heads)``: the module to train; it keeps them as ``encoder`` and ``heads``, takes what the training
  split collates to (images as uint8, ``draw_keys`` last), and gives the mean over the images of each one's own loss, so
  that the loss is the same however a batch is cut into micro-batches and ranks (batch norms share their statistics over
  ranks: ``mimscale.transfer.dense.sync_batch_norm``);
- ``validate`` and ``say``.

Whatever a head does must not depend on the data in which modules it calls, how often and in what order: under ZeRO-3 all
ranks gather parameters together. Buffers of ``state_dict`` are saved with the parameters, and have to be alike on all ranks.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from mimscale.data import ShardError
from mimscale.training.checkpoint import Checkpoint, CheckpointError
from mimscale.training.errors import read_here
from mimscale.training.pretraining.task import rank_workers
from mimscale.training.ranks import Ranks
from mimscale.training.task import TaskBatch
from mimscale.transfer.dense.recipe import DenseRecipe
from mimscale.transfer.dense.stream import DenseImages, DenseStream, HeldOutStream
from mimscale.transfer.task import TransferTask, classes_in
from mimscale.transfer.weights import task_encoder


class PyramidNorms(nn.Module):
    """The encoder's maps, each after a norm of its own.

    Blocks add to a main branch that no norm limits. The last map has the encoder's final norm, pre-trained with it; the
    norms of the others are new.
    """

    def __init__(self, widths: list[int]):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths[:-1])

    def forward(self, encoder: Any, images: Tensor, draw_keys: Tensor | None = None) -> list[Tensor]:
        """Maps (B, C * 2**i, H / 2**(i + 2), W / 2**(i + 2)) of normalised images (B, 3, H, W), sides multiples of 4."""
        maps = encoder(images, draw_keys=draw_keys, output="pyramid")
        return [
            norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for norm, x in zip([*self.norms, encoder.norm], maps, strict=True)
        ]


class DenseTask(TransferTask):
    """A task on data in folders.

    Raises:
        RecipeError, ShardError: the data cannot be used.
    """

    recipe: DenseRecipe
    images: DenseImages
    held_out: DenseImages | None
    classes: list[str]

    @classmethod
    @abstractmethod
    def heads(cls, recipe: Any, classes: int) -> nn.Module:
        """All modules beside the encoder, with fresh weights."""

    @classmethod
    @abstractmethod
    def join(cls, recipe: Any, encoder: nn.Module, heads: nn.Module) -> nn.Module:
        """The module of a run."""

    @override
    def build(self) -> nn.Module:
        encoder = self.encoder()
        with warnings.catch_warnings():
            # Under ZeRO-3 the library's own draws find nothing to write to; starting_weights makes up for it.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            heads = self.heads(self.recipe, len(self.classes))
        return self.join(self.recipe, encoder, heads)

    @classmethod
    @override
    def module_of(cls, recipe: Any, data: dict[str, Any]) -> nn.Module:
        return cls.join(recipe, task_encoder(recipe), cls.heads(recipe, len(classes_in(data))))

    @override
    def starting_weights(self) -> Callable[[str], Tensor | None]:
        """The encoder's weights, and the heads' as they are made on the CPU.

        Libraries draw weights after a module was made, by which time ZeRO-3 has taken its parameters away and the draw is
        lost. Made once more outside of it, they are the same at every stage.
        """
        encoder = super().starting_weights()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.train.seed)
            heads = {f"heads.{name}": p for name, p in self.heads(self.recipe, len(self.classes)).named_parameters()}
        return lambda name: heads[name].detach() if name in heads else encoder(name) if encoder else None

    @override
    def check_same_classes(self, data: dict[str, Any]) -> None:
        if self.classes != data["classes"]:
            raise ShardError(
                f"{self.recipe.data.annotations} has {len(self.classes)} classes ({', '.join(self.classes[:3])}, ...), but "
                f"the run was trained on {len(data['classes'])} ({', '.join(data['classes'][:3])}, ...)"
            )

    @override
    def batches(self, step: int, ranks: Ranks) -> Iterator[TaskBatch]:
        data, train = self.recipe.data, self.recipe.train
        stream = DenseStream(
            self.images,
            train.seed,
            train.global_batch,
            ranks.rank,
            ranks.world_size,
            step,
            train.iterations,
            rank_workers(data.workers, ranks),
            data.max_damaged,
        )
        for batch in read_here(stream):
            tensors = batch.tensors
            if ranks.device.type == "cuda":
                tensors = tuple(tensor.pin_memory() for tensor in tensors)
            yield TaskBatch(tensors, batch.keys, batch.skipped)

    def held_out_stream(self, ranks: Ranks) -> HeldOutStream:
        """This rank's share of the held-out images."""
        assert self.held_out is not None
        data = self.recipe.data
        workers = rank_workers(data.workers, ranks)
        return HeldOutStream(
            self.held_out, ranks.rank, ranks.world_size, workers, data.validation_images, data.max_damaged
        )

    @override
    def data_state(self, step: int) -> dict[str, Any]:
        seen = step * self.recipe.train.global_batch
        epoch, position = divmod(seen, len(self.images.keys))
        return {
            "build": self.images.build,
            "seed": self.recipe.train.seed,
            "images_seen": seen,
            "epoch": epoch,
            "position": position,
            "classes": self.classes,
        }

    @override
    def check_data(self, source: Checkpoint) -> None:
        trained_on = source.manifest["data"]["build"]
        if trained_on != self.images.build:
            raise CheckpointError(
                f"{source.path} was trained on other data (digest {trained_on}) than data.images={self.recipe.data.images} "
                f"with data.annotations={self.recipe.data.annotations} ({self.images.build}); give the same data, or choose "
                f"another --output"
            )
