"""Other packages' quantised products, where they are installed: groups of 128 weights of one scale, x and y bf16."""

import json
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from polar_bench.providers import Call, Provider

_GROUP = 128
_ROWS = tuple(1 << power for power in range(13))  # what Humming gets kernels for, up to 4096


class Peer(Provider):
    """A provider of another package."""

    package: str  # the distribution's name


class GemLite(Peer):
    """Triton kernels for int4, a scale and a zero point a group. Settings are those that GemLite ships for the GPU and
    the shape, or else those that it finds by its own quick search, which takes up to minutes a shape."""

    package, name, mode = "gemlite", "GemLite", "int4"
    max_error = 0.02  # for up to 4 rows, hundreds of partial sums are added to y in bf16
    max_rows = 64  # beyond, it is another kernel to search settings for

    def bytes(self, rows: int, columns: int) -> int:
        return rows * columns // 2 + rows * columns // _GROUP * 4

    def make(self, rows: int, columns: int) -> tuple[Call, Callable[[], torch.Tensor]]:
        from gemlite.helper import A16W4_HQQ_INT  # which asks for a GPU when imported

        codes, scales = _random_groups(rows, columns, range(16))
        middle = torch.full_like(scales, 8)
        layer = A16W4_HQQ_INT(device="cuda", dtype=torch.bfloat16).from_weights(codes, scales, middle)
        return layer, lambda: dense_groups(codes, scales, 8)


class Humming(Peer):
    """CUDA kernels for int5, symmetric, a bf16 scale a group, compiled when first used; settings by its own rules."""

    package, name, mode, max_error = "humming-kernels", "Humming", "int5", 0.01

    def bytes(self, rows: int, columns: int) -> int:
        return rows * columns * 5 // 8 + rows * columns // _GROUP * 2

    def make(self, rows: int, columns: int) -> tuple[Call, Callable[[], torch.Tensor]]:
        from humming import ops
        from humming.layer import HummingLayer
        from humming.tune import get_heuristics_config

        # With all codes it was faster than with -15 to 15, which it stores as sign and magnitude.
        codes, scales = _random_groups(rows, columns, range(32))
        with torch.device("cuda"):
            layer = HummingLayer(rows, columns, {"dtype": "int5", "group_size": _GROUP}, torch_dtype=torch.bfloat16)
        layer.load_from_tensors({"weight": ops.pack_weight(codes.int(), 5), "weight_scale": scales})
        layer.transform()
        settings = json.dumps(settings_for(get_heuristics_config(layer.humming_config), _ROWS))
        return (lambda x: layer(x, tuning_config=settings)), (lambda: dense_groups(codes, scales, 16))


PEERS: tuple[Peer, ...] = (GemLite(), Humming())


def installed() -> tuple[list[Peer], list[str]]:
    """Those whose package is there, and the names of the packages that are not. None is imported before it is measured,
    as that may need a GPU."""
    found = [peer for peer in PEERS if package_version(peer.package)]
    return found, [peer.package for peer in PEERS if peer not in found]


def package_version(package: str) -> str | None:
    """Of a distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def settings_for(intervals: Sequence[tuple[int, int, dict]], rows: Sequence[int]) -> list[tuple[int, int, dict]]:
    """Of Humming's (after, up to, settings) for numbers of rows, those that `rows` fall into: it compiles a kernel for
    each, all at once, and there are dozens."""
    return [interval for interval in intervals if any(interval[0] < count <= interval[1] for count in rows)]


def dense_groups(codes: torch.Tensor, scales: torch.Tensor, middle: int) -> torch.Tensor:
    """(code - middle) * scale of its group: codes [N, K] uint8, scales [N, K / 128] -> [N, K] fp32."""
    groups = codes.float().sub_(middle).unflatten(-1, (-1, _GROUP))
    return groups.mul_(scales[..., None]).flatten(-2)


def _random_groups(rows: int, columns: int, codes: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] uint8 and scales [N, K / 128] bf16, on the GPU."""
    scales = torch.rand(rows, columns // _GROUP, device="cuda").add_(0.5).bfloat16()
    return torch.randint(codes.start, codes.stop, (rows, columns), device="cuda", dtype=torch.uint8), scales
