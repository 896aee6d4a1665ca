"""rosa_fx: RoSA and QRoSA fine-tuning (arXiv 2401.04679) as a torch.compile graph-rewriting pass.

Names are loaded on first use, so that `rosa-fx --help` and tools that only look at the package do not load torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosa_fx.adapter_files import load_adapter, save_adapter
    from rosa_fx.adapter_sum import merge_adapters
    from rosa_fx.adapters import adapter_state, load_adapter_state, masks, set_masks
    from rosa_fx.attach import adapter, base_weight, delta, trainable_parameters, transform
    from rosa_fx.distributed.checkpoint import load_training_state, save_training_state
    from rosa_fx.distributed.shard import shard_bases
    from rosa_fx.errors import EagerTrainingWarning, RosaError
    from rosa_fx.huggingface import RosaCallback
    from rosa_fx.mask import Mask
    from rosa_fx.mask_files import load_masks, save_masks
    from rosa_fx.merge_report import MergeReport
    from rosa_fx.merging import merge, unmerge
    from rosa_fx.peft_export import export_peft
    from rosa_fx.peft_import import import_peft
    from rosa_fx.regions import compile_blocks
    from rosa_fx.report import RewriteReport, TargetReport, explain
    from rosa_fx.schedule import MaskSchedule
    from rosa_fx.spec import RosaSpec
    from rosa_fx.training import TrainConfig, TrainResult, train
    from rosa_fx.training.optim import optimizer_for

__version__ = "0.1.0"

__all__ = [
    "EagerTrainingWarning",
    "Mask",
    "MaskSchedule",
    "MergeReport",
    "RewriteReport",
    "RosaCallback",
    "RosaError",
    "RosaSpec",
    "TargetReport",
    "TrainConfig",
    "TrainResult",
    "adapter",
    "adapter_state",
    "base_weight",
    "compile_blocks",
    "delta",
    "explain",
    "export_peft",
    "import_peft",
    "load_adapter",
    "load_adapter_state",
    "load_masks",
    "load_training_state",
    "masks",
    "merge",
    "merge_adapters",
    "optimizer_for",
    "save_adapter",
    "save_masks",
    "save_training_state",
    "set_masks",
    "shard_bases",
    "train",
    "trainable_parameters",
    "transform",
    "unmerge",
]

_HOME = {
    "rosa_fx.adapter_files": ("load_adapter", "save_adapter"),
    "rosa_fx.adapter_sum": ("merge_adapters",),
    "rosa_fx.adapters": ("adapter_state", "load_adapter_state", "masks", "set_masks"),
    "rosa_fx.attach": ("adapter", "base_weight", "delta", "trainable_parameters", "transform"),
    "rosa_fx.distributed.checkpoint": ("load_training_state", "save_training_state"),
    "rosa_fx.distributed.shard": ("shard_bases",),
    "rosa_fx.errors": ("EagerTrainingWarning", "RosaError"),
    "rosa_fx.huggingface": ("RosaCallback",),
    "rosa_fx.mask": ("Mask",),
    "rosa_fx.mask_files": ("load_masks", "save_masks"),
    "rosa_fx.peft_export": ("export_peft",),
    "rosa_fx.peft_import": ("import_peft",),
    "rosa_fx.merge_report": ("MergeReport",),
    "rosa_fx.merging": ("merge", "unmerge"),
    "rosa_fx.regions": ("compile_blocks",),
    "rosa_fx.report": ("RewriteReport", "TargetReport", "explain"),
    "rosa_fx.schedule": ("MaskSchedule",),
    "rosa_fx.spec": ("RosaSpec",),
    "rosa_fx.training": ("TrainConfig", "TrainResult", "train"),
    "rosa_fx.training.optim": ("optimizer_for",),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _HOME.items():
        if name in names:
            value = globals()[name] = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module 'rosa_fx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
