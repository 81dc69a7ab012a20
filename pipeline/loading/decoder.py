"""Decode stored codes to probabilities on a device."""

from __future__ import annotations

import torch

from cache.format.codec import Codec


class Decoder:
    """Decodes labels on the training device, so that only codes travel there, a byte
    per class. codec: of the store. device: of the codes and of the result."""

    def __init__(self, codec: Codec, device: torch.device | str) -> None:
        self.zero, self.tail = codec.zero, codec.tail
        self.table = None if codec.table is None else torch.from_numpy(codec.table).to(device)

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode codes [n, ``codec.columns``] as ``Codec.decode`` does. Returns float32
        [n, classes], above zero, rows summing to one."""
        if self.tail:
            p, zero = self.table[codes[:, :-1].int()], codes[:, :-1] == 0
            zeros = zero.sum(dim=1)
            mass = torch.where(zeros > 0, (codes[:, -1].float() / self.tail) ** 2, 0)
            p = p * ((1 - mass) / p.sum(dim=1).clamp_min(torch.finfo(p.dtype).tiny))[:, None]
            return torch.where(zero, (mass / zeros.clamp_min(1))[:, None], p)
        p = codes.float().clamp_min(self.zero) if self.table is None else self.table[codes.int()]
        return p / p.sum(dim=1, keepdim=True)
