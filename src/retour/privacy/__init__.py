"""Evaluating how classifiers hold against changes that keep a picture's meaning."""

from .classifiers import Classifier as Classifier
from .classifiers import embedded_classifiers as embedded_classifiers
from .classifiers import load_classifier as load_classifier
