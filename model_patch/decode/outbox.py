"""A step's tokens on their way to the host, which waits for them and not for what the GPU was given after."""

import torch


class Outbox:
    """`post`, queue more work, `read`."""

    def __init__(self, rows: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.empty(rows + 1, dtype=torch.long, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None
        self._device = device

    def post(self, tokens: torch.Tensor, unfinished: torch.Tensor) -> None:
        """tokens [rows], unfinished [rows]: 0 where a row is done."""
        self._host.copy_(torch.cat([tokens, unfinished.max()[None]]), non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._device))

    def read(self) -> tuple[torch.Tensor, bool]:
        """The tokens [rows], on the CPU, and whether a row goes on."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host[:-1].clone(), bool(self._host[-1])
