"""rosa_fx: RoSA and QRoSA fine-tuning (arXiv 2401.04679) as a torch.compile graph-rewriting pass."""

from rosa_fx.adapters import adapter_state, load_adapter_state, masks, set_masks
from rosa_fx.attach import adapter, base_weight, delta, merge, trainable_parameters, transform
from rosa_fx.errors import RosaError
from rosa_fx.mask import Mask
from rosa_fx.report import RewriteReport, TargetReport, explain
from rosa_fx.schedule import MaskSchedule
from rosa_fx.spec import RosaSpec

__version__ = "0.1.0"

__all__ = [
    "Mask",
    "MaskSchedule",
    "RewriteReport",
    "RosaError",
    "RosaSpec",
    "TargetReport",
    "adapter",
    "adapter_state",
    "base_weight",
    "delta",
    "explain",
    "load_adapter_state",
    "masks",
    "merge",
    "set_masks",
    "trainable_parameters",
    "transform",
]
