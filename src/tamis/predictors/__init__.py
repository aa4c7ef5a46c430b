"""Predictors: query and key in, the blocks that matter out."""

from tamis.predictors.antidiagonal import Antidiagonal
from tamis.predictors.base import Keep, Predictor
from tamis.predictors.oracle import Oracle
from tamis.predictors.probe import Probe
from tamis.predictors.query_sampled import QuerySampled
from tamis.predictors.random import Random
from tamis.predictors.sparge import Sparge
from tamis.predictors.vertical_slash import VerticalSlash
from tamis.predictors.window import Window

__all__ = [
    "Antidiagonal",
    "Keep",
    "Oracle",
    "Predictor",
    "Probe",
    "QuerySampled",
    "Random",
    "Sparge",
    "VerticalSlash",
    "Window",
]
