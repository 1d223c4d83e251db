"""The model card (README.md) of a written checkpoint."""

from pathlib import Path
from typing import Any

_HEADER = """---
library_name: transformers
tags: [{tags}]
---
# {name}
"""

_QUANTIZED = """
The weights of {name}, quantised by Hadamard rotation and Lloyd-Max levels (PolarQuant, also published as HLWQ):
{bits} bits a weight and an fp16 norm per 128, {size:.2f} GB in all{awq}.

```python
import model_patch  # registers the format; without it transformers leaves random weights
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH", device_map="auto")
```

Left in their own dtype: norms, convolutions, gates{excluded}.
"""

_PLAIN = """
An unquantised checkpoint written from {name}, {size:.2f} GB.
"""


def model_card(source: Path, config: dict[str, Any], size: int) -> str:
    """source: the folder it was made from; config: its config.json; size: bytes of all tensors."""
    quantized = config.get("quantization_config")
    tags = ", ".join(["polarquant", "quantized"] if quantized else ["dequantized"])
    header = _HEADER.format(name=source.resolve().name, tags=tags)
    if not quantized:
        return header + _PLAIN.format(name=source.resolve().name, size=size / 1e9)
    special = sorted({quantized["bits"], *quantized["bits_per_layer"].values()})
    excluded = "".join(f", {name}" for name in quantized["modules_to_not_convert"])
    return header + _QUANTIZED.format(
        name=source.resolve().name,
        bits=" or ".join(str(bits) for bits in special),
        size=size / 1e9,
        awq=", after AWQ channel scaling" if quantized["awq"] else "",
        excluded=excluded,
    )
