"""Which versions of vLLM are supported.

From 0.26 to 0.32 the interfaces that this package uses are the same: methods of quantised layers, parameters and their
loaders, layers that are replaced by their name. Before, experts and loading were others. What a version lacks:

- 0.26 has no text-only Qwen3.5, and reads `.weight` of an embedding that a Qwen3-MoE's head is tied to.
"""

from functools import cache

from packaging.version import InvalidVersion, Version

from model_patch.errors import UnsupportedModelError

OLDEST, NEWEST = "0.26", "0.32"


@cache
def installed() -> Version | None:
    """The version of vLLM, or None for a build that does not know its own."""
    from vllm import __version__

    try:
        return Version(__version__)
    except InvalidVersion:
        return None


def is_supported() -> bool:
    """Whether it has the interfaces: one too old has not; one too new, or without a number, may have."""
    version = installed()
    return version is None or version.release >= Version(OLDEST).release


def check_version() -> None:
    """Raise UnsupportedModelError for a vLLM that is too old; warn of one newer than was tested."""
    from vllm.logger import init_logger

    version = installed()
    if not is_supported():
        raise UnsupportedModelError(
            f"vLLM {version} is too old for PolarQuant checkpoints: install vllm>={OLDEST}, tested up to {NEWEST}"
        )
    if version is None or version.release[:2] > Version(NEWEST).release:
        init_logger(__name__).warning(
            "PolarQuant is tested with vLLM %s to %s, this is %s", OLDEST, NEWEST, version or "a build without a number"
        )
