"""The trainer: `train`, its settings and result, and the tools around them."""

from rosa_fx.training.allocator import tune_allocator
from rosa_fx.training.config import TrainConfig
from rosa_fx.training.interrupt import Terminated
from rosa_fx.training.metrics import TrainResult, read_metrics
from rosa_fx.training.picture import save_loss_curve
from rosa_fx.training.trainer import train

__all__ = ["Terminated", "TrainConfig", "TrainResult", "read_metrics", "save_loss_curve", "train", "tune_allocator"]
