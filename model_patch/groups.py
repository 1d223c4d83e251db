"""Projections that read the same activation, multiplied as one: q, k, v; gate and up; GatedDeltaNet qkv and z."""

from torch import nn
from transformers import PreTrainedModel

from model_patch.architectures import role_of
from polar_kernels import ArgumentError, PolarGroup, PolarLinear


def group_projections(model: PreTrainedModel) -> dict[str, list[str]]:
    """Group the quantised projections of each input site, in place: name of the group -> names of its layers.

    Fewer rotations, products and launches a token, no more memory; names and saved tensors stay. It takes effect on
    GPUs that have tile layout. Left as they are: sites of which less than two layers are quantised, and those whose
    layers differ in bits or are otherwise no group (see `PolarGroup`).
    """
    ungroup_projections(model)
    grouped: dict[str, list[str]] = {}
    for site, names in _sites(model).items():
        parent = names[0].rpartition(".")[0]
        try:
            group = PolarGroup([model.get_submodule(name) for name in names])
        except ArgumentError:
            continue
        name = f"group_{site.rpartition('.')[2]}"
        model.get_submodule(parent).add_module(name, group)
        grouped[f"{parent}.{name}"] = names
    return grouped


def ungroup_projections(model: nn.Module) -> None:
    """Undo `group_projections`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PolarGroup):
            module.dissolve()
            parent, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(parent), leaf)


def _sites(model: nn.Module) -> dict[str, list[str]]:
    """Input site -> names of its quantised layers, in the model's order, where there are two or more."""
    sites: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        role = role_of(name)
        if isinstance(module, PolarLinear) and role is not None and role.site is not None:
            sites.setdefault(role.site, []).append(name)
    return {site: names for site, names in sites.items() if len(names) > 1}
