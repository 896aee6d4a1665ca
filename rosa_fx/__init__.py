"""rosa_fx: RoSA and QRoSA fine-tuning (arXiv 2401.04679) as a torch.compile graph-rewriting pass."""

from rosa_fx.adapter_files import load_adapter, save_adapter
from rosa_fx.adapters import adapter_state, load_adapter_state, masks, set_masks
from rosa_fx.attach import adapter, base_weight, delta, trainable_parameters, transform
from rosa_fx.errors import RosaError
from rosa_fx.mask import Mask
from rosa_fx.merging import merge
from rosa_fx.report import RewriteReport, TargetReport, explain
from rosa_fx.schedule import MaskSchedule
from rosa_fx.spec import RosaSpec
from rosa_fx.training import TrainConfig, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "Mask",
    "MaskSchedule",
    "RewriteReport",
    "RosaError",
    "RosaSpec",
    "TargetReport",
    "TrainConfig",
    "TrainResult",
    "adapter",
    "adapter_state",
    "base_weight",
    "delta",
    "explain",
    "load_adapter",
    "load_adapter_state",
    "masks",
    "merge",
    "save_adapter",
    "set_masks",
    "train",
    "trainable_parameters",
    "transform",
]
