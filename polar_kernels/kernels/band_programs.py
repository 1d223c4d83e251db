"""How the products of few rows of x are cut into programs, one for each band of 32 rows of the weight.

Warps of a program share the blocks of K. Measured on an H100 and an H200.
"""

_MULTIPROCESSORS = 132  # of those GPUs


def choose_warps(bands: int, groups: int) -> int:
    """Warps that share a band: few bands want many each, to fill the GPU; many want few, whose sums are cheaper.

    groups: of 8 rows of x.
    """
    if groups >= 4:
        return 4 if bands * groups >= 1024 else 8
    if bands >= 4096 or (groups == 2 and 2 * _MULTIPROCESSORS < bands <= 4 * _MULTIPROCESSORS):
        return 4
    return 16 if bands <= 128 else 8


def choose_registers(bands: int, warps: int, groups: int) -> int:
    """Registers of a thread at most: room on a multiprocessor for as many programs as there are for each. With room for
    more, programs that come early would fill some multiprocessors and leave others idle; and ptxas asks for x's words
    only as early as it has registers for them."""
    if groups >= 4:
        return 255 if groups > 4 or bands <= 2 * _MULTIPROCESSORS else 168
    if groups == 2 or warps == 16:
        return 128
    if warps == 8:
        return 128 if bands <= 2 * _MULTIPROCESSORS else 80
    return 96
