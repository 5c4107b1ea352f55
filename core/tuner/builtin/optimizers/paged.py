"""bitsandbytes' paged optimizers, whose state is paged after a resume too.

Managed memory moves between device and host as room allows. bitsandbytes allocates state in it, but loads state into
plain device memory: a run that fits would not fit any more once it is resumed.
"""

from __future__ import annotations

from typing import Any

from bitsandbytes import optim

BUFFERS = ("state1", "state2")


class PagedAfterLoading:
    """Before one of bitsandbytes' classes, in its bases."""

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Take state back, into the buffers that a first step would have made."""
        super().load_state_dict(state_dict, move_to_device)  # type: ignore[misc]
        for group in self.param_groups:  # type: ignore[attr-defined]
            for parameter in group["params"]:
                self._page(parameter, self.state.get(parameter, {}))  # type: ignore[attr-defined]

    def _page(self, parameter: Any, state: dict[str, Any]) -> None:
        for name in BUFFERS:
            if name in state and parameter.device.type != "cpu":
                loaded = state[name]
                # AdEMAMix keeps two averages in its first buffer.
                twice = loaded.numel() == 2 * parameter.numel()
                make = self._get_state_double_buffer if twice else self.get_state_buffer  # type: ignore[attr-defined]
                state[name] = make(parameter, dtype=loaded.dtype)
                state[name].copy_(loaded)


class PagedAdam(PagedAfterLoading, optim.PagedAdam):
    """Paged Adam."""


class PagedAdam8bit(PagedAfterLoading, optim.PagedAdam8bit):
    """Paged Adam, moments in 8 bits."""


class PagedAdamW(PagedAfterLoading, optim.PagedAdamW):
    """Paged AdamW."""


class PagedAdamW8bit(PagedAfterLoading, optim.PagedAdamW8bit):
    """Paged AdamW, moments in 8 bits."""


class PagedAdEMAMix(PagedAfterLoading, optim.PagedAdEMAMix):
    """Paged AdEMAMix."""


class PagedAdEMAMix8bit(PagedAfterLoading, optim.PagedAdEMAMix8bit):
    """Paged AdEMAMix, moments in 8 bits."""


class PagedLion(PagedAfterLoading, optim.PagedLion):
    """Paged Lion."""


class PagedLion8bit(PagedAfterLoading, optim.PagedLion8bit):
    """Paged Lion, its moment in 8 bits."""
