"""What a model is and where adapters go, read from its structure."""

from peftcore.detection.architecture import Architecture, ExpertInfo, LinearInfo
from peftcore.detection.detect import detect

__all__ = ["Architecture", "ExpertInfo", "LinearInfo", "detect"]
