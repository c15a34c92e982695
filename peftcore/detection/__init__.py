"""Architecture detection: read from a model's structure what the model is and which layers adapters can target."""

from peftcore.detection.architecture import Architecture, ExpertInfo, LinearInfo, NormInfo
from peftcore.detection.detect import detect
from peftcore.detection.prefix import LayerCache, PrefixGeometry

__all__ = ["Architecture", "ExpertInfo", "LayerCache", "LinearInfo", "NormInfo", "PrefixGeometry", "detect"]
