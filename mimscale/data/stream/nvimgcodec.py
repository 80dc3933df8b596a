"""Decoding crops with nvImageCodec: on a GPU's JPEG engine, or on its CPU backend, which decodes the same pixels anywhere.

Optional: ``pip install 'mimscale[nvimgcodec]'``. Only the crop is decoded, and on a GPU the pixels never visit the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from mimscale.data.errors import ShardError
from mimscale.data.stream import augment

Box = tuple[int, int, int, int]


class CropDecoder:
    """Decodes boxes of many JPEGs at once and resizes them.

    Args:
        device: "cpu", or a CUDA device such as "cuda:0".

    Raises:
        ShardError: the package is not installed, or has no decoder for the device.
    """

    def __init__(self, device: str = "cpu"):
        try:
            from nvidia import nvimgcodec
        except ImportError:
            raise ShardError("data.decoder=nvimgcodec needs a package: pip install 'mimscale[nvimgcodec]'") from None
        self._codec = nvimgcodec
        self.device = torch.device(device)
        try:
            if self.device.type == "cpu":
                backends = [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
                self._decoder = nvimgcodec.Decoder(device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, backends=backends)
            else:
                self._decoder = nvimgcodec.Decoder(device_id=self.device.index or 0)
        except Exception as error:  # the package raises plain RuntimeErrors of its C++ side
            raise ShardError(f"nvimgcodec cannot decode on {device}: {error}; use data.decoder=libjpeg-turbo") from None
        # As torchvision and our other decoders do it: pixels as they are stored, whatever EXIF says of the camera.
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def crops(self, files: list[bytes], boxes: list[Box], size: int, mode: str) -> list[torch.Tensor | None]:
        """Decode and resize one box of each file.

        Args:
            files: JPEGs.
            boxes: (top, left, height, width) in each.
            size: side of the result, pixels.
            mode: "bilinear" or "bicubic", antialiased.

        Returns:
            uint8 (3, size, size) on the device for each file; None for what it would not decode to RGB.
        """
        codec, streams = self._codec, []
        for data, (top, left, height, width) in zip(files, boxes, strict=True):
            view = codec.CodeStreamView(region=codec.Region(top, left, top + height, left + width))
            streams.append(codec.CodeStream(data).get_sub_code_stream(view=view))
        options: dict[str, Any] = {"params": self._params}
        if self.device.type == "cuda":
            options["cuda_stream"] = torch.cuda.current_stream(self.device).cuda_stream
        images = self._decoder.decode(streams, **options)
        return [self._resized(image, size, mode) for image in images]

    def _resized(self, image: Any, size: int, mode: str) -> torch.Tensor | None:
        if image is None or len(image.shape) != 3 or image.shape[2] != 3:
            return None
        if self.device.type == "cpu":
            return augment.resize(np.array(image.cpu()), (size, size), mode)
        pixels = torch.from_dlpack(image).unsqueeze(0).permute(0, 3, 1, 2)
        # CUDA has no antialiased resize of bytes; rounding its floats gives the CPU's result to a grey level.
        resized = interpolate(pixels.float(), (size, size), mode=mode, antialias=True)
        return resized.round_().clamp_(0, 255).to(torch.uint8)[0]
