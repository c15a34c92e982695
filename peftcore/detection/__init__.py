"""What a model is and where adapters go, read from its structure."""

from peftcore.detection.architecture import Architecture, ExpertInfo, LinearInfo, NormInfo
from peftcore.detection.detect import detect
from peftcore.detection.prefix import LayerCache, PrefixGeometry

__all__ = ["Architecture", "ExpertInfo", "LayerCache", "LinearInfo", "NormInfo", "PrefixGeometry", "detect"]
