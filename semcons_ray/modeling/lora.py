"""Puts a low-rank adapter on a base model, and checks which modules get one."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from semcons_ray.config import LoraConfig
from semcons_ray.errors import ModelError, first_line

MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Families whose kernels read the weights of `out_proj` directly, past an adapter on it; PEFT refuses one there."""

LINEAR = (torch.nn.Linear, Conv1D)

OTHER_KINDS = ("Router", "GroupedLinear")
"""Endings of the names of classes that derive from a linear layer but compute something else."""


def alpha_of(scaling: float, rank: int, lora: LoraConfig) -> float:
    """The alpha by which PEFT scales an adapter of `rank` by `scaling`."""
    return scaling * (sqrt(rank) if lora.use_rslora else rank)


def attach_adapter(base: Any, lora: LoraConfig, name: str) -> Any:
    """PEFT's model of `base` with one adapter, on the meta device if `base` is there.

    Args:
        base: A model of transformers.
        lora: Rank, scaling, dropout and target modules of the adapter.
        name: Name of the model, for errors.

    Raises:
        ModelError: A name in `lora.target_modules` is no module of `base`, or not a linear layer; or one in
            `lora.modules_to_save` is none, or has modules inside.
    """
    targets: str | list[str] = lora.target_modules if isinstance(lora.target_modules, str) else [*lora.target_modules]
    if not isinstance(targets, str):
        _check_targets(base, targets, name)
    _check_saved(base, lora.modules_to_save, name)
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,
        target_modules=targets,
        modules_to_save=[*lora.modules_to_save] or None,
        exclude_modules=_unfit(base) if isinstance(targets, str) else None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
    )
    with warnings.catch_warnings():
        # PEFT finds out by itself whether a layer's weights are transposed, and that an output embedding is tied: its
        # adapter, or the copy of it that is trained whole, is then on the output only.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")
        # A model of the hub has its files in a folder of another name.
        warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed")
        warnings.filterwarnings("ignore", "Model (with|has) `tie_word_embeddings=True`")
        try:
            _leave_experts(base, config, name)
            on_meta = base.device.type == "meta"
            return get_peft_model(base, config, autocast_adapter_dtype=False, low_cpu_mem_usage=on_meta)
        except (ValueError, TypeError) as error:
            raise ModelError(f"model.lora.target_modules does not fit {name}: {first_line(error)}") from error


def trained_shapes(config: Any, lora: LoraConfig, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes, by name, of all that is trained of a model: its adapter, and modules that are trained whole.

    Args:
        config: The model's configuration by transformers; no weights are needed.
        lora: See `attach_adapter`.
        name: See `attach_adapter`.

    Raises:
        ModelError: See `attach_adapter`.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    parameters = attach_adapter(base, lora, name).named_parameters()
    return {key: tuple(value.shape) for key, value in parameters if value.requires_grad}


def measure_sizes(model: Any) -> None:
    """Set the sizes that DoRA begins with in float32, as it measures weights where the adapter computes in float32."""
    for layer in model.modules():
        if sizes := getattr(layer, "lora_magnitude_vector", None):
            norm = sizes["default"].get_weight_norm(layer.get_base_layer().weight.float(), torch.zeros(()), 1.0)
            sizes["default"].weight.data = norm


def _check_targets(base: Any, targets: Sequence[str], name: str) -> None:
    """Check that each name is the end of linear modules' paths, as PEFT matches them, and of no other modules'."""
    modules = dict(base.named_modules())
    linear = {path.rpartition(".")[2] for path, module in modules.items() if _is_linear(module)}
    for target in targets:
        found = [module for path, module in modules.items() if _ends(path, target)]
        where = f"model.lora.target_modules: {target} "
        if not found and any(_ends(path, target) for path, _ in base.named_parameters()):
            raise ModelError(f"{where}is no module of {name} but a tensor in one; linear ones are {_listed(linear)}")
        if not found:
            near = difflib.get_close_matches(target.lower(), linear, n=1)
            hint = f"did you mean {near[0]}?" if near else f"linear ones are {_listed(linear)}"
            raise ModelError(f"{where}names no module of {name}; {hint}")
        for module in found:
            if not _is_linear(module):
                kind = f"is of kind {type(module).__name__} in {name}"
                raise ModelError(f"{where}{kind}, and adapters are for linear layers: {_listed(linear)}")


def _check_saved(base: Any, names: Sequence[str], name: str) -> None:
    """Check that each name is the end of modules' names, as PEFT matches them, and that those are single ones."""
    modules = {path: module for path, module in base.named_modules(remove_duplicate=False) if path}
    leaves = {path: module for path, module in modules.items() if not [*module.children()] and [*module.parameters()]}
    known = {path.rpartition(".")[2] for path in leaves}
    for wanted in names:
        found = {path: module for path, module in modules.items() if path.endswith(wanted)}
        where = f"model.lora.modules_to_save: {wanted} "
        if not found:
            near = difflib.get_close_matches(wanted.lower(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {_listed(known)}"
            raise ModelError(f"{where}names no module of {name}; {hint}")
        for path, module in found.items():
            if path not in leaves:
                kind = f"is of kind {type(module).__name__} in {name}"
                raise ModelError(f"{where}{kind}; name modules that have weights and none inside, as {_listed(known)}")
            if _is_linear(module) and not _ends(path, wanted):  # which may have an adapter
                raise ModelError(f"{where}is the end of {path} in {name}; write the whole name of a linear layer")


def _leave_experts(base: Any, config: PeftLoraConfig, name: str) -> None:
    """Keep PEFT from putting adapters on a mixture's experts, which some families hold in tensors of three dimensions.

    For those PEFT translates the names that the experts' modules once had, in `all-linear` as well, and makes adapters
    of other ranks than the one asked for.
    """
    read = copy.deepcopy(config)
    convert_peft_config_for_transformers(read, base, None)
    if not read.target_parameters:
        return
    if not isinstance(config.target_modules, str):
        experts = sorted(set(config.target_modules or ()) - set(read.target_modules or ()))
        raise ModelError(
            f"model.lora.target_modules: {', '.join(experts)} would be experts of {name}, and adapters are for linear "
            f"layers: {_listed(set(read.target_modules or ())) or 'choose all-linear'}"
        )
    config.target_modules = read.target_modules


def _unfit(base: Any) -> list[str] | None:
    """Paths of modules that PEFT takes for linear layers but that cannot have an adapter."""
    in_mamba = base.config.model_type in MAMBA
    taken = [(path, module) for path, module in base.named_modules() if isinstance(module, LINEAR)]
    unfit = [path for path, module in taken if not _is_linear(module) or (in_mamba and _ends(path, "out_proj"))]
    return unfit or None


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, LINEAR) and not type(module).__name__.endswith(OTHER_KINDS)


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
