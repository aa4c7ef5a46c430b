"""Predictors: query and key in, the blocks that matter out."""

from tamis.predictors.base import Keep, Predictor
from tamis.predictors.sparge import Sparge
from tamis.predictors.window import Window

__all__ = ["Keep", "Predictor", "Sparge", "Window"]
