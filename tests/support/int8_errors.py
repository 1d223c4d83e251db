"""How wrong an int8 product may be, relative, against the exact one."""

INT8_ERROR = 0.012
SHARED_ERROR = 0.016  # where blocks share scales, by which the levels are rounded too, and AWQ scales differ widely
